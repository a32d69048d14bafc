"""Drawing a plot: one SVG text with its own colours for light and dark, no scripts, no fonts.

The palette is Okabe and Ito's, which colour-blind readers can tell apart, darkened for white paper
and lightened for black.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

LIGHT = "--paper:#fff;--ink:#1b1f24;--muted:#5b6570;--grid:#e3e7eb;--best:#b8460e;"
DARK = "--paper:#14171b;--ink:#e6e9ed;--muted:#9aa5b1;--grid:#2b3138;--best:#ff9d66;"
SERIES_LIGHT = ("#0069a8", "#c75000", "#007d5b", "#a3487e", "#8a6d00", "#3f7fbf", "#5a5f66")
SERIES_DARK = ("#56b4e9", "#ff8a3d", "#2fc79a", "#e08bbd", "#f0c948", "#9cc9f5", "#b6bec7")
NUM_COLOURS = len(SERIES_LIGHT)

LETTER = 0.56  # mean width of a letter over its height, in the system fonts


def palette_css(selector: str) -> str:
    """The CSS that gives every variable a value, by the reader's preference."""

    def colours(values: Sequence[str]) -> str:
        return "".join(f"--c{place}:{value};" for place, value in enumerate(values))

    return (
        f"{selector}{{{LIGHT}{colours(SERIES_LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{{selector}{{{DARK}{colours(SERIES_DARK)}}}}}"
    )


PLOT_CSS = (
    ".plot text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}"
    ".plot .muted{fill:var(--muted)}.plot .best{fill:var(--best)}"
    ".plot .bold{font-weight:600}"
)


def colour(place: int) -> str:
    return f"var(--c{place % NUM_COLOURS})"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `end`; `start` may be the larger."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Round numbers inside the scale, about six of them."""
        step = round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        yield from (index * step for index in range(first, last + 1))


def scale(values: Sequence[float], start: float, end: float, *, from_zero: bool = False) -> Scale:
    """A scale that holds all values with a little air, or from zero up."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(0.0 if from_zero else low - air, high + air, start, end)


def round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10, 20, … that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))


def tick_text(value: float) -> str:
    return f"{value:.6g}"


def text_width(text: str, size: float) -> float:
    return len(text) * size * LETTER


class Canvas:
    """Parts of one SVG, in the order they were drawn. Lengths are pixels at full size."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        stroke: str,
        *,
        width: float = 1.0,
        dash: str = "",
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
            f'stroke="{stroke}" stroke-width="{width:g}"{dashes}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], stroke: str, *, dash: str = "") -> None:
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<path d="M{corners}" fill="none" stroke="{stroke}" stroke-width="2"{dashes}/>'
        )

    def dot(self, x: float, y: float, fill: str, *, radius: float = 4.5, hint: str = "") -> None:
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" '
            f'stroke="var(--paper)" stroke-width="1.5">{_hint(hint)}</circle>'
        )

    def bar(
        self, x: float, y: float, width: float, height: float, fill: str, *, hint: str = ""
    ) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
            f'fill="{fill}">{_hint(hint)}</rect>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12.0,
        anchor: str = "start",
        css: str = "",
        turned: bool = False,
    ) -> None:
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        name = f' class="{css}"' if css else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
            f"{name}{turn}>{escape(text)}</text>"
        )

    def render(self, title: str) -> str:
        """The SVG, complete with colours and paper: a file of its own, or a part of a page."""
        label = escape(title)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" '
            f'height="{self.height:g}" aria-label="{label}">'
            f"<style>{palette_css('.plot')}{PLOT_CSS}</style><title>{label}</title>"
            f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(self._parts)}</svg>\n'
        )


def _hint(text: str) -> str:
    """What a pointer that rests there shows."""
    return f"<title>{escape(text)}</title>" if text else ""
