"""Pictures as files, and what they say about themselves."""

from pathlib import Path

import numpy as np
import pytest

from zimage_fp8.errors import ZImageError
from zimage_fp8.model.pipeline import GeneratedImage, ImageRequest
from zimage_fp8.picture import encode_picture, read_metadata

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
