"""How far a picture is from its BF16 reference, exactly as the seed card computes it."""

import io

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from zimage_fp8.bench.record import Quality
from zimage_fp8.errors import ZImageError

SSIM_WINDOW = 11
DATA_RANGE = 255


def compare(picture: np.ndarray, reference: np.ndarray) -> Quality:
    """PSNR (infinite for equal pictures) and SSIM of uint8 [H, W, 3] pictures of one size."""
    if picture.shape != reference.shape:
        raise ZImageError(f"a picture is {picture.shape}, its reference {reference.shape}")
    if np.array_equal(picture, reference):
        return Quality(psnr_db=float("inf"), ssim=1.0)
    return Quality(
        psnr_db=float(peak_signal_noise_ratio(reference, picture, data_range=DATA_RANGE)),
        ssim=float(
            structural_similarity(
                reference,
                picture,
                win_size=SSIM_WINDOW,
                channel_axis=-1,
                data_range=DATA_RANGE,
            )
        ),
    )


def pixels(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3]"""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
