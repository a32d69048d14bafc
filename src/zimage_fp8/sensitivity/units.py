"""Units: parts of the model that are quantized at once, and drawing pictures with one of them."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import Tensor, nn

from zimage_fp8.errors import UsageError
from zimage_fp8.evaluate import Drawn, Subject, difference, draw, exchanged
from zimage_fp8.layout import block_of, kind_of
from zimage_fp8.model.pipeline import ImageRequest
from zimage_fp8.model.sampling import Velocity
from zimage_fp8.model.text import TextEncoder
from zimage_fp8.numerics import E4M3_ROW, INT8_ROT, QuantSpec
from zimage_fp8.quant.linear import QuantLinear, quantize_weight, weight_amax, weight_scales
from zimage_fp8.sensitivity.result import Sensitivity, resume, write

SCANS = ("kinds", "blocks", "steps", "text", "cells")
ALL = "all"
CAPTION = "caption"  # the context refiner: it runs once per prompt, in no step
TEXT_SPECS: dict[str, QuantSpec] = {"e4m3-row": E4M3_ROW, "int8-rot": INT8_ROT}

OnUnit = Callable[[int, int], None]  # (pictures done, in all)


@dataclass(frozen=True)
class Unit:
    """What is quantized at once: modules of the transformer, perhaps on one step only (from 0), or
    every linear layer of the text encoder."""

    key: str
    modules: tuple[str, ...] = ()
    step: int | None = None
    text: QuantSpec | None = None


def plan_units(modules: Sequence[str], steps: int, scans: Sequence[str]) -> list[Unit]:
    """The units of the scans, everything at once first. Raises UsageError for an unknown scan."""
    if unknown := [scan for scan in scans if scan not in SCANS]:
        raise UsageError(f"scan {unknown[0]!r}: expected {', '.join(SCANS)}", param="scan")
    units = [Unit(ALL, tuple(modules))]
    if "kinds" in scans:
        units += _grouped("kinds", modules, kind_of)
    if "blocks" in scans:
        units += _grouped("blocks", modules, block_of)
    if "steps" in scans:
        per_prompt = tuple(m for m in modules if m.startswith("context_refiner."))
        per_step = tuple(m for m in modules if m not in per_prompt)
        units += [Unit(f"steps:{CAPTION}", per_prompt)] if per_prompt else []
        units += [Unit(f"steps:{step + 1}", per_step, step) for step in range(steps)]
    if "text" in scans:
        units += [Unit(f"text:{name}", text=spec) for name, spec in TEXT_SPECS.items()]
    if "cells" in scans:
        units += [Unit(f"cells:{block_of(m)} {kind_of(m)}", (m,)) for m in modules]
    return units


def _grouped(scan: str, modules: Sequence[str], label: Callable[[str], str]) -> list[Unit]:
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(label(module), []).append(module)
    return [Unit(f"{scan}:{name}", tuple(members)) for name, members in groups.items()]


def measure(
    subject: Subject,
    units: Sequence[Unit],
    file: Path,
    on_unit: OnUnit | None = None,
) -> Sensitivity:
    """Draw every request with every unit quantized, and write `file` after each unit.

    What `file` already holds is not measured again. Raises ZImageError when it holds results made
    with other settings.
    """
    found = resume(file, subject.settings())
    missing = [unit for unit in units if unit.key not in found.units]
    if not missing:
        return _ordered(found, units)
    total, done = (len(missing) + 1) * len(subject.requests), count(1)

    def drawn(request: ImageRequest, unit: Unit | None) -> Drawn:
        picture = draw_with(subject, request, unit) if unit else draw(subject.pipeline, request)
        if on_unit is not None:
            on_unit(next(done), total)
        return picture

    references = [drawn(request, None) for request in subject.requests]
    for unit in missing:
        found.units[unit.key] = [
            difference(drawn(request, unit), reference)
            for request, reference in zip(subject.requests, references, strict=True)
        ]
        write(found, file)
    return _ordered(found, units)


def draw_with(subject: Subject, request: ImageRequest, unit: Unit) -> Drawn:
    """One picture with one unit quantized."""
    chosen = {name: subject.quantized[name] for name in unit.modules}
    transformer = subject.pipeline.transformer
    with ExitStack() as stack:
        if unit.text is not None:
            encoder = subject.pipeline.text
            assert isinstance(encoder, TextEncoder)  # as `load_subject` chooses it
            stack.enter_context(quantized_text(encoder.model, unit.text))
        if unit.step is None:
            stack.enter_context(exchanged(transformer, chosen))
            return draw(subject.pipeline, request)
        return draw(subject.pipeline, request, on_steps(transformer, chosen, {unit.step}))


def on_steps(
    transformer: nn.Module, modules: Mapping[str, nn.Module], steps: Container[int]
) -> Callable[[Velocity], Velocity]:
    """A velocity field that uses `modules` in its calls number `steps` (from 0) and no others."""

    def wrap(velocity: Velocity) -> Velocity:
        calls = count()

        def chosen(latent: Tensor, sigma: float) -> Tensor:
            if next(calls) not in steps:
                return velocity(latent, sigma)
            with exchanged(transformer, modules):
                return velocity(latent, sigma)

        return chosen

    return wrap


@contextmanager
def quantized_text(encoder: nn.Module, spec: QuantSpec) -> Iterator[None]:
    """The text encoder with its linear layers in 8 bits, activations scaled per token."""
    linears = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    with exchanged(encoder, {name: as_quantized(m, spec) for name, m in linears.items()}):
        yield


def as_quantized(linear: nn.Linear, spec: QuantSpec) -> QuantLinear:
    """A linear layer without bias under a spec that needs no calibration."""
    if linear.bias is not None or spec.is_static:
        raise ValueError("expected a layer without bias, and activations scaled per token")
    weight = linear.weight.detach()
    (scale,) = weight_scales([weight_amax(weight, spec)], spec)
    return QuantLinear(spec, quantize_weight(weight, scale, spec), scale, None)


def _ordered(found: Sensitivity, units: Sequence[Unit]) -> Sensitivity:
    """The units asked for, in their order: a file may hold more, measured in another order."""
    chosen = {unit.key: found.units[unit.key] for unit in units}
    return Sensitivity(found.settings, chosen, found.made_with)
