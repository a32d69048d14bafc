"""The only numeric yardsticks of the test suite. `actual` first, `expected` second, everywhere."""

import math

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Fail unless dtype, shape and every bit agree; NaN equals NaN of the same bits, 0 is not -0.

    The message names the first difference: its flat index, its coordinate and both values.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    differs = (_bits(actual) != _bits(expected)).flatten()
    if not differs.any():
        return
    index = int(differs.nonzero()[0])
    coordinate = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), actual.shape))
    raise AssertionError(
        f"{int(differs.sum())} of {differs.numel()} values differ, the first at index {index} = "
        f"{coordinate}: {_shown(actual, index)}, expected {_shown(expected, index)}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; 0 for two zeros, infinite for one."""
    _assert_comparable(actual, expected)
    error = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    return float(error / size) if size > 0 else (math.inf if error > 0 else 0.0)


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise in dB: −20·log10(relative error). Infinite when equal."""
    error = relative_error(actual, expected)
    return -20 * math.log10(error) if error > 0 else math.inf


def worst_channel(actual: Tensor, expected: Tensor, dim: int = -1) -> float:
    """The largest relative error of any one channel along `dim`: what an average would hide."""
    _assert_comparable(actual, expected)
    channels = zip(actual.unbind(dim), expected.unbind(dim), strict=True)
    return max(relative_error(got, wanted) for got, wanted in channels)


def _assert_comparable(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    for name, tensor in (("actual", actual), ("expected", expected)):
        assert tensor.float().isfinite().all(), f"{name} holds NaN or infinity"


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().cpu().view(_BITS[x.element_size()])


def _shown(x: Tensor, index: int) -> str:
    value = x.detach().contiguous().flatten()[index].cpu()
    bits = int(_bits(value)) & (1 << 8 * x.element_size()) - 1
    return f"{value.item()!r} (0x{bits:0{2 * x.element_size()}x})"
