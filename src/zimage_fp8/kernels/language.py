"""Triton where it is installed; where it is not (CPU machines), names that let modules import."""

from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _NoTriton:
        """Kernels stay plain functions that nobody calls: `runs_triton` is False."""

        constexpr = object

        @staticmethod
        def jit(function: Any = None, **options: object) -> Any:
            return function or (lambda function: function)

    triton = tl = _NoTriton()

__all__ = ["HAS_TRITON", "multiprocessors", "next_power_of_2", "runs_triton", "tl", "triton"]


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an op on x runs its Triton kernel; the reference runs everywhere else."""
    return x.is_cuda and HAS_TRITON


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: more than one program, less than one per tile or row
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
