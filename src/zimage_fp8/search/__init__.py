"""VERB quantize --policy auto: the cheapest mixed policy that is good enough, with its evidence.

1. Every unit (one kind of layer in one stretch of blocks) is quantized alone, in every candidate
   format: its squared error in a few pictures, its bytes, its time on this machine.
2. Squared errors of different units add up roughly, so choosing formats is a knapsack: `front`
   walks from the cheapest plan to full precision by the best error saved per cost.
3. Adding up is a prediction; on nano it misses by 3 dB, either way. Plans along the
   front are drawn for real, with all prompts, until the cheapest that keeps the promise is found;
   what was predicted and what came out are both written down.
4. What was chosen by looking at some pictures may be luck with these: the plan is drawn once more
   with prompts and seeds that nothing before has seen, where such are given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from zimage_fp8.engine.loading import load_pipeline
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.evaluate import (
    Drawn,
    Quality,
    Subject,
    Workload,
    difference,
    draw,
    exchanged,
    load_requests,
    load_subject,
    quantized_modules,
    summarize,
)
from zimage_fp8.layout import read_config
from zimage_fp8.model.pipeline import ImageRequest
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.quantize import find_unquantized
from zimage_fp8.search.costs import Costs, fixed_bytes, measure_costs, picture_seconds
from zimage_fp8.search.front import KEEP, Choice, Option, Point, front
from zimage_fp8.search.policy_file import write_evidence, write_policy
from zimage_fp8.search.stretches import Stretch, stretches
from zimage_fp8.sensitivity.units import Unit, measure

CANDIDATES = {"e4m3-static": "full", "int8-rot": "int8-rot"}  # spec -> the preset that has it
UNIT_PROMPTS = 4  # for what only predicts; more would sharpen what adding up then blurs

OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


@dataclass(frozen=True)
class Goal:
    """Exactly one of the three is given.

    min_psnr: mean PSNR over the prompts against full precision, in dB, at the least `minimize`.
    max_latency_s: of one picture, on this machine. max_memory_bytes: of all weights of the
    pipeline.
    """

    min_psnr: float | None = None
    max_latency_s: float | None = None
    max_memory_bytes: int | None = None
    minimize: Literal["latency", "memory"] | None = None

    def check(self) -> None:
        """Raise UsageError unless exactly one goal is given, and it can mean something."""
        given = (self.min_psnr, self.max_latency_s, self.max_memory_bytes)
        if sum(value is not None for value in given) != 1:
            raise UsageError(
                "policy auto needs one goal: --min-psnr DB, --max-latency S or --max-memory SIZE"
            )
        if any(value is not None and not value > 0 for value in given):
            raise UsageError("a goal of zero or less: give a positive number")
        if self.minimize and self.min_psnr is None:
            raise UsageError("--minimize belongs to --min-psnr", param="minimize")

    def cost(self, device: str) -> Literal["latency", "memory"]:
        """What is saved. On a CPU 8 bits save memory and rarely time, so that is the default."""
        if self.min_psnr is None:
            return "latency" if self.max_latency_s is not None else "memory"
        return self.minimize or ("latency" if device == "cuda" else "memory")


@dataclass(frozen=True)
class Verified:
    """A plan that was drawn: what adding up had predicted, and what came out."""

    point: Point
    quality: Quality
    latency_s: float | None = None


@dataclass(frozen=True)
class Found:
    """The chosen plan and everything that led to it; held_out: what it draws with other prompts."""

    policy_file: Path
    evidence_file: Path
    chosen: Verified
    verified: list[Verified]
    cost: str
    held_out: Quality | None


def search(
    model: str,
    goal: Goal,
    out: Path,
    *,
    workload: Workload | None = None,
    held_out: Path | None = None,
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> Found:
    """Write the policy to `out` (a .toml file) and its evidence beside it.

    workload: what is drawn to choose. held_out: a file of prompts to draw the chosen plan with.

    Measurements are streamed to `out` with the suffixes .e4m3-static.json and .int8-rot.json, from
    which an interrupted search resumes. Raises UsageError for a goal that makes no sense,
    ZImageError when no plan reaches it.
    """
    goal.check()
    if not out.absolute().parent.is_dir():
        raise ZImageError(f"cannot write {out}: its folder does not exist")
    if out.exists():
        raise ZImageError(f"{out} already exists", hint="remove it or choose another --out")
    folder = find_unquantized(model)
    config, _ = read_config(folder / "transformer")
    parts = stretches(config)
    seen = workload or Workload()
    requests = load_requests(folder, seen)
    unseen = _unseen(folder, held_out, seen, requests)
    stage = _Stages(on_progress)
    full = find_policy(CANDIDATES["e4m3-static"])
    base = load_subject(
        model, folder, full, requests, device=device, on_calibration=stage("calibrating")
    )
    int8 = find_policy(CANDIDATES["int8-rot"])
    modules = {
        "e4m3-static": base.quantized,
        "int8-rot": quantized_modules(folder, int8, base.pipeline, base.calibration),
    }
    costs = measure_costs(base, modules, model, device, stage("timing"))
    few = replace(base, requests=requests[:UNIT_PROMPTS])
    errors = {
        spec: _errors(replace(few, policy=spec, quantized=modules[spec]), parts, out, stage)
        for spec in modules
    }
    cost = goal.cost(base.pipeline.device.type)
    options = [_options(part, errors, costs, cost) for part in parts]
    rest = costs.rest_s if cost == "latency" else float(fixed_bytes(folder))
    points = front(options, rest)
    trial = _Trial(base, modules, parts, stage("verifying"))
    last = _Trial(replace(base, requests=unseen), modules, parts, stage("drawing other prompts"))
    chosen = _choose(goal, points, trial, cost)
    if all(spec == KEEP for spec in chosen.point.specs):
        raise ZImageError(
            "the model reaches this goal unquantized, and no mix does better",
            hint="keep bf16_base, or ask for less memory, less time or a lower PSNR",
        )
    elsewhere = last(chosen.point).quality if unseen else None
    write_policy(out, parts, chosen.point, _why(goal, chosen, elsewhere))
    if goal.max_latency_s is not None:
        chosen = replace(chosen, latency_s=_real_latency(model, out, base))
    evidence = out.with_suffix(".json")
    facts = {
        "settings": base.settings(),
        "unit_prompts": len(few.requests),
        "goal": goal,
        "cost": cost,
        "front": points,
        "verified": trial.verified,
        "chosen": chosen,
        "held_out": {
            "prompts": [request.prompt for request in unseen],
            "seeds": [request.seed for request in unseen],
            "quality": elsewhere,
        },
    }
    write_evidence(evidence, facts, parts, options)
    return Found(out, evidence, chosen, trial.verified, cost, elsewhere)


def _unseen(
    folder: Path, file: Path | None, seen: Workload, requests: Sequence[ImageRequest]
) -> list[ImageRequest]:
    """The prompts of `file`, with seeds of their own. Raises UsageError when some were seen."""
    if file is None:
        return []
    others = Workload(file, None, seen.size, seen.steps, seen.first_seed + len(requests))
    unseen = load_requests(folder, others)
    if both := {it.prompt for it in unseen} & {it.prompt for it in requests}:
        raise UsageError(
            f"{file}: the search itself draws {len(both)} of its prompts, such as {min(both)!r}",
            param="verify_prompts",
        )
    return unseen


class _Stages:
    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress

    def __call__(self, name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if self.on_progress is not None:
                self.on_progress(name, done, total)

        return report


def _errors(
    subject: Subject, parts: list[Stretch], out: Path, stage: _Stages
) -> Mapping[str, list[float]]:
    """Per stretch the squared error of every prompt's picture, with only it quantized."""
    units = [Unit(f"parts:{part.name}", part.modules) for part in parts]
    file = out.with_suffix(f".{subject.policy}.json")
    found = measure(subject, units, file, stage(f"measuring {subject.policy}"))
    return {part.name: [it.mse for it in found.units[f"parts:{part.name}"]] for part in parts}


def _options(
    part: Stretch,
    errors: Mapping[str, Mapping[str, list[float]]],
    costs: Costs,
    cost: Literal["latency", "memory"],
) -> list[Option]:
    """What a stretch may become, keeping it included."""
    price = costs.seconds if cost == "latency" else costs.bytes
    found = [
        Option(
            KEEP, price(part.modules, KEEP), (0.0,) * len(next(iter(errors.values()))[part.name])
        )
    ]
    return found + [
        Option(spec, price(part.modules, spec), tuple(errors[spec][part.name])) for spec in errors
    ]


class _Trial:
    """Draws plans for real, each at most once."""

    def __init__(
        self,
        base: Subject,
        modules: Mapping[str, Mapping[str, nn.Module]],
        parts: list[Stretch],
        report: Callable[[int, int], None],
    ) -> None:
        self.base, self.modules, self.parts, self.report = base, modules, parts, report
        self.references: list[Drawn] = []
        self.verified: list[Verified] = []

    def __call__(self, point: Point) -> Verified:
        for known in self.verified:
            if known.point is point:
                return known
        if not self.references:
            self.references = [draw(self.base.pipeline, request) for request in self.base.requests]
        with exchanged(self.base.pipeline.transformer, self._chosen(point.specs)):
            drawn = [draw(self.base.pipeline, request) for request in self.base.requests]
        pairs = zip(drawn, self.references, strict=True)
        self.verified.append(Verified(point, summarize([difference(*pair) for pair in pairs])))
        self.report(len(self.verified), len(self.verified) + 1)
        return self.verified[-1]

    def _chosen(self, specs: Choice) -> dict[str, nn.Module]:
        return {
            module: self.modules[spec][module]
            for part, spec in zip(self.parts, specs, strict=True)
            if spec != KEEP
            for module in part.modules
        }


def _choose(goal: Goal, points: list[Point], trial: _Trial, cost: str) -> Verified:
    """The plan to write: by cost alone for a budget, by drawing for a quality."""
    if goal.min_psnr is not None:
        return _cheapest_good(goal.min_psnr, points, trial)
    budget = goal.max_latency_s if cost == "latency" else goal.max_memory_bytes
    assert budget is not None
    affordable = [point for point in points if point.cost <= budget]
    if not affordable:
        raise ZImageError(
            f"no plan fits {_amount(budget, cost)}: the cheapest takes "
            f"{_amount(points[0].cost, cost)}",
            hint="raise the budget, or draw smaller pictures",
        )
    return trial(affordable[-1])


def _cheapest_good(min_psnr: float, points: list[Point], trial: _Trial) -> Verified:
    """Bisection along the front, beginning where the prediction says; full precision is the end."""
    low, high = 0, len(points) - 1  # points[high] is good: full precision reproduces itself
    probe = next(i for i, point in enumerate(points) if point.predicted_psnr >= min_psnr)
    while low < high:
        probe = min(max(probe, low), high - 1)
        if trial(points[probe]).quality.mean >= min_psnr:
            high = probe
        else:
            low = probe + 1
        probe = (low + high) // 2
    return trial(points[high])


def _real_latency(model: str, policy: Path, subject: Subject) -> float:
    """Seconds of one picture as served: the engine's choice of kernels, BF16 elsewhere."""
    device = str(subject.pipeline.device)
    pipeline = load_pipeline(model, policy=str(policy), dtype="bfloat16", device=device)
    return picture_seconds(pipeline, subject.requests[0])


def _amount(value: float, cost: str) -> str:
    return f"{value:.3g} s a picture" if cost == "latency" else f"{value / 1e9:.3g} GB of weights"


def _why(goal: Goal, chosen: Verified, elsewhere: Quality | None) -> str:
    asked = {
        "min_psnr": f"mean PSNR of at least {goal.min_psnr} dB",
        "max_latency_s": f"at most {goal.max_latency_s} s a picture",
        "max_memory_bytes": f"at most {goal.max_memory_bytes} bytes of weights",
    }
    (wanted,) = [text for name, text in asked.items() if getattr(goal, name) is not None]
    drawn = (
        f"Found for {wanted}: {chosen.quality.mean:.1f} dB measured on "
        f"{chosen.quality.pictures} prompts ({chosen.point.predicted_psnr:.1f} dB predicted)"
    )
    if elsewhere:
        drawn += f", {elsewhere.mean:.1f} dB on {elsewhere.pictures} that it had not seen"
    return f"{drawn}."
