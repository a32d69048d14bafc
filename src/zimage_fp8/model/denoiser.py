"""Who runs the diffusion transformer: the plain model here, or the engine in its place."""

from typing import Protocol

from torch import Tensor

from zimage_fp8.model.z_image import ZImageTransformer


class Denoiser(Protocol):
    """What a pipeline asks of a transformer. One thread calls it."""

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        """As `ZImageTransformer.refine_caption`."""

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """latent: fp32 [batch, channels, height, width]; t: fp32 [1] on the CPU, 1 − sigma;
        caption: a refined one. Returns the transformer's output, fp32 of latent's shape."""

    def describe(self) -> dict[str, object]:
        """What runs, by name: attention, matrix products."""

    def release(self) -> None:
        """Give back memory that is not needed between pictures."""


class PlainDenoiser:
    """The model as it is written, in PyTorch: the reference, and what calibration observes."""

    def __init__(self, transformer: ZImageTransformer) -> None:
        self.transformer = transformer

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        return self.transformer.refine_caption(caption, is_pad)

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        output: Tensor = self.transformer(latent, t.to(latent.device), caption)
        return output.float()

    def describe(self) -> dict[str, object]:
        return {
            "engine": "plain",
            "attention": "torch scaled_dot_product_attention",
            "gemm": "torch linear; E4M3: _scaled_mm, on a CPU dequantized; INT8: _int_mm",
        }

    def release(self) -> None:
        """Nothing is kept."""
