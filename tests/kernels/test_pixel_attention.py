"""Attention of pixels to themselves: the reference against fp64, the kernel against the reference.

The kernel runs in Triton's interpreter on the CPU, and on a GPU where there is one.
"""

import pytest
import torch
from torch import Tensor

from compare import relative_error, same_bits
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.pixel_attention import (
    pixel_attention,
    pixel_attention_reference,
    pixel_attention_triton,
)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# The last tile of pixels whole, with one pixel only, nearly whole; fewer pixels than a tile.
SIZES = [(128, 32), (129, 64), (191, 16), (7, 32)]


def queries_and_pixels(pixels: int, channels: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits of deviation 3: some pixels look at few others, as in a real picture."""
    generator = torch.Generator(device).manual_seed(pixels)
    size = (pixels, channels)
    q, x = (torch.randn(size, generator=generator, device=device) for _ in range(2))
    return 3 * q, x + 0.5


def exact(q: Tensor, x: Tensor) -> Tensor:
    logits = q.double() @ x.double().T / x.shape[1] ** 0.5
    return logits.softmax(-1) @ x.double()


@pytest.mark.parametrize(("pixels", "channels"), SIZES)
def test_the_reference_is_attention(pixels: int, channels: int) -> None:
    q, x = queries_and_pixels(pixels, channels)
    assert relative_error(pixel_attention(q, x), exact(q, x)) < 2e-6


@needs_triton
@pytest.mark.parametrize(("pixels", "channels"), SIZES)
def test_the_kernel_in_fp32(pixels: int, channels: int) -> None:
    """In the interpreter: a GPU would multiply fp32 as TF32."""
    if torch.cuda.is_available():
        pytest.skip("runs in Triton's interpreter, where there is no GPU")
    q, x = queries_and_pixels(pixels, channels)
    found = pixel_attention_triton(q, x)
    assert relative_error(found, pixel_attention_reference(q, x)) < 2e-6


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize(("pixels", "channels"), SIZES)
def test_the_kernel_in_bf16(pixels: int, channels: int) -> None:
    """Rounding the result alone is 2e-3; the weights are rounded too. (Triton's interpreter
    multiplies BF16 as integers.)"""
    q, x = (it.bfloat16() for it in queries_and_pixels(pixels, channels, "cuda"))
    found = pixel_attention_triton(q, x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact(q, x)) < 3.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [16384, 12288, 4095])
def test_full_size_on_the_gpu(pixels: int) -> None:
    q, x = (it.bfloat16() for it in queries_and_pixels(pixels, 512, "cuda"))
    found = pixel_attention(q, x)
    assert relative_error(found, exact(q, x)) < 4e-3
    assert relative_error(found, pixel_attention_reference(q, x)) < 4e-3
    same_bits(pixel_attention(q, x), found)


@pytest.mark.gpu
def test_what_does_not_fit_runs_in_pytorch() -> None:
    """fp32 needs twice the shared memory; 96 channels are no power of two."""
    for q, x in (
        queries_and_pixels(100, 512, "cuda"),
        tuple(it.bfloat16() for it in queries_and_pixels(100, 96, "cuda")),
    ):
        same_bits(pixel_attention(q, x), pixel_attention_reference(q, x))
