"""Drawing a part of a picture anew: where the mask is true, and nowhere else."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

FEATHER_PX = 4  # half a latent cell: a cut at full sharpness shows the VAE's change of tone


@dataclass(frozen=True)
class Kept:
    """What a mask leaves alone. mask: bool [1, 1, height/8, width/8], true where the picture is
    drawn; road: noise minus the source's latent."""

    mask: Tensor
    road: Tensor

    def inside(self, velocity: Tensor) -> Tensor:
        """The model's velocity where the mask is true; elsewhere the road's.

        From a point on the straight road between source and noise, that velocity keeps to it, so
        that at every sigma the model sees the source as noisy as what it draws, and at 0 the source
        is back.
        """
        return torch.where(self.mask, velocity, self.road)


def blend(source: np.ndarray, drawn: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3]: `drawn` inside the mask, fading over a few pixels into `source`.

    The seam lies inside the mask: every pixel outside it is the source's own.
    """
    soft = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(FEATHER_PX))
    # At the mask's edge the blurred value is about a half: there the fade ends, at 0.
    weight = np.clip(np.asarray(soft, np.float32) / 127.5 - 1, 0, 1) * mask
    mixed = source + (drawn.astype(np.float32) - source) * weight[..., None]
    blended: np.ndarray = mixed.round().astype(np.uint8)
    return blended
