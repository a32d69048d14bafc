"""Tables of numbers as pictures: heat maps in SVG, written by hand so that nothing is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

CELL_WIDTH, CELL_HEIGHT = 54, 17
LABEL_WIDTH, HEAD_HEIGHT, GAP = 128, 46, 22
GOOD, BAD = (247, 251, 255), (178, 24, 43)  # pale blue to dark red, readable without colour vision
DARK_FROM = 0.62  # shades beyond this carry white text


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers: `values` by (row, column), blank where missing.

    is_bad_low: low numbers are the dark ones (decibels); else high ones are. is_log: shades follow
    the logarithm. digits: decimals shown; None shows three significant digits.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], float]
    is_bad_low: bool = False
    is_log: bool = False
    digits: int | None = 1

    @property
    def size(self) -> tuple[int, int]:
        width = LABEL_WIDTH + CELL_WIDTH * len(self.columns)
        needed = max(width, round(6.4 * len(self.title)))
        return needed, HEAD_HEIGHT + CELL_HEIGHT * len(self.rows)


def svg(maps: Sequence[HeatMap]) -> str:
    """The heat maps side by side, as one SVG document on white."""
    width = GAP + sum(it.size[0] + GAP for it in maps)
    height = GAP + max(it.size[1] for it in maps) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui,sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    left = GAP
    for heat_map in maps:
        parts += [f'<g transform="translate({left},{GAP})">', *_drawn(heat_map), "</g>"]
        left += heat_map.size[0] + GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(heat_map: HeatMap) -> list[str]:
    shade = _Shade.of(heat_map)
    parts = [_text(0, 12, heat_map.title, weight="bold")]
    for index, column in enumerate(heat_map.columns):
        x = LABEL_WIDTH + (index + 0.5) * CELL_WIDTH
        parts.append(_text(x, HEAD_HEIGHT - 7, column, anchor="middle"))
    for index, row in enumerate(heat_map.rows):
        y = HEAD_HEIGHT + index * CELL_HEIGHT
        parts.append(_text(LABEL_WIDTH - 6, y + 12, row, anchor="end"))
        for place, column in enumerate(heat_map.columns):
            value = heat_map.values.get((row, column))
            if value is not None:
                parts += _cell(LABEL_WIDTH + place * CELL_WIDTH, y, value, shade, heat_map.digits)
    return parts


def _cell(x: float, y: float, value: float, shade: "_Shade", digits: int | None) -> list[str]:
    depth = shade.depth(value)
    color = ",".join(str(round(a + (b - a) * depth)) for a, b in zip(GOOD, BAD, strict=True))
    ink = "#fff" if depth > DARK_FROM else "#222"
    label = (
        "∞" if math.isinf(value) else f"{value:.3g}" if digits is None else f"{value:.{digits}f}"
    )
    return [
        f'<rect x="{x:g}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" '
        f'fill="rgb({color})"/>',
        _text(x + CELL_WIDTH / 2, y + 12, label, anchor="middle", fill=ink),
    ]


@dataclass(frozen=True)
class _Shade:
    """From the map's best value (0) to its worst (1)."""

    best: float
    worst: float
    is_log: bool

    @classmethod
    def of(cls, heat_map: HeatMap) -> "_Shade":
        known = [v for v in heat_map.values.values() if math.isfinite(v)] or [0.0]
        low, high = min(known), max(known)
        if heat_map.is_bad_low:
            low, high = high, low
        return cls(low, high, heat_map.is_log)

    def depth(self, value: float) -> float:
        if math.isinf(value) or self.best == self.worst:
            return 0.0
        best, worst, at = (self._position(v) for v in (self.best, self.worst, value))
        return min(1.0, max(0.0, (at - best) / (worst - best)))

    def _position(self, value: float) -> float:
        return math.log(max(value, 1e-30)) if self.is_log else value


def _text(
    x: float, y: float, label: str, *, anchor: str = "start", fill: str = "#222", weight: str = ""
) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}"' + (f' font-weight="{weight}"' if weight else "")
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(label)}</text>'
