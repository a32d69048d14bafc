"""What static activation scales are made of: the largest input each linear ever saw.

Calibration runs the real, unquantized denoise loop and records max |x| of every quantizable
linear's input, per step. It does not depend on the policy, so one run serves all of them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import members_of
from zimage_fp8.numerics import QuantSpec, amax, scale_of

SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """Input amax of every quantizable linear, and everything needed to repeat the measurement.

    amax: linear name -> fp32 maxima over all prompts, one per DiT forward (one in all for the
    context refiner, which does not depend on the step). sigmas: `steps + 1` values ending in 0.
    """

    model: str
    fingerprint: str
    prompts: tuple[str, ...]
    seed: int
    width: int
    height: int
    sigmas: tuple[float, ...]
    guidance: float
    dtype: str
    versions: Mapping[str, str]
    amax: Mapping[str, tuple[float, ...]]

    @property
    def digest(self) -> str:
        """A short hash of the whole calibration, stated in every checkpoint made from it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def input_scale(self, layer: str, spec: QuantSpec) -> Tensor:
        """The static scale of one linear's input: fp32 []."""
        return scale_of(torch.tensor(max(self.amax[layer]), dtype=torch.float32), spec.format)

    def to_json(self) -> str:
        raw = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(raw, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_calibration(calibration: Calibration, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(calibration.to_json())
    partial.replace(path)


def read_calibration(path: Path) -> Calibration:
    """Read what `write_calibration` wrote. Raises ZImageError naming what is wrong."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ZImageError(f"calibration file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ZImageError(f"calibration file {path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise ZImageError(f"calibration file {path} is not a calibration of schema {SCHEMA}")
    try:
        raw["amax"] = {name: tuple(values) for name, values in raw["amax"].items()}
        raw["prompts"], raw["sigmas"] = tuple(raw["prompts"]), tuple(raw["sigmas"])
        calibration = Calibration(**raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ZImageError(f"calibration file {path} lacks a field: {error}") from None
    check_amax(calibration.amax)
    return calibration


def check_amax(amax: Mapping[str, Sequence[float]]) -> None:
    """Raise ZImageError, naming the first layers, when a maximum is no finite number >= 0."""
    bad = [
        layer
        for layer, values in amax.items()
        if not values or not all(isinstance(v, (int, float)) and 0 <= v < inf for v in values)
    ]
    if bad:
        raise ZImageError(
            f"the calibration saw NaN, infinity or nothing in {len(bad)} layers: "
            f"{', '.join(bad[:3])}",
            hint="calibrate again, perhaps with --dtype float32",
        )


@dataclass
class Observer:
    """Running maxima: module name -> step -> fp32 []. `step` is set by the denoise loop."""

    maxima: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    step: int = 0

    def record(self, module: str, x: Tensor) -> None:
        seen, value = self.maxima.setdefault(module, {}), amax(x)
        seen[self.step] = torch.maximum(seen[self.step], value) if self.step in seen else value

    def result(self) -> dict[str, tuple[float, ...]]:
        """Per linear on disk; members of a fused group share their input and so their amax."""
        return {
            member: tuple(seen[step].item() for step in sorted(seen))
            for module, seen in self.maxima.items()
            for member in members_of(module)
        }


@contextmanager
def observe(model: nn.Module, modules: Sequence[str]) -> Iterator[Observer]:
    """Record the input of the named modules while the context is open."""
    observer = Observer()

    def hook(name: str):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: observer.record(name, inputs[0])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in modules]
    try:
        yield observer
    finally:
        for handle in handles:
            handle.remove()
