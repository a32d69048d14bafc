"""Pictures as files, and what they say about themselves."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_fp8.errors import ZImageError
from zimage_fp8.model.request import GeneratedImage, ImageRequest
from zimage_fp8.picture import (
    DEFLATE_PART_BYTES,
    deflated,
    encode_picture,
    encode_pixels,
    read_metadata,
)

DESCRIBE = {"model": "m", "policy": "p", "versions": {}}


def image(prompt: str) -> GeneratedImage:
    pixels = np.zeros((16, 32, 3), np.uint8)
    return GeneratedImage(pixels, ImageRequest(prompt, 32, 16, seed=5), (1.0, 0.0), 1, {})


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("prompt", ["a red apple", "一个红苹果 🍎"])
def test_every_format_tells_how_it_was_made(
    tmp_path: Path, output_format: str, prompt: str
) -> None:
    file = tmp_path / f"picture.{output_format}"
    file.write_bytes(encode_picture(image(prompt), DESCRIBE, output_format))
    told = read_metadata(file)
    if output_format == "png":
        assert (told["prompt"], told["seed"]) == (prompt, 5)
    else:
        assert str(told["parameters"]).startswith(f"{prompt}\nSteps: 8")
        assert "Seed: 5" in str(told["parameters"])


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_and_keeps_silent_when_told_to(tmp_path: Path, output_format: str) -> None:
    file = tmp_path / f"picture.{output_format}"
    file.write_bytes(encode_picture(image("x"), DESCRIBE, output_format, embed_metadata=False))
    with pytest.raises(ZImageError, match="no generation parameters"):
        read_metadata(file)


def test_a_prompt_too_long_for_exif_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "picture.jpeg"
    file.write_bytes(encode_picture(image("x" * 32_000 + "🍎" * 9000), DESCRIBE, "jpeg"))
    with pytest.raises(ZImageError, match="no generation parameters"):
        read_metadata(file)


def kinds_of_pixels(height: int, width: int, seed: int) -> list[np.ndarray]:
    """Noise, one color, and a smooth surface with wraparound between its rows."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    one = np.full((height, width, 3), rng.integers(0, 256), np.uint8)
    y, x, channel = np.ogrid[:height, :width, :3]
    return [noise, one, (17 * y + 3 * x + 60 * channel).astype(np.uint8)]


@pytest.mark.parametrize("seed", range(12))
def test_png_gives_back_every_pixel_at_any_size(seed: int) -> None:
    height, width = (int(it) for it in np.random.default_rng(seed).integers(1, 90, 2))
    for pixels in kinds_of_pixels(height, width, seed):
        with Image.open(io.BytesIO(encode_pixels(pixels, "png"))) as opened:
            assert (opened.format, opened.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (1024, 512)])
def test_png_of_extreme_sizes(height: int, width: int) -> None:
    for pixels in kinds_of_pixels(height, width, 0):
        with Image.open(io.BytesIO(encode_pixels(pixels, "png"))) as opened:
            opened.verify()  # every chunk's checksum
        with Image.open(io.BytesIO(encode_pixels(pixels, "png"))) as opened:
            assert np.array_equal(np.asarray(opened), pixels)


def test_png_takes_pixels_that_are_not_contiguous() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 20), np.uint8).transpose(1, 2, 0)
    with Image.open(io.BytesIO(encode_pixels(pixels[::2, ::-1], "png"))) as opened:
        assert np.array_equal(np.asarray(opened), pixels[::2, ::-1])


def test_png_is_any_zlib_s_to_read() -> None:
    """One IDAT chunk, a plain zlib stream of rows: no reader needs ISA-L."""
    pixels = kinds_of_pixels(33, 47, 0)[0]
    file = encode_pixels(pixels, "png")
    start = file.index(b"IDAT")
    length = int.from_bytes(file[start - 4 : start])
    rows = zlib.decompress(file[start + 4 : start + 4 + length])
    assert len(rows) == 33 * (1 + 3 * 47)
    assert file[start + 8 + length :] == b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4)


@pytest.mark.parametrize("beyond", [-1, 0, 1, DEFLATE_PART_BYTES])
def test_parts_that_threads_deflate_are_one_stream(beyond: int) -> None:
    data = np.random.default_rng(0).integers(0, 9, DEFLATE_PART_BYTES + beyond, np.uint8)
    stream = zlib.decompressobj()
    assert stream.decompress(b"".join(deflated(data))) == data.tobytes()
    assert stream.eof
    assert not stream.unused_data


def test_png_on_a_photograph_is_no_larger_than_pillow_s_fastest() -> None:
    """On a smooth picture with noise of two levels. Sizes and times: benchmarks/picture.py."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((512, 256), Image.Resampling.BICUBIC), np.float64)
    noisy = (smooth + rng.normal(0, 2, smooth.shape)).round().clip(0, 255).astype(np.uint8)
    pillow = io.BytesIO()
    Image.fromarray(noisy).save(pillow, "PNG", compress_level=1)
    assert len(encode_pixels(noisy, "png")) < 1.1 * len(pillow.getvalue())


def test_metadata_comes_before_the_pixels_and_keeps_pillow_s_reading(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode_picture(image("a\nlong prompt, ü 🍎 " * 500), DESCRIBE, "png"))
    with Image.open(file) as opened:
        text = dict(opened.info)  # of what stands before the pixels: none was decoded yet
    assert set(text) == {"parameters", "zimage_fp8"}
    assert text["parameters"].startswith("a\nlong prompt, ü 🍎 ")
