"""Pictures side by side: every variant of one prompt, each with a map of where it differs."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zimage_fp8.bench.record import Record, RequestRecord, VariantRecord
from zimage_fp8.bench.summary import Case, first_pictures, strata
from zimage_fp8.bench.table import Row, quality_text, rows
from zimage_fp8.errors import ZImageError

COLUMNS = 3
MAX_CELL = 640  # three of these fill a wide page; smaller pictures stay pixel for pixel
MAX_GRIDS = 8  # of more prompts, those that show most
NUM_WORST = 8

PAPER, INK, GREY, ACCENT = "#ffffff", "#1b1f24", "#6a737d", "#b8460e"
MARGIN, GAP, LINE = 32, 20, 30
MIN_LABEL = (150, 96)  # what a name and its numbers need beside their map
FRAME = 3
TITLE = 23
# Where a machine has one of them, titles can be Chinese, Japanese and Korean.
WIDE_FONTS = (
    "NotoSansCJK-Bold.ttc", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc",
)  # fmt: skip
NO_LETTER = "\uffff"

HEAT_FULL = 64  # a mean difference of this many of 255 levels, or more, is the last colour
HEAT = np.array(  # black over violet and orange to pale yellow: also rising in brightness
    [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32
)
HEAT_RULE = (
    "The dark map shows where a picture differs from BF16's: black is not at all, pale yellow "
    f"{HEAT_FULL} or more of 255 levels."
)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Point = tuple[int, int]


def write_grids(record: Record, folder: Path, out: Path) -> list[Path]:
    """Write comparison-prompt<i>.png for the prompts of `grid_prompts`. `folder` has pictures."""
    paths = []
    for prompt in grid_prompts(record):
        path = out / grid_name(prompt)
        draw_grid(record, prompt, folder).save(path, optimize=True)
        paths.append(path)
    return paths


def grid_name(prompt: int) -> str:
    return f"comparison-prompt{prompt}.png"


def grid_prompts(record: Record) -> list[int]:
    """Every prompt or, of many, the first of each kind, then those that came out worst."""
    parameters = record.parameters
    if len(parameters.prompts) <= MAX_GRIDS:
        return list(range(len(parameters.prompts)))
    kinds = [parameters.strata.index(kind) for kind in strata(parameters)]
    worst = [prompt for _, (prompt, _) in worst_pictures(record, len(parameters.prompts))]
    return sorted(list(dict.fromkeys([*kinds, *worst, *range(MAX_GRIDS)]))[:MAX_GRIDS])


def worst_pictures(record: Record, count: int = NUM_WORST) -> list[tuple[VariantRecord, Case]]:
    """The picture of every variant with the least SSIM, the worst first; empty without any."""
    found = []
    for variant in record.variants:
        ssims = [(r.quality.ssim, r) for r in first_pictures(variant).values() if r.quality]
        if ssims:
            ssim, request = min(ssims, key=lambda item: item[0])
            found.append((ssim, variant, (request.prompt, request.size)))
    found.sort(key=lambda item: item[0])
    return [(variant, case) for _, variant, case in found[:count]]


@dataclass(frozen=True)
class Layout:
    """Where things lie on a page of `count` cells; all in pixels."""

    cell: Point
    map: Point
    top: int
    count: int

    @property
    def pitch(self) -> Point:
        """From one cell's corner to the next."""
        width = max(self.cell[0], self.map[0] + MIN_LABEL[0])
        return width + GAP, self.cell[1] + 8 + max(self.map[1], MIN_LABEL[1]) + GAP

    @property
    def columns(self) -> int:
        return min(COLUMNS, self.count)

    @property
    def page(self) -> Point:
        right, down = self.pitch
        num_rows = -(-self.count // COLUMNS)
        return 2 * MARGIN + self.columns * right - GAP, self.top + num_rows * down

    def corner(self, index: int) -> Point:
        row, column = divmod(index, COLUMNS)
        return MARGIN + column * self.pitch[0], self.top + row * self.pitch[1]


def _layout(size: str, count: int, num_lines: int) -> Layout:
    width, height = map(int, size.split("x"))
    shrink = min(1, MAX_CELL / width)
    cell = round(width * shrink), round(height * shrink)
    return Layout(cell, (cell[0] // 2, cell[1] // 2), MARGIN + num_lines * LINE + LINE, count)


def draw_grid(record: Record, prompt: int, folder: Path) -> Image.Image:
    """The prompt as title, then one labelled cell per variant of the main pass, three to a row.

    At the first size. Raises ZImageError naming a picture of `folder` that cannot be read.
    """
    size = record.parameters.size
    face, text = _title(record, prompt)
    width = _layout(size, len(record.variants), 1).page[0] - 2 * MARGIN
    title = wrapped(text, face, width)
    layout = _layout(size, len(record.variants), len(title))
    page = Image.new("RGB", layout.page, PAPER)
    draw = ImageDraw.Draw(page)
    _draw_title(draw, face, title, _facts(record, prompt))
    reference = record.passes[0].reference
    original = _read(folder, _request(reference, prompt, size)) if reference else None
    for index, (row, variant) in enumerate(zip(rows(record), record.variants, strict=True)):
        request = _request(variant, prompt, size)
        picture = _read(folder, request)
        _draw_cell(page, layout, index, picture, is_best=row.is_best)
        if original is not None and variant is not reference:
            heat = heat_map(picture, original)
            page.paste(_fit(heat, layout.map), _below(layout, index))
        _draw_label(draw, layout, index, row, request)
    return page


def draw_difference(record: Record, variant: VariantRecord, case: Case, folder: Path) -> bytes:
    """The reference's picture, the variant's, and their difference in one row, as WebP."""
    reference = record.reference
    pair = [_read(folder, first_pictures(one)[case]) for one in (reference, variant)]
    width, height = map(int, case[1].split("x"))
    shrink = min(1, MAX_CELL / width)
    cell = round(width * shrink), round(height * shrink)
    page = Image.new("RGBA", (3 * cell[0] + 2 * 6, cell[1]))  # clear between them: dark or light
    for place, one in enumerate((*pair, heat_map(pair[1], pair[0]))):
        page.paste(_fit(one, cell), (place * (cell[0] + 6), 0))
    return as_webp(page)


def as_webp(picture: Image.Image) -> bytes:
    """For a page that carries its pictures: a tenth of a PNG's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=86)
    return buffer.getvalue()


def heat_map(picture: Image.Image, reference: Image.Image) -> Image.Image:
    """The mean absolute difference over the channels as colour; both pictures of one size."""
    ours, theirs = (np.asarray(one, np.float32) for one in (picture, reference))  # [H, W, 3]
    if ours.shape != theirs.shape:
        raise ZImageError(f"a picture is {ours.shape}, its reference {theirs.shape}")
    level = np.abs(ours - theirs).mean(2).clip(0, HEAT_FULL) / HEAT_FULL * (len(HEAT) - 1)
    low = level.astype(np.int64).clip(0, len(HEAT) - 2)  # [H, W]
    part = (level - low)[..., None]
    return Image.fromarray((HEAT[low] * (1 - part) + HEAT[low + 1] * part).astype(np.uint8))


def _request(variant: VariantRecord, prompt: int, size: str) -> RequestRecord:
    return first_pictures(variant)[prompt, size]


def _read(folder: Path, request: RequestRecord) -> Image.Image:
    path = folder / request.picture
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ZImageError(f"cannot read the picture {path}: {error}") from None


def _fit(picture: Image.Image, size: Point) -> Image.Image:
    same = picture.size == size
    return picture if same else picture.resize(size, Image.Resampling.LANCZOS)


def _facts(record: Record, prompt: int) -> str:
    parameters = record.parameters
    return (
        f"{record.model} · seed {parameters.seeds[prompt]} · {parameters.size} · "
        f"{parameters.steps} steps · guidance {parameters.guidance:g}"
    )


def _title(record: Record, prompt: int) -> tuple[Font, str]:
    """The prompt, and letters for it; its place where the machine has none for its script."""
    text = record.parameters.prompts[prompt]
    faces = [font(TITLE, bold=True), *_wide_fonts(TITLE)]
    if face := next((face for face in faces if _has_letters(face, text)), None):
        return face, text
    return faces[0], f"Prompt {prompt}, in a script that this machine has no letters for"


def _wide_fonts(size: int) -> Iterator[Font]:
    for name in WIDE_FONTS:
        with suppress(OSError):
            yield ImageFont.truetype(name, size)


def _has_letters(face: Font, text: str) -> bool:
    """Whether no letter looks as one that no font has."""
    missing = bytes(face.getmask(NO_LETTER))
    return not any(
        bytes(face.getmask(letter)) == missing for letter in set(text) if ord(letter) > 127
    )


def wrapped(text: str, face: Font, width: float) -> list[str]:
    """Lines that are at most `width` pixels wide, broken at spaces or, where there are none,
    anywhere, as Chinese is."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text) or [""]:
        if lines[-1] and face.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        for letter in word:
            if lines[-1] and face.getlength((lines[-1] + letter).rstrip()) > width:
                lines.append("")
            lines[-1] += letter
    return [line.rstrip() for line in lines]


def _draw_title(draw: ImageDraw.ImageDraw, face: Font, lines: Sequence[str], facts: str) -> None:
    for index, line in enumerate(lines):
        draw.text((MARGIN, MARGIN - 8 + index * LINE), line, INK, face)
    draw.text((MARGIN, MARGIN - 4 + len(lines) * LINE), facts, GREY, font(15))


def _draw_cell(
    page: Image.Image, layout: Layout, index: int, picture: Image.Image, *, is_best: bool
) -> None:
    left, top = layout.corner(index)
    page.paste(_fit(picture, layout.cell), (left, top))
    if is_best:
        right, bottom = left + layout.cell[0], top + layout.cell[1]
        box = (left - FRAME, top - FRAME, right + FRAME - 1, bottom + FRAME - 1)
        ImageDraw.Draw(page).rectangle(box, outline=ACCENT, width=FRAME)


def _below(layout: Layout, index: int) -> Point:
    left, top = layout.corner(index)
    return left, top + layout.cell[1] + 8


def _draw_label(
    draw: ImageDraw.ImageDraw, layout: Layout, index: int, row: Row, request: RequestRecord
) -> None:
    left, top = _below(layout, index)
    left += 0 if row.is_reference else layout.map[0] + 10
    draw.text((left, top), row.name, ACCENT if row.is_best else INK, font(16, bold=True))
    quality = "the reference" if row.is_reference else quality_text(request.quality)
    lines = [*(quality.split(" · ") if quality else []), f"mean {row.latency_s:.2f} s"]
    lines += ["best overall"] if row.is_best else []
    for place, line in enumerate(lines):
        ink = ACCENT if line == "best overall" else GREY
        draw.text((left, top + 22 + place * 18), line, ink, font(14))


def font(size: int, *, bold: bool = False) -> Font:
    """DejaVu where the machine has it, else the font that comes with Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
