"""PSNR and SSIM are scikit-image's, with the seed card's settings."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from zimage_fp8.bench import assemble
from zimage_fp8.bench.assemble import compare_all
from zimage_fp8.bench.quality import check_picture, compare, pixel_digest, pixels
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


def png_of(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_black_and_flat_pictures_are_told(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert check_picture(png_of(pair[0]), "64x48") == []
    black = np.zeros((48, 64, 3), np.uint8)
    assert check_picture(png_of(black), "64x48") == [
        ("flat_picture", "A picture is black everywhere")
    ]
    ((kind, text),) = check_picture(png_of(black + 9), "64x48")
    assert (kind, text) == ("flat_picture", "A picture is of one colour everywhere")


def test_almost_black_is_black_and_a_small_thing_is_a_picture() -> None:
    """A lossy file of a picture of NaN; a dot of 0.2 % of the pixels."""
    noise = np.random.default_rng(0).integers(0, 3, (48, 64, 3), np.uint8)
    assert check_picture(png_of(noise), "64x48") == [
        ("flat_picture", "A picture is black everywhere")
    ]
    noise[:2, :3] = 200
    assert check_picture(png_of(noise), "64x48") == []


def test_a_digest_is_of_what_a_picture_shows(pair: tuple[np.ndarray, np.ndarray]) -> None:
    labelled = io.BytesIO()
    text = PngInfo()
    text.add_text("parameters", "seed 7")
    Image.fromarray(pair[0]).save(labelled, "PNG", pnginfo=text)
    assert labelled.getvalue() != png_of(pair[0])
    assert pixel_digest(labelled.getvalue()) == pixel_digest(png_of(pair[0]))
    assert pixel_digest(png_of(pair[0])) != pixel_digest(png_of(pair[1]))
    turned = pair[0].reshape(64, 48, 3)  # the same bytes
    assert pixel_digest(png_of(turned)) != pixel_digest(png_of(pair[0]))


def test_another_size_cannot_be_compared(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ZImageError, match="1024x512 was asked for, the picture is 64x48"):
        check_picture(png_of(pair[0]), "1024x512")


def test_what_is_no_picture_is_one_sentence() -> None:
    with pytest.raises(ZImageError, match="the picture cannot be read"):
        check_picture(b"hello", "64x48")


def test_many_pairs_are_compared_on_all_cores(
    pair: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers, in the same order."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, picture in zip(paths, pair, strict=True):
        path.write_bytes(png_of(picture))
    pairs = [(paths[0], paths[1]), (paths[1], paths[1])] * 2
    alone = compare_all(pairs)
    monkeypatch.setattr(assemble, "PARALLEL_FROM", 1)
    assert compare_all(pairs) == alone
    assert alone[0] == compare(*pair)
