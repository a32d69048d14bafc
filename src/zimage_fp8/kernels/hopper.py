"""Kernels of CUDA C++ for Hopper: compiled by NVRTC, described to the copy engine, launched by the
driver's C interface."""

import ctypes
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Protocol

import torch
from torch import Tensor

from zimage_fp8.kernels import nvrtc
from zimage_fp8.kernels.language import HAS_TRITON

HEADERS = ("hopper.cuh", "head_product.cuh")  # given to every program
SHARED_MEMORY = 227 * 1024  # what one program of compute capability 9.0 may have
# Registers a thread, of 65,536: the copying warpgroup gives to the two or three multiplying ones.
REGISTERS = {2: (24, 240), 3: (32, 160)}


class Program(Protocol):
    """What is compiled: `name`.cu, its constants, and the products that it calls, as a header."""

    def __hash__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_memory(self) -> int: ...
    def constants(self) -> Mapping[str, int | float]: ...
    def header(self) -> str: ...


def needs_hopper(capability: tuple[int, int] | None) -> str | None:
    """What a GPU of this compute capability, or no GPU, or this installation lacks, or None."""
    if capability != (9, 0):
        return "it needs Hopper's wgmma (compute capability 9.0)"
    if nvrtc.find_library() is None:
        return "it needs NVRTC, which PyTorch for CUDA brings; pip install nvidia-cuda-nvrtc"
    return None if HAS_TRITON else "it needs Triton, whose cache keeps what was compiled"


@lru_cache
def hopper_refusal(device: torch.device) -> str | None:
    """Why a device cannot run these kernels, or None."""
    is_cuda = device.type == "cuda"
    return needs_hopper(torch.cuda.get_device_capability(device) if is_cuda else None)


def threads(warpgroups: int) -> int:
    """Of as many multiplying warpgroups, and the copying one."""
    return 128 * (warpgroups + 1)


def register_split(warpgroups: int) -> dict[str, int]:
    producer, consumer = REGISTERS[warpgroups]
    return {"PRODUCER_REGISTERS": producer, "CONSUMER_REGISTERS": consumer}


def product(
    name: str,
    sums: tuple[str, str, int],
    types: str,
    *,
    flags: str = "",
    a: str = "descriptor",
    adds: bool = True,
) -> str:
    """CUDA C++ of a function that issues one wgmma. sums: type, constraint and count of a thread's
    registers; types: behind `m64`; a: `descriptor` of shared memory, or `registers`; adds: whether
    it can add to the sums (its last argument says so) or only set them, whatever they were."""
    kind, constraint, count = sums
    access = "+" if adds else "="
    results = ", ".join(f'"{access}{constraint}"(sums[{i}])' for i in range(count))
    if a == "descriptor":
        declared, inputs, left = "u64 a", '"l"(a)', f"%{count}"
    else:
        declared = "const u32 *a"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        left = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    b = count + (1 if a == "descriptor" else 4)
    argument, value, given = (", int adds", f"%{b + 1}", ', "r"(adds)') if adds else ("", "0", "")
    return f"""
        __device__ __forceinline__ void {name}(
            {kind} (&sums)[{count}], {declared}, u64 b{argument}) {{
            asm volatile("{{\\n.reg .pred adds;\\nsetp.ne.b32 adds, {value}, 0;\\n"
                "wgmma.mma_async.sync.aligned.m64{types}"
                " {{{", ".join(f"%{i}" for i in range(count))}}}, {left}, %{b}, adds{flags};\\n}}"
                : {results} : {inputs}, "l"(b){given});
        }}"""


def compiled(program: Program) -> bytes:
    """Machine code of a program, from the cache on disk where it was compiled before."""
    folder = resources.files("zimage_fp8.kernels")
    return nvrtc.compiled(
        program.name,
        (folder / f"{program.name}.cu").read_text(),
        {name: (folder / name).read_text() for name in HEADERS}
        | {"products.cuh": program.header()},
        [
            "--gpu-architecture=sm_90a",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in program.constants().items()),
        ],
    )


def compile_in_background(programs: Iterable[Program]) -> None:
    """Fill the cache while other things are loaded: 0.7 s each where they were never compiled."""
    wanted = list(dict.fromkeys(programs))
    if wanted:
        work = threading.Thread(target=lambda: [compiled(program) for program in wanted])
        work.daemon = True  # who leaves before it is done does not wait for it
        work.start()


class TensorMap(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 16),)


def tensor_map(x: Tensor, box: Sequence[int]) -> TensorMap:
    """How the bulk copy engine reads x, as bytes, in boxes of `box` (innermost first), swizzled
    over 128 bytes. What lies beyond an edge is read as zeros."""
    size = x.element_size()
    shape = [x.shape[-1] * size, *reversed(x.shape[:-1])]
    strides = [stride * size for stride in reversed(x.stride()[:-1])]
    rank = len(shape)
    # The driver wants it on 64 bytes, and a copy of it is what the kernel gets.
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    place = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
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


Argument = ctypes.Structure | Tensor | int | float | None
Value = ctypes.Structure | ctypes.c_void_p | ctypes.c_int | ctypes.c_float


def launch(
    program: Program, blocks: int, arguments: Sequence[Argument], device: torch.device
) -> None:
    """On the current stream. A tensor is handed over as its address, a number as 32 bits, a
    structure as it is."""
    values = [_value(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    assert device.index is not None
    _check(
        _driver().cuLaunchKernel(
            _function(device.index, program),
            blocks, 1, 1,
            program.threads, 1, 1,
            program.shared_memory,
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
            addresses,
            None,
        )
    )  # fmt: skip


def _value(argument: Argument) -> Value:
    if isinstance(argument, ctypes.Structure):
        return argument
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


@lru_cache
def _function(device: int, program: Program) -> ctypes.c_void_p:
    """The kernel, loaded into a device. Compiled once per machine."""
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(driver.cuModuleLoadData(ctypes.byref(module), compiled(program)))
        entry = f"{program.name}_kernel".encode()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, entry))
        dynamic_shared_memory = 8
        _check(driver.cuFuncSetAttribute(function, dynamic_shared_memory, program.shared_memory))
    return function


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'').decode()} ({code})")
