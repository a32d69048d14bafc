"""One comparison picture per prompt: every variant, labelled with its numbers."""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_fp8.bench.record import Record, RequestRecord
from zimage_fp8.bench.table import Row, quality_text, rows
from zimage_fp8.errors import ZImageError

COLUMNS = 3
MAX_CELL = 640  # three of these fill a wide page; smaller pictures stay pixel for pixel
MIN_PITCH = 250  # what a label needs

PAPER, INK, GREY, ACCENT = "#ffffff", "#1b1f24", "#6a737d", "#b8460e"
MARGIN, GAP, LABEL, LINE = 32, 20, 60, 30
FRAME = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Point = tuple[int, int]


def write_grids(record: Record, folder: Path, out: Path) -> list[Path]:
    """Write comparison-prompt<i>.png for every prompt to `out`. `folder` holds the pictures."""
    paths = []
    for prompt in range(len(record.parameters.prompts)):
        path = out / grid_name(prompt)
        draw_grid(record, prompt, folder).save(path, optimize=True)
        paths.append(path)
    return paths


def grid_name(prompt: int) -> str:
    return f"comparison-prompt{prompt}.png"


def draw_grid(record: Record, prompt: int, folder: Path) -> Image.Image:
    """The prompt as title, then one labelled cell per variant, three to a row.

    Raises ZImageError naming a picture of `folder` that cannot be read.
    """
    title = _title_lines(record, prompt)
    top = MARGIN + len(title) * LINE + LINE
    page = Image.new("RGB", _page_size(record, top), PAPER)
    _draw_title(ImageDraw.Draw(page), title, _facts(record, prompt))
    variants = zip(rows(record), record.variants, _corners(record, top), strict=True)
    for row, variant, corner in variants:
        request = next(request for request in variant.requests if request.prompt == prompt)
        _draw_picture(page, folder / request.picture, corner, _cell(record), row)
        _draw_label(ImageDraw.Draw(page), corner, _cell(record), row, request)
    return page


def _cell(record: Record) -> Point:
    width, height = record.parameters.width, record.parameters.height
    shrink = min(1, MAX_CELL / width)
    return round(width * shrink), round(height * shrink)


def _pitch(record: Record) -> Point:
    """From one cell's corner to the next."""
    width, height = _cell(record)
    return max(width, MIN_PITCH) + GAP, height + LABEL + GAP


def _page_size(record: Record, top: int) -> Point:
    right, down = _pitch(record)
    num_columns = min(COLUMNS, len(record.variants))
    num_rows = math.ceil(len(record.variants) / COLUMNS)
    return (
        2 * MARGIN + num_columns * right - GAP,
        top + num_rows * down - GAP + MARGIN,
    )


def _corners(record: Record, top: int) -> Iterator[Point]:
    """The upper left corner of every cell, in the variants' order."""
    right, down = _pitch(record)
    for index in range(len(record.variants)):
        row, column = divmod(index, COLUMNS)
        yield MARGIN + column * right, top + row * down


def _title_lines(record: Record, prompt: int) -> list[str]:
    num_columns = min(COLUMNS, len(record.variants))
    num_letters = max(24, num_columns * _pitch(record)[0] // 14)
    return textwrap.wrap(record.parameters.prompts[prompt], num_letters) or [""]


def _facts(record: Record, prompt: int) -> str:
    parameters = record.parameters
    return (
        f"{record.model} · seed {parameters.seeds[prompt]} · {parameters.size} · "
        f"{parameters.steps} steps · guidance {parameters.guidance:g}"
    )


def _draw_title(draw: ImageDraw.ImageDraw, lines: list[str], facts: str) -> None:
    for index, line in enumerate(lines):
        draw.text((MARGIN, MARGIN - 8 + index * LINE), line, INK, font(23, bold=True))
    draw.text((MARGIN, MARGIN - 4 + len(lines) * LINE), facts, GREY, font(15))


def _draw_picture(page: Image.Image, path: Path, corner: Point, cell: Point, row: Row) -> None:
    left, top = corner
    try:
        with Image.open(path) as picture:
            page.paste(picture.convert("RGB").resize(cell, Image.Resampling.LANCZOS), corner)
    except OSError as error:
        raise ZImageError(f"cannot read the picture {path}: {error}") from None
    if row.is_best:
        box = (left - FRAME, top - FRAME, left + cell[0] + FRAME - 1, top + cell[1] + FRAME - 1)
        ImageDraw.Draw(page).rectangle(box, outline=ACCENT, width=FRAME)


def _draw_label(
    draw: ImageDraw.ImageDraw, corner: Point, cell: Point, row: Row, request: RequestRecord
) -> None:
    left, top = corner[0], corner[1] + cell[1] + 9
    draw.text((left, top), row.policy, ACCENT if row.is_best else INK, font(17, bold=True))
    if row.is_best:
        draw.text((left + cell[0], top + 2), "best overall", ACCENT, font(14), anchor="ra")
    numbers = f"{quality_text(request.quality)} · {request.latency_s:.2f} s"
    draw.text((left, top + 24), numbers, GREY, font(14))


def font(size: int, *, bold: bool = False) -> Font:
    """DejaVu where the machine has it, else the font that comes with Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
