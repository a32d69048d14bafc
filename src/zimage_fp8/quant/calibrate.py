"""What static activation scales are made of: the largest input each linear ever saw.

Calibration runs the real, unquantized denoise loop and records max |x| of every quantizable
linear's input, per step and per channel. It does not depend on the policy, so one run serves all of
them.
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
from zimage_fp8.layout import fused_name, members_of
from zimage_fp8.numerics import QuantSpec, scale_of
from zimage_fp8.quant.fold import Factors

NO_FACTORS: Factors = {}
SCHEMA = 2  # 1 had no channel_amax

# Where channels were balanced, all of them come close to the largest calibrated input, and prompts
# that calibration has not seen exceed it in many: on nano by up to 2.1 times; clipping made 21 %
# error in a layer where rounding makes 3 %. Two of E4M3's fourteen octaves insure against it.
FOLDED_HEADROOM = 4.0


@dataclass(frozen=True)
class Calibration:
    """Input amax of every quantizable linear, and everything needed to repeat the measurement.

    amax: linear name -> fp32 maxima over all prompts, one per DiT forward (one in all for the
    context refiner, which does not depend on the step). channel_amax: fused module -> one maximum
    per input channel, over prompts and steps. sigmas: `steps + 1` values ending in 0.
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
    channel_amax: Mapping[str, tuple[float, ...]]

    @property
    def digest(self) -> str:
        """A short hash of the whole calibration, stated in every checkpoint made from it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def input_scale(
        self, layer: str, spec: QuantSpec, factors: Factors = NO_FACTORS, headroom: float = 1.0
    ) -> Tensor:
        """The static scale of one linear's input: fp32 [].

        factors: what the input's channels are multiplied by, where channel scales were folded.
        headroom: how far beyond the largest calibrated input the scale reaches; where channel
        scales were folded, FOLDED_HEADROOM at least.
        """
        largest = torch.tensor(max(self.amax[layer]), dtype=torch.float32)
        if (module := fused_name(layer)) in factors:
            channels = torch.tensor(self.channel_amax[module], dtype=torch.float32)
            largest = (channels * factors[module].cpu()).amax()
            headroom = max(headroom, FOLDED_HEADROOM)
        return scale_of(largest * headroom, spec.format)

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
        raise ZImageError(
            f"calibration file {path} is not a calibration of schema {SCHEMA}",
            hint="calibrate again: name a file that does not exist yet",
        )
    try:
        for key in ("amax", "channel_amax"):
            raw[key] = {name: tuple(values) for name, values in raw[key].items()}
        raw["prompts"], raw["sigmas"] = tuple(raw["prompts"]), tuple(raw["sigmas"])
        calibration = Calibration(**raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ZImageError(f"calibration file {path} lacks a field: {error}") from None
    check_amax(calibration.amax)
    check_amax(calibration.channel_amax)
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
    """Running maxima: module name -> step -> fp32 [in]. `step` is set by the denoise loop."""

    maxima: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    step: int = 0

    def record(self, module: str, x: Tensor) -> None:
        seen, value = self.maxima.setdefault(module, {}), x.abs().flatten(0, -2).amax(0).float()
        seen[self.step] = torch.maximum(seen[self.step], value) if self.step in seen else value

    def result(self) -> dict[str, tuple[float, ...]]:
        """Per linear on disk; members of a fused group share their input and so their amax."""
        return {
            member: tuple(seen[step].amax().item() for step in sorted(seen))
            for module, seen in self.maxima.items()
            for member in members_of(module)
        }

    def channels(self) -> dict[str, tuple[float, ...]]:
        """Per module, the maximum of every input channel over all steps."""
        return {
            module: tuple(torch.stack(list(seen.values())).amax(0).tolist())
            for module, seen in self.maxima.items()
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
