"""What every GPU measurement carries: machine, versions, commit, command, clock and power."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from zimage_fp8.provenance import commit, machine, versions

Envelope = dict[str, Any]


def envelope() -> Envelope:
    """The facts in front of every result file."""
    facts: Envelope = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.argv[0].rpartition("/")[2], *map(_without_machine, sys.argv[1:])],
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        try:
            import triton

            facts["versions"]["triton"] = triton.__version__
        except ImportError:
            pass
    return facts


def _without_machine(word: str) -> str:
    """An absolute path's last part: where files lie on this machine says nothing to a reader."""
    return word.rpartition("/")[2] if word.startswith("/") else word


@contextmanager
def sampled_gpu(period_s: float = 0.02) -> Iterator[dict[str, float]]:
    """Median SM clock (MHz), power (W) and largest process memory (bytes) while the block runs."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    clocks: list[int] = []
    watts: list[float] = []
    used: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(period_s):
            clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
            used.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        done.set()
        thread.join()
        if clocks:
            half = len(clocks) // 2  # the second half: the first still heats up
            found["sm_clock_mhz"] = median(clocks[half:])
            found["power_w"] = median(watts[half:])
            found["device_memory_used_peak_bytes"] = max(used)
