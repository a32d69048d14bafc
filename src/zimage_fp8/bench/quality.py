"""How far a picture is from its BF16 reference, exactly as the seed card computes it."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from zimage_fp8.bench.record import Quality
from zimage_fp8.errors import ZImageError

SSIM_WINDOW = 11
DATA_RANGE = 255
# A picture of NaN is cast to black, and a lossy file adds a level or two. Of 26 pictures of nano on
# plain backgrounds the emptiest has 39 % of its pixels farther from its median.
FLAT_LEVELS = 2
FLAT_SHARE = 0.001


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
    """uint8 [H, W, 3]. Raises ZImageError for what is no picture."""
    try:
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ZImageError(f"the picture cannot be read: {error}") from None


def pixel_digest(png: bytes) -> str:
    """SHA-256 of what a picture shows: a file may also tell its seed, or the time of day."""
    picture = pixels(png)
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def check_picture(png: bytes, size: str) -> list[tuple[str, str]]:
    """(flag, sentence) for what is wrong with it though it can be compared.

    Raises ZImageError for another size than was asked for: it cannot be compared with anything.
    """
    picture = pixels(png)
    found = f"{picture.shape[1]}x{picture.shape[0]}"
    if found != size:
        raise ZImageError(f"{size} was asked for, the picture is {found}")
    return list(_flaws(picture))


def _flaws(picture: np.ndarray) -> Iterator[tuple[str, str]]:
    colour = np.median(picture, axis=(0, 1))
    distance = np.abs(picture - colour).max(2)  # [H, W]
    if (distance > FLAT_LEVELS).mean() < FLAT_SHARE:
        is_black = (colour <= FLAT_LEVELS).all()
        yield "flat_picture", f"A picture is {'black' if is_black else 'of one colour'} everywhere"
