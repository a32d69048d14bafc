"""Pinned host memory, which a GPU copies from at full speed: no more than is asked for.

PyTorch's own pinned tensors are rounded up to a power of two, 256 MiB for a layer of 193, and made
by one thread: 35 layers took 6 s and 8.75 GiB where these are 6.6. Here ordinary memory is
registered with CUDA, by several threads at once.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from zimage_fp8.errors import ModelError

THREADS = 8


def host_buffers(count: int, num_bytes: int, device: torch.device) -> list[Tensor]:
    """`count` tensors, uint8 [num_bytes] in host memory, unwritten; pinned for a CUDA device.

    They stay pinned as long as they are referenced themselves: views do not count. Raises
    ModelError where the system does not let so much be pinned.
    """
    allocate = partial(_pinned, device=device) if device.type == "cuda" else _plain
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(allocate, [num_bytes] * count))


def _plain(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    buffer = _plain(num_bytes)
    with torch.cuda.device(device):  # a thread starts on the first, where it would leave a context
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), num_bytes, 0))
        except torch.cuda.CudaError as error:
            raise ModelError(
                f"{num_bytes} bytes of host memory cannot be pinned: {error}",
                hint="--offload text-encoder keeps all its layers in host memory; free some, raise "
                "the limit of locked memory (ulimit -l), or leave it out",
            ) from None
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr())
    return buffer
