"""Plots: what is drawn is where its numbers say, and readable as XML."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from zimage_fp8.bench.plots import Bar, Curve, Dot, Rung, curves, ladder, pareto, stacked_bars
from zimage_fp8.bench.statistics import Interval
from zimage_fp8.bench.svg import Scale, round_step, scale, text_width

SPACE = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def circles(svg: str) -> list[tuple[float, float]]:
    return [
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parsed(svg).iter(f"{SPACE}circle")
    ]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in parsed(svg).iter(f"{SPACE}text")]


@pytest.mark.parametrize(
    ("rough", "step"), [(0.9, 1), (1, 1), (1.1, 2), (3, 5), (7, 10), (0.03, 0.05), (120, 200)]
)
def test_ticks_are_round(rough: float, step: float) -> None:
    assert round_step(rough) == pytest.approx(step)


def test_a_scale_maps_and_has_ticks_inside() -> None:
    axis = Scale(0, 10, 100, 200)
    assert (axis(0), axis(5), axis(10)) == (100, 150, 200)
    assert list(axis.ticks()) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1.0, 1.0]])
def test_a_scale_holds_its_values(values: list[float]) -> None:
    axis = scale(values, 0, 100)
    assert all(0 < axis(value) < 100 for value in values)


def known(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1)


def test_pareto_is_up_for_better_and_right_for_slower() -> None:
    dots = [
        Dot("slow <good>", known(3.0), known(30.0)),
        Dot("fast & bad", known(1.0), known(20.0), is_best=True),
        Dot("alone", Interval(2.0, None, None), Interval(25.0, None, None)),
        Dot("base", known(4.0), None),
    ]
    svg = pareto(dots, {"floor": 36.0}, "s", "dB", "title")
    slow, fast, alone = circles(svg)
    assert fast[0] < alone[0] < slow[0]
    assert slow[1] < alone[1] < fast[1]
    assert {"slow <good>", "★ fast & bad", "alone", "base", "floor"} <= set(texts(svg))


def test_names_do_not_cover_each_other() -> None:
    dots = [Dot(f"variant {i}", known(1 + i / 100), known(20.0)) for i in range(6)]
    svg = pareto(dots, {}, "s", "dB", "t")
    found = [e for e in parsed(svg).iter(f"{SPACE}text") if (e.text or "").startswith("variant")]
    boxes = [box_of(element) for element in found]
    assert len(boxes) == 6
    for index, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[:index]:
            assert abs(y - other_y) > 10 or right <= other_left or other_right <= left


def box_of(element: ElementTree.Element) -> tuple[float, float, float]:
    """left, right and baseline of a text"""
    x, y = float(element.attrib["x"]), float(element.attrib["y"])
    width = text_width(element.text or "", 12)
    return (x - width, x, y) if element.attrib["text-anchor"] == "end" else (x, x + width, y)


def test_a_curve_has_a_dot_per_point_and_its_name() -> None:
    svg = curves([Curve("full", [(1, 2.0), (2, 3.5)])], "x", "y", "t", diagonal="all in time")
    assert len(circles(svg)) == 2
    assert {"full", "all in time"} <= set(texts(svg))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_names_of_many_lines_stay_on_the_page(level: float) -> None:
    """Where all end at the bottom, or at the top, apart from each other."""
    lines = [Curve(f"line {index}", [(1.0, level), (2.0, level)]) for index in range(11)]
    svg = curves([*lines, Curve("other", [(1.0, 1.0 - level)])], "x", "y", "title")
    page = float(parsed(svg).attrib["height"])
    named = [t for t in parsed(svg).iter(f"{SPACE}text") if (t.text or "").startswith("line")]
    heights = sorted(float(text.attrib["y"]) for text in named)
    assert len(heights) == 11
    assert heights[0] > 0
    assert heights[-1] < page
    assert all(after - before > 12 for before, after in pairwise(heights))


def test_bars_are_as_long_as_their_parts() -> None:
    rows = [Bar("one", {"encode": 1.0, "denoise": 3.0}, "4 s"), Bar("two", {"denoise": 2.0}, "2 s")]
    svg = stacked_bars(rows, "s", "t")
    hints = {
        (r.find(f"{SPACE}title").text or ""): float(r.attrib["width"])  # type: ignore[union-attr]
        for r in parsed(svg).iter(f"{SPACE}rect")
        if r.find(f"{SPACE}title") is not None
    }
    assert hints["one, denoise: 3 s"] == pytest.approx(3 * hints["one, encode: 1 s"], abs=0.2)
    assert hints["two, encode: 0 s"] == 0


def test_a_ladder_says_milliseconds_and_the_whole_gain() -> None:
    svg = ladder(
        [Rung("eager", "as it comes", {"1024x512": 600, "1024x1024": 1200}),
         Rung("fused", "our kernels", {"1024x512": 300})], "t",
    )  # fmt: skip
    assert {"600   1.00×", "300   2.00×", "1200   1.00×", "fused", "our kernels"} <= set(texts(svg))
    assert re.search(r"prefers-color-scheme:dark", svg)


def test_a_long_explanation_stays_inside_the_ladder() -> None:
    """An early one began left of the picture: it is anchored at its end."""
    what = "one kernel per norm, gate and rotation; adaLN once per timestep, and a little more"
    svg = ladder([Rung("fused", what, {"1024x512": 300})], "t")
    assert what not in texts(svg)
    lines = [it for it in parsed(svg).iter(f"{SPACE}text") if it.attrib.get("text-anchor") == "end"]
    assert " ".join(what.split()) == " ".join((it.text or "") for it in lines if it.text in what)
    for line in lines:
        assert float(line.attrib["x"]) > text_width(line.text or "", 11)


def test_a_ladder_without_rungs_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a rung"):
        ladder([], "t")
