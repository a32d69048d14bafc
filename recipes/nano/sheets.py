"""Pictures side by side, with captions below."""

from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from recipes.nano.shape import SIZE

CAPTION_HEIGHT, LINE_HEIGHT, LINE_LENGTH = 50, 15, 42
PAPER, INK = (28, 28, 32), (235, 235, 235)


def to_image(image: Tensor) -> Image.Image:
    """[3, height, width] in -1..1."""
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_sheet(images: Tensor, file: Path, columns: int, captions: list[str] | None = None) -> Path:
    height = SIZE + (CAPTION_HEIGHT if captions else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = number % columns * SIZE, number // columns * height
        sheet.paste(to_image(image), (left, top))
        lines = wrap(captions[number], LINE_LENGTH)[:3] if captions else []
        for row, line in enumerate(lines):
            pen.text((left + 4, top + SIZE + 2 + row * LINE_HEIGHT), line, fill=INK)
    sheet.save(file, optimize=True)
    return file
