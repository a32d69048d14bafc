"""Matrix products on Hopper by a kernel of CUDA C++ (`wgmma.cu`): BF16, E4M3 and INT8, any scales,
with the feed-forward's gate inside or without.

Tiles have 192 rows, three warpgroups of 64, which Triton's powers of two do not offer. The products
of this model then come out even: 2,112 tokens are 11 tiles, 11,520 columns 60 of 192 and 3,840
columns 24 of 160, so 132 multiprocessors take five tiles each, or two, and none waits. Inside a
tile the tensor cores are never idle: 1,154 cycles per 128 bytes of depth, where 192 x 192 x 128
products at 4,096 a cycle take 1,152 (H200). What a tile costs beyond is its epilogue.

Exactness. INT8 sums are exact, so plain results equal the reference bit for bit; E4M3 accumulates
as Hopper does it fast. A gate and its value are not rounded between product and gate.
"""

import ctypes
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from zimage_fp8.kernels import nvrtc
from zimage_fp8.kernels.activation import (
    PLAIN,
    Activation,
    Output,
    empty_activation,
    encode,
)
from zimage_fp8.kernels.language import HAS_TRITON, multiprocessors
from zimage_fp8.kernels.tile import Tile

WGMMA_TILE = Tile(m=192, n=192, warps=16, stages=4, group=11)
SHARED_MEMORY = 227 * 1024  # what one program of compute capability 9.0 may have
K_BYTES = 128
# Registers a thread, of 65,536: the copying warpgroup gives to the multiplying ones.
REGISTERS = {2: (40, 232), 3: (32, 160)}
_HEIGHTS = [64 * count for count in REGISTERS]
# Type of sums, constraint of their registers, operand types, flags behind the operands.
WGMMA = {
    torch.bfloat16: ("float", "f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0"),
    torch.float8_e4m3fn: ("float", "f", "k32.f32.e4m3.e4m3", ", 1, 1"),
    torch.int8: ("int", "r", "k32.s32.s8.s8", ""),
}


@dataclass(frozen=True)
class Program:
    """What is compiled: the kernel's constants. dtype is that of both operands."""

    dtype: torch.dtype
    warpgroups: int
    n: int
    stages: int
    cluster: int = 1
    gated: bool = False
    to_codes: bool = False
    scaled: bool = False
    per_token: bool = False
    per_channel: bool = False

    def __post_init__(self) -> None:
        step = 64 if self.gated else 32  # what four lanes write together, twice with a gate
        if self.warpgroups not in REGISTERS or self.n % step or not 0 < self.n <= 256:
            raise ValueError(
                f"a tile of {self.m} x {self.n}: expected {' or '.join(map(str, _HEIGHTS))} rows "
                f"and a multiple of {step} columns up to 256"
            )
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"a tile of {self.m} x {self.n} in {self.stages} stages takes "
                f"{self.shared_memory:,} bytes of {SHARED_MEMORY:,}: take fewer stages"
            )

    @property
    def m(self) -> int:
        return 64 * self.warpgroups

    @property
    def width(self) -> int:
        """Columns that a tile writes."""
        return self.n // 2 if self.gated else self.n

    @property
    def shared_memory(self) -> int:
        """Bytes: alignment, stages with two barriers each, two rows of scales per warpgroup."""
        stage = (self.m + self.n) * K_BYTES + 16
        return 1024 + self.stages * stage + 2 * self.warpgroups * self.n * 4

    def options(self) -> list[str]:
        producer, consumer = REGISTERS[self.warpgroups]
        constants = {
            "WARPGROUPS": self.warpgroups,
            "N": self.n,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "GATED": int(self.gated),
            "TO_CODES": int(self.to_codes),
            "SCALED": int(self.scaled),
            "PER_TOKEN": int(self.per_token),
            "PER_CHANNEL": int(self.per_channel),
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }
        return [
            "--gpu-architecture=sm_90a",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in constants.items()),
        ]

    def header(self) -> str:
        """`multiply`: its operands are as many registers as the tile has columns, halved."""
        kind, constraint, types, flags = WGMMA[self.dtype]
        count = self.n // 2
        registers = ", ".join(f"%{i}" for i in range(count))
        sums = ", ".join(f'"+{constraint}"(sums[{i}])' for i in range(count))
        return f"""
            typedef {kind} Sum;
            #define SUM_REGISTER "{constraint}"
            #define EXACT_SUMS {int(self.dtype == torch.int8)}
            __device__ __forceinline__ void multiply(
                Sum (&sums)[{count}], unsigned long long a, unsigned long long b, int adds) {{
                asm volatile("{{\\n.reg .pred adds;\\nsetp.ne.b32 adds, %{count + 2}, 0;\\n"
                    "wgmma.mma_async.sync.aligned.m64n{self.n}{types}"
                    " {{{registers}}}, %{count}, %{count + 1}, adds{flags};\\n}}"
                    : {sums} : "l"(a), "l"(b), "r"(adds));
            }}"""


@lru_cache
def wgmma_refusal(device: torch.device) -> str | None:
    """Why a device cannot run this kernel, or None."""
    is_cuda = device.type == "cuda"
    return needed_by_wgmma(torch.cuda.get_device_capability(device) if is_cuda else None)


def needed_by_wgmma(capability: tuple[int, int] | None) -> str | None:
    """What a GPU of this compute capability, or no GPU, or this installation lacks, or None."""
    if capability != (9, 0):
        return "it needs Hopper's wgmma (compute capability 9.0)"
    if nvrtc.find_library() is None:
        return "it needs NVRTC, which PyTorch for CUDA brings; pip install nvidia-cuda-nvrtc"
    return None if HAS_TRITON else "it needs Triton, whose cache keeps what was compiled"


def _check_shapes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if x.dtype not in WGMMA or x.dtype != weight.dtype:
        raise ValueError(
            f"wgmma takes BF16, E4M3 or INT8 on both sides, not {x.dtype} and {weight.dtype}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"wgmma writes BF16 or codes, not {dtype}")
    if len(weight) % 16 or x.shape[1] * x.element_size() % 16:
        raise ValueError(f"wgmma takes widths of a multiple of 16, not {tuple(weight.shape)}")


def wgmma(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """x: [tokens, in]; weight: [out, in]. Returns [tokens, out] in `dtype`, BF16. Raises ValueError
    for other types, widths that are no multiple of 16, and tiles that do not fit."""
    _check_shapes(x.values, weight, dtype)
    out = empty_activation(len(x.values), len(weight), PLAIN, x.values.new_empty(0, dtype=dtype))
    _launch(x, weight, weight_scale, out, tile or WGMMA_TILE, gated=False)
    return out.values


def wgmma_gated(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Output,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Activation:
    """As `gated_matmul`, under the conditions of `wgmma`."""
    _check_shapes(x.values, weight, dtype)
    like = x.values.new_empty(0, dtype=dtype)
    written = out if encodes_at_once(out) else PLAIN
    result = empty_activation(len(x.values), len(weight) // 2, written, like)
    _launch(x, weight, weight_scale, result, tile or WGMMA_TILE, gated=True)
    return result if written is out else encode(result.values, out)


def encodes_at_once(out: Output) -> bool:
    """Whether the gate's kernel writes codes: E4M3 under a scale that is known beforehand."""
    return out.is_pointwise and out.spec is not None and out.spec.format == "e4m3"


def program_for(
    weight: Tensor,
    weight_scale: Tensor | None,
    tile: Tile,
    *,
    per_token: bool,
    gated: bool = False,
    to_codes: bool = False,
) -> Program:
    """What a product by `weight` runs. per_token: whether its input has a scale per token."""
    return Program(
        weight.dtype,
        tile.m // 64,
        tile.n,
        tile.stages,
        tile.cluster,
        gated,
        to_codes,
        scaled=weight_scale is not None,
        per_token=per_token,
        per_channel=weight_scale is not None and weight_scale.ndim > 0,
    )


def compile_in_background(programs: Iterable[Program]) -> None:
    """Fill the cache while other things are loaded: 0.7 s each where they were never compiled."""
    wanted = list(dict.fromkeys(programs))
    if wanted:
        work = threading.Thread(target=lambda: [compiled(program) for program in wanted])
        work.daemon = True  # who leaves before it is done does not wait for it
        work.start()


def _launch(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Activation,
    tile: Tile,
    *,
    gated: bool,
) -> None:
    (rows, depth), columns = x.values.shape, out.values.shape[1]
    program = program_for(
        weight,
        weight_scale,
        tile,
        per_token=x.scale is not None and x.scale.ndim > 0,
        gated=gated,
        to_codes=out.scale is not None,
    )
    left = _tensor_map(x.values, [K_BYTES, program.m // program.cluster])
    right = (
        _tensor_map(weight.view(2, columns, depth), [K_BYTES, program.width, 2])
        if gated
        else _tensor_map(weight, [K_BYTES, program.n])
    )
    clusters = -(-rows // program.m) * -(-columns // (program.width * program.cluster))
    at_once = multiprocessors(x.values.device) // program.cluster
    steps = -(-depth * x.values.element_size() // K_BYTES)
    pointers = (
        ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
        for tensor in (out.values, x.scale, weight_scale, out.scale)
    )
    numbers = (ctypes.c_int(value) for value in (rows, columns, steps, tile.group))
    arguments = [left, right, *pointers, *numbers]
    addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    _check(
        _driver().cuLaunchKernel(
            _function(x.values.device.index, program),
            min(clusters, at_once) * program.cluster, 1, 1,
            128 * (program.warpgroups + 1), 1, 1,
            program.shared_memory,
            ctypes.c_void_p(torch.cuda.current_stream(x.values.device).cuda_stream),
            addresses,
            None,
        )
    )  # fmt: skip


class _TensorMap(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 16),)


def _tensor_map(x: Tensor, box: Sequence[int]) -> _TensorMap:
    """How the bulk copy engine reads x, as bytes, in boxes of `box` (innermost first), swizzled
    over 128 bytes. What lies beyond an edge is read as zeros."""
    size = x.element_size()
    shape = [x.shape[-1] * size, *reversed(x.shape[:-1])]
    strides = [stride * size for stride in reversed(x.stride()[:-1])]
    rank = len(shape)
    # The driver wants it on 64 bytes, and a copy of it is what the kernel gets.
    memory = ctypes.create_string_buffer(ctypes.sizeof(_TensorMap) + 64)
    place = _TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    as_bytes, swizzle_128, promote_256, zeros = 0, 3, 3, 0
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(place),
            as_bytes,
            rank,
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * rank)(*shape),
            (ctypes.c_uint64 * rank)(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            swizzle_128,
            promote_256,
            zeros,
        )
    )
    return place


@lru_cache
def _function(device: int, program: Program) -> ctypes.c_void_p:
    """The kernel, loaded into a device. Compiled once per machine, by NVRTC."""
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(driver.cuModuleLoadData(ctypes.byref(module), compiled(program)))
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"wgmma_kernel"))
        dynamic_shared_memory = 8
        _check(driver.cuFuncSetAttribute(function, dynamic_shared_memory, program.shared_memory))
    return function


def compiled(program: Program) -> bytes:
    """Machine code of a program, from the cache on disk where it was compiled before."""
    source = (resources.files("zimage_fp8.kernels") / "wgmma.cu").read_text()
    headers = {"multiply.cuh": program.header()}
    return nvrtc.compiled("wgmma", source, headers, program.options())


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'').decode()} ({code})")
