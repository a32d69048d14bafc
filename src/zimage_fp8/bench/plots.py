"""The plots of reports and docs, each one function from numbers to one SVG text."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zimage_fp8.bench.statistics import Interval
from zimage_fp8.bench.svg import Canvas, Scale, colour, scale, text_width, tick_text

WIDTH = 860
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 18, 46
LABEL_SIZE = 12.0
LABEL_STEP = 15.0
DASHES = ("", "6 3", "2 3")  # when there are more lines than colours

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Dot:
    """One variant of the Pareto plot. y is None for the reference, which has no quality."""

    name: str
    x: Interval
    y: Interval | None
    is_best: bool = False
    note: str = ""


def pareto(
    dots: Sequence[Dot], levels: Mapping[str, float], x_title: str, y_title: str, title: str
) -> str:
    """Less x and more y is better: every dot with its intervals, and the line of best choices.

    levels: name -> y, drawn as lines across, such as noise floors. A dot without y is a line too.
    """
    judged = [(dot, dot.y) for dot in dots if dot.y is not None]
    height = 460.0
    canvas = Canvas(WIDTH, height)
    xs = [bound for dot in dots for bound in _bounds(dot.x)]
    ys = [bound for _, y in judged for bound in _bounds(y)] + list(levels.values())
    x_scale = scale(xs, LEFT, WIDTH - RIGHT)
    y_scale = scale(ys or [0.0], height - BOTTOM, TOP)
    _axes(canvas, x_scale, y_scale, x_title, y_title)

    taken: list[Box] = []
    for name, level in levels.items():
        y = y_scale(level)
        canvas.line((LEFT, y), (WIDTH - RIGHT, y), "var(--muted)", dash="3 4")
        taken.append(_label(canvas, WIDTH - RIGHT, y - 5, name, anchor="end", css="muted"))
    for dot in dots:
        if dot.y is None:
            x = x_scale(dot.x.value)
            canvas.line((x, TOP), (x, height - BOTTOM), "var(--muted)", dash="6 4")
            below = height - BOTTOM - 8
            taken.append(_label(canvas, x - 5, below, dot.name, anchor="end", css="muted"))
    _frontier(canvas, [(x_scale(d.x.value), y_scale(y.value)) for d, y in judged])
    places = [(dot, x_scale(dot.x.value), y_scale(y.value)) for dot, y in judged]
    for place, (dot, quality) in enumerate(judged):
        _crossed_dot(canvas, dot, quality, x_scale, y_scale, colour(place))
    taken += [(x - 7, y - 7, x + 7, y + 7) for _, x, y in places]
    for dot, x, y in places:
        taken.append(_free_label(canvas, (x, y), dot, taken))
    return canvas.render(title)


def _bounds(interval: Interval) -> list[float]:
    return [v for v in (interval.value, interval.low, interval.high) if v is not None]


def _frontier(canvas: Canvas, points: Sequence[tuple[float, float]]) -> None:
    """Through the points that no other beats in both; pixels, so higher is less y."""
    best = [
        (x, y)
        for x, y in points
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]
    if len(best) > 1:
        canvas.path(sorted(best), "var(--grid)")


def _crossed_dot(
    canvas: Canvas, dot: Dot, y_value: Interval, x_scale: Scale, y_scale: Scale, fill: str
) -> None:
    x, y = x_scale(dot.x.value), y_scale(y_value.value)
    if dot.x.low is not None and dot.x.high is not None:
        canvas.line((x_scale(dot.x.low), y), (x_scale(dot.x.high), y), fill, width=1.5)
    if y_value.low is not None and y_value.high is not None:
        canvas.line((x, y_scale(y_value.low)), (x, y_scale(y_value.high)), fill, width=1.5)
    canvas.dot(x, y, "var(--best)" if dot.is_best else fill, radius=5.5, hint=dot.note or dot.name)


def _free_label(canvas: Canvas, at: tuple[float, float], dot: Dot, taken: Sequence[Box]) -> Box:
    """The name near its dot, between its intervals' lines, where it covers nothing; tied if far."""
    x, y = at
    name = f"★ {dot.name}" if dot.is_best else dot.name
    css = "best bold" if dot.is_best else ""
    offsets = [
        (anchor, x + dx, y + dy)
        for dy in (-8, 17, -22, 31, -36, 45, -50, 59)
        for anchor, dx in (("start", 8), ("end", -8))
    ]
    boxes = [(_box(px, py, name, anchor), anchor, px, py) for anchor, px, py in offsets]
    inside = [one for one in boxes if one[0][0] > LEFT and one[0][2] < WIDTH]
    free = [one for one in inside if not any(_overlap(one[0], box) for box in taken)]
    _, anchor, px, py = (free or inside or boxes)[0]
    if abs(py - 4 - y) > 24:
        canvas.line((x, y), (px, py - 4), "var(--muted)", width=0.7)
    return _label(canvas, px, py, name, anchor=anchor, css=css)


def _label(canvas: Canvas, x: float, y: float, text: str, *, anchor: str, css: str) -> Box:
    canvas.text(x, y, text, size=LABEL_SIZE, anchor=anchor, css=css)
    return _box(x, y, text, anchor)


def _box(x: float, y: float, text: str, anchor: str) -> Box:
    width = text_width(text, LABEL_SIZE)
    left = x - width if anchor == "end" else x
    return left, y - LABEL_SIZE + 1, left + width, y + 3


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]


def curves(
    lines: Sequence[Curve], x_title: str, y_title: str, title: str, *, diagonal: str = ""
) -> str:
    """Lines over a common x, each named at its end. diagonal: what y = x is called, if drawn."""
    height, end = 360.0, WIDTH - 160.0
    canvas = Canvas(WIDTH, height)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_scale = scale(xs, LEFT, end, from_zero=True)
    y_scale = scale(ys, height - BOTTOM, TOP, from_zero=True)
    _axes(canvas, x_scale, y_scale, x_title, y_title)
    if diagonal:
        most = min(x_scale.high, y_scale.high)
        corners = [(x_scale(value), y_scale(value)) for value in (0.0, most)]
        canvas.line(corners[0], corners[1], "var(--muted)", dash="3 4")
        canvas.text(corners[1][0], corners[1][1] - 4, diagonal, css="muted", anchor="end")
    ends = []
    for place, line in enumerate(lines):
        corners = [(x_scale(x), y_scale(y)) for x, y in line.points]
        dash = DASHES[place // 7 % len(DASHES)]
        canvas.path(corners, colour(place), dash=dash)
        for (x, y), (px, py) in zip(line.points, corners, strict=True):
            hint = f"{line.name}: {tick_text(x)} → {y:.3g}"
            canvas.dot(px, py, colour(place), radius=3.5, hint=hint)
        ends.append((corners[-1][1], corners[-1][0], place, line.name))
    _end_labels(canvas, ends, end + 14)
    return canvas.render(title)


def _end_labels(
    canvas: Canvas, ends: Sequence[tuple[float, float, int, str]], column: float
) -> None:
    """Names in a column beside the lines, pushed apart, each tied to its line's end."""
    ends = sorted(ends)
    rows: list[float] = []
    for y, *_ in ends:
        rows.append(max(y, rows[-1] + LABEL_STEP) if rows else y)
    bottom = canvas.height - 8
    for index in reversed(range(len(rows))):  # what would leave the page pushes the others up
        rows[index] = min(rows[index], bottom)
        bottom = rows[index] - LABEL_STEP
    for row, (y, x, place, name) in zip(rows, ends, strict=True):
        canvas.line((x + 5, y), (column, row), colour(place), width=0.8)
        canvas.text(column + 4, row + 4, name)


@dataclass(frozen=True)
class Bar:
    """One row: parts in drawing order; `end` is written behind the whole bar."""

    name: str
    parts: Mapping[str, float]
    end: str
    is_best: bool = False


def stacked_bars(rows: Sequence[Bar], unit: str, title: str) -> str:
    """One bar a row, the same part in the same colour, a legend on top."""
    names = list(dict.fromkeys(part for row in rows for part in row.parts))
    left = max(text_width(row.name, 13) for row in rows) + 28
    step, top = 26.0, 34.0
    canvas = Canvas(WIDTH, top + step * len(rows) + 34)
    longest = max(sum(max(part, 0) for part in row.parts.values()) for row in rows)
    x_scale = Scale(0, longest, left, WIDTH - 90)
    x = left
    for place, name in enumerate(names):
        canvas.bar(x, 8, 12, 12, colour(place))
        canvas.text(x + 17, 18, name)
        x += text_width(name, 12) + 36
    bottom = top + step * len(rows)
    for tick in x_scale.ticks():
        canvas.line((x_scale(tick), top - 4), (x_scale(tick), bottom), "var(--grid)")
        canvas.text(x_scale(tick), bottom + 16, tick_text(tick), css="muted", anchor="middle")
    canvas.text(WIDTH - 90, bottom + 31, unit, css="muted", anchor="end")
    for index, row in enumerate(rows):
        y = top + index * step
        css = "best bold" if row.is_best else ""
        canvas.text(left - 10, y + 15, row.name, size=13, anchor="end", css=css)
        start = 0.0
        for place, name in enumerate(names):
            value = max(row.parts.get(name, 0.0), 0.0)
            width = x_scale(start + value) - x_scale(start)
            hint = f"{row.name}, {name}: {value:.4g} {unit}"
            canvas.bar(x_scale(start), y + 2, width, step - 8, colour(place), hint=hint)
            start += value
        canvas.text(x_scale(start) + 6, y + 15, row.end, css="muted")
    return canvas.render(title)


@dataclass(frozen=True)
class Rung:
    """One step of a ladder: everything above it, and `what`. ms: size -> milliseconds."""

    name: str
    what: str
    ms: Mapping[str, float] = field(default_factory=dict)


def ladder(rungs: Sequence[Rung], title: str) -> str:
    """What every step won: one bar per rung and size, with its milliseconds and the whole gain.

    A file of its own: it carries its colours. Raises ValueError for no rungs.
    """
    if not rungs:
        raise ValueError("a ladder needs a rung")
    sizes = list(dict.fromkeys(size for rung in rungs for size in rung.ms))
    beside = [textwrap.wrap(rung.what, 40) for rung in rungs]
    widest = max(text_width(line, 11) for lines in beside for line in [*lines, ""])
    left = 24 + max(widest, *(text_width(rung.name, 13) for rung in rungs))
    thick, pad, top, end = 15.0, 16.0, 44.0, WIDTH - 130.0
    step = thick * len(sizes) + pad
    canvas = Canvas(WIDTH, top + step * len(rungs) + 4)
    x_scale = Scale(0, max(ms for rung in rungs for ms in rung.ms.values()), left, end)
    first = {size: next(r.ms[size] for r in rungs if size in r.ms) for size in sizes}
    x = left
    for place, size in enumerate(sizes):
        canvas.bar(x, 12, 12, 12, colour(place))
        canvas.text(x + 17, 22, size.replace("x", " × "))
        x += text_width(size, 12) + 60
    canvas.text(WIDTH - 8, 22, "milliseconds, gain", css="muted", anchor="end")
    for index, rung in enumerate(rungs):
        y = top + index * step
        middle = y + thick * len(sizes) / 2
        first_line = middle + 4.5 - 6.5 * len(beside[index])
        canvas.text(left - 14, first_line, rung.name, size=13, anchor="end", css="bold")
        for number, line in enumerate(beside[index], 1):
            at = first_line + 1 + 13 * number
            canvas.text(left - 14, at, line, size=11, anchor="end", css="muted")
        for place, size in enumerate(sizes):
            if size in rung.ms:
                ms, row = rung.ms[size], y + place * thick
                canvas.bar(left, row + 1, x_scale(ms) - left, thick - 2, colour(place))
                gain = f"{ms:.0f}   {first[size] / ms:.2f}×"
                canvas.text(x_scale(ms) + 6, row + 12, gain, size=11.5)
    return canvas.render(title)


def _axes(canvas: Canvas, x_scale: Scale, y_scale: Scale, x_title: str, y_title: str) -> None:
    left, right = x_scale.start, x_scale.end
    for tick in y_scale.ticks():
        canvas.line((left, y_scale(tick)), (right, y_scale(tick)), "var(--grid)")
        y = y_scale(tick) + 4
        canvas.text(left - 8, y, tick_text(tick), css="muted", anchor="end")
    for tick in x_scale.ticks():
        x = x_scale(tick)
        canvas.line((x, y_scale.start), (x, y_scale.start + 5), "var(--muted)")
        canvas.text(x, y_scale.start + 19, tick_text(tick), css="muted", anchor="middle")
    canvas.line((left, y_scale.start), (right, y_scale.start), "var(--muted)")
    canvas.text(x_scale.end, y_scale.start + 38, x_title, css="muted", anchor="end")
    canvas.text(16, y_scale.end, y_title, css="muted", anchor="end", turned=True)
