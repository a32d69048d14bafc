"""The decoder from latents to pixels: diffusers' AutoencoderKL, decoder half only."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor


class Decoder:
    """Latents in, 8-bit pixels out."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        # `dtype` is this argument's name from diffusers 0.42 on, which still takes the old one.
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        vae.encoder = None  # text to image never encodes; half the memory
        self.vae = vae.to(device).eval()
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def decode(self, latent: Tensor) -> np.ndarray:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3], rounded on the device."""
        z = latent.to(self.vae.dtype) / self.scaling + self.shift
        picture = self.vae.decode(z, return_dict=False)[0][0]
        levels = ((picture / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
        pixels: np.ndarray = levels.permute(1, 2, 0).cpu().numpy()
        return pixels
