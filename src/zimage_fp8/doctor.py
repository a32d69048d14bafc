"""What this machine can run, and why not.

The E4M3 product and PyTorch's own attention kernels are tried, on a tiny example. INT8 and the
attention packages of others, which this program does not call, are judged by the GPU's compute
capability and by what is installed.
"""

import importlib.metadata
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from zimage_fp8.kernels.scaled_mm import scaled_mm, scaled_mm_reference
from zimage_fp8.numerics import amax, quantize, scale_of
from zimage_fp8.provenance import machine, versions

Capability = tuple[int, int]


@dataclass(frozen=True)
class Need:
    """What a GPU must have: a compute capability of at least `lowest` and below `below`."""

    what: str
    lowest: Capability
    below: Capability
    generations: str

    def is_met_by(self, capability: Capability) -> bool:
        return self.lowest <= capability < self.below


ANY_NEWER: Capability = (99, 0)
FP8 = Need("FP8 tensor cores", (8, 9), ANY_NEWER, "Ada, Hopper, Blackwell")
INT8 = Need("asynchronous INT8 tensor cores", (8, 0), ANY_NEWER, "Ampere and newer")
FLASH_3 = Need("fa3-fwd", (9, 0), (10, 0), "Hopper only")
SAGE = Need("sageattention", (8, 0), ANY_NEWER, "Ampere and newer")

SDPA_BACKENDS: dict[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Verdict:
    """One ability: whether it is there, and why (not), in words."""

    name: str
    is_available: bool
    why: str


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: Capability
    memory_bytes: int
    driver: str | None


@dataclass(frozen=True)
class Package:
    """An optional package; `version` is None where it is not installed."""

    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Hub:
    """Where models come from. The token itself is never read out, only whether there is one."""

    home: str
    is_offline: bool
    has_token: bool
    free_bytes: int


@dataclass(frozen=True)
class Report:
    versions: dict[str, str]
    machine: dict[str, object]
    gpus: tuple[Gpu, ...]
    arithmetic: tuple[Verdict, ...]
    attention: tuple[Verdict, ...]
    packages: tuple[Package, ...]
    hub: Hub


OPTIONAL_PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("scikit-image", "bench: PSNR and SSIM", "pip install 'zimage-fp8[bench]'"),
    ("httpx2", "bench: requests to the server", "pip install 'zimage-fp8[bench]'"),
    ("psutil", "bench: peak memory of a process", "pip install 'zimage-fp8[bench]'"),
    ("nvidia-ml-py", "bench: GPU memory of a process", "pip install 'zimage-fp8[bench]'"),
    ("openai", "a client for the server", "pip install openai"),
)


def examine() -> Report:
    """Look at this machine. Touches no network; on a GPU it runs a few kernels of microseconds."""
    return Report(
        versions=versions(),
        machine=machine(),
        gpus=_gpus(),
        arithmetic=_arithmetic(),
        attention=_attention(),
        packages=_packages(),
        hub=_hub(),
    )


def render(report: Report) -> str:
    """The report for a person: facts first, then what runs here and what does not."""
    host, hub = report.machine, report.hub
    lines = [
        " · ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"{host['system']} · {host['cpu']} · {host['cores']} cores · "
        f"{_gigabytes(host['memory_bytes'])} memory",
        *(
            f"GPU {i}: {gpu.name}, compute capability {_dotted(gpu.capability)}, "
            f"{_gigabytes(gpu.memory_bytes)}, driver {gpu.driver or 'unknown'}"
            for i, gpu in enumerate(report.gpus)
        ),
        f"models: {hub.home}, {_gigabytes(hub.free_bytes)} free, "
        f"{'offline' if hub.is_offline else 'online'}, {'a' if hub.has_token else 'no'} token",
    ]
    lines += ["", "arithmetic", *_verdict_lines(report.arithmetic)]
    lines += ["", "attention", *_verdict_lines(report.attention)]
    lines += ["", "optional packages"]
    for package in report.packages:
        found = package.version or f"no: {package.install}"
        lines.append(f"  {package.name:<14} {package.purpose:<33} {found}")
    return "\n".join(lines)


def _verdict_lines(verdicts: tuple[Verdict, ...]) -> Iterator[str]:
    for verdict in verdicts:
        answer = "yes" if verdict.is_available else "no"
        yield f"  {answer:<4} {verdict.name:<20} {verdict.why}"


def _gpus() -> tuple[Gpu, ...]:
    driver = _driver()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory, driver) for gpu in found)


def _driver() -> str | None:
    """The NVIDIA driver's version, where Linux shows it."""
    file = Path("/proc/driver/nvidia/version")
    if not file.exists():
        return None
    words = file.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _packages() -> tuple[Package, ...]:
    return tuple(
        Package(name, _installed(name), purpose, install)
        for name, purpose, install in OPTIONAL_PACKAGES
    )


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub() -> Hub:
    home = Path(constants.HF_HOME)
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    return Hub(
        home=str(home),
        is_offline=constants.HF_HUB_OFFLINE,
        has_token=get_token() is not None,
        free_bytes=shutil.disk_usage(existing).free,
    )


def _arithmetic() -> tuple[Verdict, ...]:
    fp8_gpu = gate("FP8 on the GPU", FP8, _capability())
    if fp8_gpu.is_available:
        fp8_gpu = try_fp8(fp8_gpu.name, torch.device("cuda"))
    return (
        _bf16_on_cpu(),
        try_fp8("FP8 on the CPU", torch.device("cpu")),
        fp8_gpu,
        gate("INT8 on the GPU", INT8, _capability()),
    )


def _bf16_on_cpu() -> Verdict:
    is_native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    level = torch.backends.cpu.get_cpu_capability()
    how = "native kernels" if is_native else "no native kernels: computed in fp32, slowly"
    return Verdict("BF16 on the CPU", is_native, f"{how} ({level})")


def _capability() -> Capability | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def gate(name: str, need: Need, capability: Capability | None) -> Verdict:
    """Whether a GPU of this capability will do; None stands for no GPU that torch can use."""
    if capability is None:
        return Verdict(name, False, no_gpu_reason(torch.version.cuda))
    why = f"{need.what}: {_dotted(need.lowest)} ({need.generations}), here {_dotted(capability)}"
    return Verdict(name, need.is_met_by(capability), why)


def no_gpu_reason(cuda: str | None) -> str:
    """Why torch sees no GPU. `cuda` is the CUDA version torch was built with, or None."""
    if cuda is None:
        return "this torch is built without CUDA"
    return f"torch is built for CUDA {cuda}, but no device answers: nvidia-smi says more"


def try_fp8(name: str, device: torch.device) -> Verdict:
    """Multiply E4M3 codes on `device` and compare with dequantize-and-multiply."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    scale, weight_scale = scale_of(amax(x), "e4m3"), scale_of(amax(weight), "e4m3")
    codes = quantize(x, scale, "e4m3"), quantize(weight, weight_scale, "e4m3")
    expected = scaled_mm_reference(codes[0], scale, codes[1], weight_scale, torch.bfloat16)
    try:
        found = scaled_mm(
            codes[0].to(device),
            scale.to(device),
            codes[1].to(device),
            weight_scale.to(device),
            torch.bfloat16,
        ).cpu()
    except (RuntimeError, NotImplementedError) as error:
        return Verdict(name, False, f"tried: {_first_line(error)}")
    if torch.equal(found, expected):
        return Verdict(name, True, "tried: equals dequantize-and-multiply bit for bit")
    distance = float((found.float() - expected.float()).norm() / expected.float().norm())
    # Two orders of summation in fp32 differ by at most one BF16 rounding, 2^-8.
    return Verdict(name, distance < 2**-8, f"tried: {distance:.1e} from dequantize-and-multiply")


def _attention() -> tuple[Verdict, ...]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        *(_try_sdpa(name, backend, device) for name, backend in SDPA_BACKENDS.items()),
        _wheel("FlashAttention 3", "fa3-fwd", FLASH_3),
        _wheel("SageAttention", "sageattention", SAGE),
    )


def _try_sdpa(name: str, backend: SDPBackend, device: torch.device) -> Verdict:
    name = f"SDPA {name}"
    x = torch.ones(1, 2, 64, 128, dtype=torch.bfloat16, device=device)  # Z-Image's head size
    with warnings.catch_warnings(record=True) as reasons:  # torch explains a refusal in warnings
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(x, x, x)
        except RuntimeError as error:
            if device.type == "cpu":
                return Verdict(name, False, "a GPU kernel; there is no GPU")
            said = [_first_line(reason.message) for reason in reasons] or [_first_line(error)]
            return Verdict(name, False, f"tried: {' '.join(said)}")
    return Verdict(name, True, f"tried on the {device.type.upper()}")


def _wheel(name: str, package: str, need: Need) -> Verdict:
    """A package with attention kernels of its own: the GPU must suit it, and it must be there."""
    verdict = gate(name, need, _capability())
    version = _installed(package)
    if verdict.is_available and version is None:
        return Verdict(name, False, f"not installed: pip install {package}")
    return verdict


def _first_line(text: object) -> str:
    return str(text).partition("\n")[0]


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _gigabytes(num_bytes: object) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if isinstance(num_bytes, int) else "unknown"
