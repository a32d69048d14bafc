"""Between latents and pixels: diffusers' AutoencoderKL, each half loaded when it is needed."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor


class Decoder:
    """Latents in, 8-bit pixels out; and the way back, for pictures that start from another one."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        # `dtype` is this argument's name from diffusers 0.42 on, which still takes the old one.
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        vae.encoder = None  # text to image never encodes; half the memory
        self.vae = vae.to(device).eval()
        self.folder = folder
        self._encoder: AutoencoderKL | None = None
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def decode(self, latent: Tensor) -> np.ndarray:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3], rounded on the device."""
        z = latent.to(self.vae.dtype) / self.scaling + self.shift
        picture = self.vae.decode(z, return_dict=False)[0][0]
        levels = ((picture / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
        pixels: np.ndarray = levels.permute(1, 2, 0).cpu().numpy()
        return pixels

    def encode(self, pixels: np.ndarray) -> Tensor:
        """uint8 [height, width, 3] -> latent fp32 [1, channels, height/8, width/8].

        The mean of what the encoder says, not a sample: one picture, one latent. The encoder half
        is read from the folder the first time.
        """
        vae = self._encoder = self._encoder or self._load_encoder()
        levels = torch.from_numpy(pixels).to(vae.device).permute(2, 0, 1)[None]
        picture = (levels.float() / 127.5 - 1).to(vae.dtype)
        z: Tensor = vae.encode(picture, return_dict=False)[0].mode()
        return (z.float() - self.shift) * self.scaling

    def _load_encoder(self) -> AutoencoderKL:
        vae = AutoencoderKL.from_pretrained(self.folder / "vae", torch_dtype=self.vae.dtype)
        vae.decoder = None
        return vae.to(self.vae.device).eval()
