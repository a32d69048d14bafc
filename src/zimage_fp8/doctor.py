"""What this machine can run, and why not the rest.

A compute capability, a missing package or a missing GPU rules an ability out; what is left is
tried, on a tiny example, by the same functions that draw pictures.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from torch import Tensor

from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.attention import BACKENDS, Backend, Target, choose_backend
from zimage_fp8.kernels.hopper import needs_hopper
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.matmul import IMPLEMENTATIONS, default_implementation, matmul, refusal
from zimage_fp8.kernels.scaled_mm import scaled_mm_reference
from zimage_fp8.numerics import (
    DTYPE,
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROW,
    QuantSpec,
    amax,
    quantize,
    scale_of,
)
from zimage_fp8.provenance import machine, versions

Capability = tuple[int, int]


@dataclass(frozen=True)
class Need:
    """What a GPU must have: a compute capability of at least `lowest`. instead: what runs below."""

    what: str
    lowest: Capability
    generations: str
    instead: str = ""

    def is_met_by(self, capability: Capability) -> bool:
        return capability >= self.lowest


BF16 = Need("BF16 tensor cores", (8, 0), "Ampere and newer")
INT8 = Need("asynchronous INT8 tensor cores", (8, 0), "Ampere and newer")
FP8 = Need("FP8 tensor cores", (8, 9), "Ada, Hopper, Blackwell", "policy int8-rot runs from 8.0")
TMA = Need("bulk copies between memories", (9, 0), "Hopper, Blackwell", "triton takes its place")

HEAD_DIM = 128  # Z-Image's


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
    products: tuple[Verdict, ...]
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
    """Look at this machine. Touches no network. On a GPU it runs a few small kernels, some of
    which Triton compiles first, once."""
    capability = _capability()
    return Report(
        versions=versions() | {"triton": _installed("triton") or "absent"},
        machine=machine(),
        gpus=_gpus(),
        arithmetic=arithmetic(capability),
        products=products(capability),
        attention=attention(capability),
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
    lines += ["", "matrix products", *_verdict_lines(report.products)]
    lines += ["", "attention", *_verdict_lines(report.attention)]
    lines += ["", "optional packages"]
    for package in report.packages:
        found = package.version or f"no: {package.install}"
        lines.append(f"  {package.name:<14} {package.purpose:<33} {found}")
    return "\n".join(lines)


def _verdict_lines(verdicts: tuple[Verdict, ...]) -> Iterator[str]:
    for verdict in verdicts:
        answer = "yes" if verdict.is_available else "no"
        yield f"  {answer:<4} {verdict.name:<22} {verdict.why}"


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


def arithmetic(capability: Capability | None) -> tuple[Verdict, ...]:
    """Formats by device. capability: the GPU's, None for no GPU that torch can use."""
    return (
        _bf16_on_cpu(),
        try_product("FP8 on the CPU", E4M3_STATIC, torch.device("cpu")),
        try_product("INT8 on the CPU", INT8_ROW, torch.device("cpu")),
        gate("BF16 on the GPU", BF16, capability),
        _product_on_gpu("FP8 on the GPU", E4M3_STATIC, FP8, capability),
        _product_on_gpu("FP8 by row on the GPU", E4M3_ROW, FP8, capability),
        _product_on_gpu("INT8 on the GPU", INT8_ROW, INT8, capability),
        _fused_kernels(capability),
    )


def _product_on_gpu(
    name: str, spec: QuantSpec, need: Need, capability: Capability | None
) -> Verdict:
    verdict = gate(name, need, capability)
    return try_product(name, spec, torch.device("cuda")) if verdict.is_available else verdict


def _fused_kernels(capability: Capability | None) -> Verdict:
    verdict = gate("fused kernels", BF16, capability)
    if verdict.is_available and not HAS_TRITON:
        why = "triton is not installed: PyTorch runs their steps one by one, slowly"
        return Verdict(verdict.name, False, f"{why}; pip install triton")
    return verdict


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
    if need.is_met_by(capability):
        return Verdict(name, True, why)
    return Verdict(name, False, f"{why}; {need.instead}" if need.instead else why)


def no_gpu_reason(cuda: str | None) -> str:
    """Why torch sees no GPU. `cuda` is the CUDA version torch was built with, or None."""
    if cuda is None:
        return "this torch is built without CUDA"
    return f"torch is built for CUDA {cuda}, but no device answers: nvidia-smi says more"


def try_product(name: str, spec: QuantSpec, device: torch.device) -> Verdict:
    """Multiply 8-bit codes on `device` and compare with dequantize-and-multiply."""
    x, scale = _codes(32, spec, per_row=not spec.is_static, seed=0)
    weight, weight_scale = _codes(64, spec, per_row=spec.weight == "per-channel", seed=1)
    weight_scale = weight_scale.flatten() if weight_scale.ndim else weight_scale
    expected = scaled_mm_reference(x, scale, weight, weight_scale, torch.bfloat16)
    there = Activation(x.to(device), scale.to(device))
    try:
        scales = weight_scale.to(device)
        how = default_implementation(there, scales)
        found = matmul(there, weight.to(device), scales, torch.bfloat16).cpu()
    except Exception as error:  # noqa: BLE001  whatever stops it is the answer
        return Verdict(name, False, f"tried: {_first_line(error)}")
    if torch.equal(found, expected):
        return Verdict(name, True, f"tried ({how}): equals dequantize-and-multiply bit for bit")
    distance = float((found.float() - expected.float()).norm() / expected.float().norm())
    # Two orders of summation in fp32 differ by at most one BF16 rounding, 2^-8.
    why = f"tried ({how}): {distance:.1e} from dequantize-and-multiply"
    return Verdict(name, distance < 2**-8, why)


def _codes(rows: int, spec: QuantSpec, *, per_row: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes [rows, 64] and their scale, [] or [rows, 1]."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    scale = scale_of(amax(x, per_row=per_row), spec.format)
    return quantize(x, scale, spec.format), scale


def products(capability: Capability | None) -> tuple[Verdict, ...]:
    """Every implementation of `kernels.matmul`, and the operands it takes on this GPU."""
    return tuple(_takes(name, capability) for name in IMPLEMENTATIONS)


def _takes(implementation: str, capability: Capability | None) -> Verdict:
    if implementation == "wgmma" and capability is not None:
        reason = needs_hopper(capability)
        return Verdict(implementation, not reason, reason or f"takes {', '.join(_operands())}")
    fp8 = gate(implementation, FP8, capability)
    if implementation != "reference":
        verdict = gate(implementation, TMA if implementation == "triton-tma" else BF16, capability)
        if not verdict.is_available:
            return verdict
        if implementation.startswith("triton") and not HAS_TRITON:
            return Verdict(implementation, False, "triton is not installed; pip install triton")
    takes = [name for name, given in _operands().items() if not refusal(implementation, *given)]
    if implementation == "reference" or fp8.is_available:
        return Verdict(implementation, True, f"takes {', '.join(takes)}")
    left = [name for name in takes if not name.startswith("E4M3")]
    why = f"takes {', '.join(left)}, no E4M3: {fp8.why}" if left else fp8.why
    return Verdict(implementation, bool(left), why)


def _operands() -> dict[str, tuple[Activation, Tensor | None]]:
    """The kinds of inputs and weight scales that linear layers have."""
    codes = {
        format: torch.zeros(16, 16, dtype=DTYPE[format])
        for format in (E4M3_ROW.format, INT8_ROW.format)
    }
    one, rows, columns = torch.ones([]), torch.ones(16, 1), torch.ones(16)
    return {
        "BF16": (Activation(torch.zeros(16, 16, dtype=torch.bfloat16)), None),
        "E4M3 under two scalars": (Activation(codes["e4m3"], one), one),
        "E4M3 by row": (Activation(codes["e4m3"], rows), columns),
        "INT8 by row": (Activation(codes["int8"], rows), columns),
    }


def attention(capability: Capability | None) -> tuple[Verdict, ...]:
    """Every backend of `kernels.attention` on the device that pictures would be drawn on."""
    device = torch.device("cuda" if capability else "cpu")
    target = Target(device, torch.bfloat16, HEAD_DIM)
    auto, _ = choose_backend("auto", target)
    return tuple(_attends(backend, target, auto) for backend in BACKENDS.values())


def _attends(backend: Backend, target: Target, auto: Backend) -> Verdict:
    if reason := backend.refusal(target):
        return Verdict(backend.name, False, reason)
    try:
        try_attention(backend.run, target)
    except Exception as error:  # noqa: BLE001  whatever stops it is the answer
        return Verdict(backend.name, False, f"tried: {_first_line(error)}")
    chosen = "; auto takes it" if backend is auto else ""
    return Verdict(backend.name, True, f"tried: {backend.summary}{chosen}")


def try_attention(run: Callable[[Tensor, Tensor, Tensor], Tensor], target: Target) -> None:
    """Attend over a tiny example. Raises what the backend raises, and RuntimeError when the
    average of equal values is far from that value (quantized backends miss it by a little)."""
    x = torch.ones(1, 64, 2, target.head_dim, dtype=target.dtype, device=target.device)
    if not torch.allclose(run(x, x, x), x.flatten(2), rtol=0.02):
        raise RuntimeError("the result is wrong")


def _first_line(text: object) -> str:
    return str(text).partition("\n")[0]


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _gigabytes(num_bytes: object) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if isinstance(num_bytes, int) else "unknown"
