"""PSNR and SSIM are scikit-image's, with the seed card's settings."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from zimage_fp8.bench.quality import compare, pixels
from zimage_fp8.errors import ZImageError


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (48, 64, 3), np.uint8)
    noise = random.integers(-9, 10, reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


def test_equals_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    picture, reference = pair
    quality = compare(picture, reference)
    assert quality.psnr_db == peak_signal_noise_ratio(reference, picture, data_range=255)
    assert quality.ssim == structural_similarity(
        reference, picture, win_size=11, channel_axis=-1, data_range=255
    )


def test_psnr_is_its_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    picture, reference = pair
    mse = np.mean((picture.astype(float) - reference.astype(float)) ** 2)
    assert compare(picture, reference).psnr_db == pytest.approx(10 * np.log10(255**2 / mse))


def test_identical_pictures(pair: tuple[np.ndarray, np.ndarray]) -> None:
    quality = compare(pair[1], pair[1].copy())
    assert (quality.psnr_db, quality.ssim) == (float("inf"), 1.0)


def test_sizes_must_agree(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ZImageError, match="its reference"):
        compare(pair[0][:-1], pair[1])


def test_pixels_are_those_of_the_png(pair: tuple[np.ndarray, np.ndarray]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pair[0]).save(buffer, "PNG")
    assert np.array_equal(pixels(buffer.getvalue()), pair[0])
