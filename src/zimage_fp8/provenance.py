"""What a result was made with: versions, commit, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zimage_fp8 import __version__

PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
MEMINFO = Path("/proc/meminfo")


def versions() -> dict[str, str]:
    """Versions of this package, Python, and what computes pictures."""
    found = {"zimage-fp8": __version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The commit of the checkout this package runs from, `-dirty` when it has changes.

    None when it runs from an installed package, or where there is no git to ask.
    """
    here = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in here.parents[:2]):
        return None
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def machine() -> dict[str, object]:
    """CPU name, cores this process may use, memory in bytes, operating system."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def available_memory() -> int | None:
    """Bytes that the system can spare without swapping, its page cache included; None: it does not
    tell, as only Linux does."""
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024  # "12345 kB"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
