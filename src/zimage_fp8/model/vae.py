"""Between latents and pixels, each half of the autoencoder loaded when it is needed."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zimage_fp8.model.autoencoder import Autoencoder, load_autoencoder


class Decoder:
    """Latents in, 8-bit pixels out; and the way back, for pictures that start from another one."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.vae = load_autoencoder(folder / "vae", "decoder", dtype, device)
        self.folder = folder
        self._encoder: Autoencoder | None = None
        self.scaling = self.vae.config.scaling_factor
        self.shift = self.vae.config.shift_factor or 0.0

    def decode(self, latent: Tensor) -> np.ndarray:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3], rounded on the device."""
        z = latent.to(self.vae.dtype) / self.scaling + self.shift
        picture = self.vae.decode(z)[0]
        levels = ((picture / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
        pixels: np.ndarray = levels.permute(1, 2, 0).cpu().numpy()
        return pixels

    def encode(self, pixels: np.ndarray) -> Tensor:
        """uint8 [height, width, 3] -> latent fp32 [1, channels, height/8, width/8].

        The mean of what the encoder says, not a sample: one picture, one latent. The encoder half
        is read from the folder the first time.
        """
        if self._encoder is None:
            where = self.folder / "vae"
            self._encoder = load_autoencoder(where, "encoder", self.vae.dtype, self.vae.device)
        vae = self._encoder
        levels = torch.from_numpy(pixels).to(vae.device).permute(2, 0, 1)[None]
        picture = (levels.float() / 127.5 - 1).to(vae.dtype)
        return (vae.encode(picture).float() - self.shift) * self.scaling
