"""Does a server run guidance only when it is told to? Its clock tells what its answer may not.

Guidance costs a second forward per step. So a request with guidance should take longer than one
without, by as much as its steps take. Some servers take guidance 0 for "not given" and run it
anyway: then both take equally long, though the pictures differ.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from zimage_fp8.bench.load import Work
from zimage_fp8.bench.quality import pixel_digest
from zimage_fp8.bench.record import Flag, GuidanceProbe
from zimage_fp8.bench.session import Session
from zimage_fp8.bench.summary import guidance_cost

STEPS = 4
GUIDANCE = 3.0
REPEATS = 3

# Half a forward per step. A server that obeys measures 1, one that does not 0.
LEAST_COST = 0.5
# Twice the steps must take clearly longer, even where the text encoder and VAE weigh much.
LEAST_GROWTH = 1.15


def probe(session: Session, work: Work) -> GuidanceProbe:
    """Time short requests with and without guidance, and with twice the steps, in turns."""
    session.setting.on_stage(session.subject.name, "checking guidance")
    off = replace(work, steps=STEPS, guidance=0.0)
    kinds = {
        "off": off,
        "on": replace(off, guidance=GUIDANCE),
        "twice": replace(off, steps=2 * STEPS),
    }
    took_s: dict[str, list[float]] = {kind: [] for kind in kinds}
    seen: dict[str, str] = {}
    for kind, one in kinds.items():  # each kind once untimed: it may compile or capture
        seen[kind] = pixel_digest(session.ask(one).png)
    for _ in range(REPEATS):
        for kind, one in kinds.items():
            took_s[kind].append(session.ask(one).latency_s)
    return GuidanceProbe(
        size=work.size,
        steps=STEPS,
        guidance=GUIDANCE,
        off_s=took_s["off"],
        on_s=took_s["on"],
        twice_s=took_s["twice"],
        is_same_picture=seen["on"] == seen["off"],
    )


def judge(found: GuidanceProbe) -> Iterator[Flag]:
    """What the times say against the server."""
    growth = median(found.twice_s) / median(found.off_s)
    if growth < LEAST_GROWTH:
        yield Flag(
            kind="ignored_steps",
            text=f"{2 * found.steps} steps took {growth:.2f} times as long as {found.steps}: the "
            "number of steps seems to be ignored.",
        )
        return
    cost = guidance_cost(found)
    if cost >= LEAST_COST:
        return
    measured = (
        f"Turning guidance on added {cost:.2f} forwards per step, expected 1 "
        f"({median(found.off_s):.3f} s without, {median(found.on_s):.3f} s with)"
    )
    if found.is_same_picture:
        yield Flag(
            kind="ignored_guidance",
            text=f"{measured}, and the picture is the same: guidance_scale is ignored, and whether "
            "guidance runs cannot be told.",
        )
    else:
        yield Flag(
            kind="unasked_guidance",
            text=f"{measured}, though the picture changes: guidance seems to run when it is off, "
            "at twice the work.",
        )
