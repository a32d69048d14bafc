"""What 8 bits do inside each layer, on the inputs it really gets while pictures are drawn.

The model runs in full precision; beside every layer its quantized twin computes on the same input,
so errors are the layer's own and not its predecessors'. Two yardsticks, always together: SQNR, the
average, and the worst output channel, which an average would hide.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import inf, log10
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_fp8.evaluate import (
    Subject,
    Unfolded,
    Workload,
    draw,
    exchanged,
    load_checkpoint_subject,
)
from zimage_fp8.heatmap import HeatMap, svg
from zimage_fp8.layout import block_of, kind_of
from zimage_fp8.model.sampling import Velocity
from zimage_fp8.numerics import QMAX, amax, quantize, scale_of
from zimage_fp8.quant.linear import QuantLinear, rotated
from zimage_fp8.quant.policy import SPECS

SCHEMA = 1
DIAGNOSTICS_FILE = "diagnostics.json"

# Beyond this ratio a static per-tensor E4M3 scale flushes the bulk of a tensor to zero: 3.75 %
# error per GEMM becomes 12.6 % at 1e5.
MAX_TO_MEDIAN = 1e4
SHOWN = 8


@dataclass(frozen=True)
class LayerDiagnosis:
    """One loaded module (q, k, v and w1, w3 are one each), on inputs as it quantizes them: with
    channel scales folded where they were, before any rotation.

    amax: largest |input|; amax_by_step: per denoise step, a single one where inputs do not depend
    on the step. max_to_median: the largest amax / median |input| of any forward. flushed: share of
    nonzero inputs whose code is 0; saturated: share beyond what the scale reaches. sqnr_db: of the
    output. worst_channel: the output channel with the largest relative error, and that error.
    """

    layer: str
    format: str
    amax: float
    amax_by_step: tuple[float, ...]
    max_to_median: float
    flushed: float
    saturated: float
    sqnr_db: float
    worst_channel: int
    worst_channel_error: float

    @property
    def is_collapsing(self) -> bool:
        return self.format == "e4m3-static" and self.max_to_median > MAX_TO_MEDIAN


@dataclass(frozen=True)
class Diagnosis:
    """Every quantized layer, in the order of the model."""

    settings: Mapping[str, object]
    layers: tuple[LayerDiagnosis, ...]

    @property
    def collapsing(self) -> list[str]:
        """Layers whose inputs are too wide for one static scale."""
        return [layer.layer for layer in self.layers if layer.is_collapsing]

    def to_json(self) -> str:
        raw = {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "layers": [asdict(layer) for layer in self.layers],
        }
        return json.dumps(raw, indent=1) + "\n"


def diagnose_checkpoint(
    model: str, folder: Path, checkpoint: Path, device: str | None = None
) -> Diagnosis:
    """Diagnose a quantized pipeline folder on one picture, beside `model`, which lies in `folder`.

    Raises UsageError when the checkpoint was not made from the model.
    """
    one = Workload(limit=1)
    return diagnose(load_checkpoint_subject(model, folder, checkpoint, one, device=device))


def diagnose(subject: Subject) -> Diagnosis:
    """Draw the subject's requests in full precision and watch every layer's quantized twin."""
    transformer = subject.pipeline.transformer
    watched: dict[str, _Watched] = {}
    for name, module in subject.quantized.items():
        watched[name] = _Watched(transformer.get_submodule(name), module)
    with exchanged(transformer, watched):
        for request in subject.requests:
            draw(subject.pipeline, request, lambda velocity: _stepping(velocity, watched))
    layers = tuple(module.result(name) for name, module in watched.items())
    return Diagnosis(subject.settings(), layers)


def _stepping(velocity: Velocity, watched: Mapping[str, "_Watched"]) -> Velocity:
    steps = count()

    def stepped(latent: Tensor, sigma: float) -> Tensor:
        step = next(steps)
        for module in watched.values():
            module.step = step
        return velocity(latent, sigma)

    return stepped


class _Watched(nn.Module):
    """A layer in full precision that keeps account of what its quantized twin would do."""

    def __init__(self, original: nn.Module, quantized: nn.Module) -> None:
        super().__init__()
        self.original, self.quantized = original, quantized
        layer = quantized.inner if isinstance(quantized, Unfolded) else quantized
        assert isinstance(layer, QuantLinear)
        self.layer = layer
        self.step = 0
        self.amax_by_step: dict[int, float] = {}
        self.max_to_median = 0.0
        self.inputs = self.flushed = self.saturated = 0
        self.signal: Tensor | float = 0.0  # per output channel, fp64
        self.noise: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x)
        seen = x * self.quantized.inputs if isinstance(self.quantized, Unfolded) else x
        self._watch_input(seen.reshape(-1, x.shape[-1]))
        error = (self.quantized(x).double() - out.double()).flatten(0, -2)
        self.noise = self.noise + error.pow(2).sum(0)
        self.signal = self.signal + out.double().flatten(0, -2).pow(2).sum(0)
        return out

    def _watch_input(self, tokens: Tensor) -> None:
        largest, median = amax(tokens).item(), tokens.abs().float().median().item()
        self.amax_by_step[self.step] = max(largest, self.amax_by_step.get(self.step, 0.0))
        self.max_to_median = max(self.max_to_median, largest / median if median else inf)
        spec = self.layer.spec
        turned = rotated(tokens, spec).float()
        scale = self.layer.input_scale
        if scale is None:
            scale = scale_of(amax(turned, per_row=True), spec.format)
        codes = quantize(turned, scale, spec.format).float()
        self.inputs += turned.numel()
        self.flushed += int(((codes == 0) & (turned != 0)).sum())
        # the largest value of a token may land a rounding beyond qmax; that is no saturation
        self.saturated += int(((turned / scale).abs() > QMAX[spec.format] * (1 + 1e-6)).sum())

    def result(self, name: str) -> LayerDiagnosis:
        signal, noise = torch.as_tensor(self.signal), torch.as_tensor(self.noise)
        relative = (noise / signal.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        worst = int(relative.argmax())
        ratio = float(noise.sum() / signal.sum())
        by_step = tuple(self.amax_by_step[step] for step in sorted(self.amax_by_step))
        return LayerDiagnosis(
            layer=name,
            format=next(n for n, spec in SPECS.items() if spec == self.layer.spec),
            amax=max(by_step),
            amax_by_step=by_step,
            max_to_median=self.max_to_median,
            flushed=self.flushed / self.inputs,
            saturated=self.saturated / self.inputs,
            sqnr_db=-10 * log10(ratio) if ratio else inf,
            worst_channel=worst,
            worst_channel_error=float(relative[worst]),
        )


def write_diagnosis(found: Diagnosis, folder: Path) -> list[Path]:
    """Write the numbers and their heat maps to `folder`; returns the files."""
    numbers = folder / DIAGNOSTICS_FILE
    picture = numbers.with_suffix(".svg")
    numbers.write_text(found.to_json())
    picture.write_text(svg(heat_maps(found)))
    return [numbers, picture]


def heat_maps(found: Diagnosis) -> list[HeatMap]:
    """Block by kind of layer: SQNR, worst channel, amax, max / median; and amax per step."""
    places = [(layer, (block_of(layer.layer), kind_of(layer.layer))) for layer in found.layers]
    rows = list(dict.fromkeys(place[0] for _, place in places))
    columns = list(dict.fromkeys(place[1] for _, place in places))
    steps = [str(step + 1) for step in range(max(len(it.amax_by_step) for it in found.layers))]
    by_step: dict[tuple[str, str], float] = {}
    for layer, (_, kind) in places:
        if len(layer.amax_by_step) == len(steps):
            for step, value in zip(steps, layer.amax_by_step, strict=True):
                by_step[step, kind] = max(value, by_step.get((step, kind), 0.0))

    def table(title: str, values: list[float], **style: object) -> HeatMap:
        cells = {place: value for (_, place), value in zip(places, values, strict=True)}
        return HeatMap(title, rows, columns, cells, **style)  # type: ignore[arg-type]

    layers = found.layers
    return [
        table("SQNR of the output, dB", [it.sqnr_db for it in layers], is_bad_low=True),
        table("worst output channel, % error", [100 * it.worst_channel_error for it in layers]),
        table("input amax", [it.amax for it in layers], is_log=True, digits=None),
        table("input max / median", [it.max_to_median for it in layers], is_log=True, digits=0),
        HeatMap("input amax by step", steps, columns, by_step, is_log=True, digits=None),
    ]


def diagnosis_text(found: Diagnosis, files: Sequence[Path] = ()) -> str:
    """The worst layers first, then what to do about those that one scale cannot hold."""
    ranked = sorted(found.layers, key=lambda layer: layer.sqnr_db)
    lines = [
        f"{len(ranked)} layers, SQNR {ranked[0].sqnr_db:.1f} to {ranked[-1].sqnr_db:.1f} dB; "
        "the worst:",
        *(_line(layer) for layer in ranked[:SHOWN]),
    ]
    if found.collapsing:
        lines += [
            f"warning: in {len(found.collapsing)} layers the largest input is more than "
            f"{MAX_TO_MEDIAN:g} times the median: {', '.join(found.collapsing[:3])}",
            "hint: one static scale loses the bulk there; fp8-row or int8-rot holds it",
        ]
    return "\n".join([*lines, *map(str, files)])


def _line(layer: LayerDiagnosis) -> str:
    return (
        f"  {layer.layer:<38} {layer.sqnr_db:5.1f} dB  channel {layer.worst_channel} "
        f"{layer.worst_channel_error:.1%}  amax {layer.amax:.3g}, {layer.max_to_median:.0f} × "
        f"median  flushed {layer.flushed:.2%}  saturated {layer.saturated:.2%}"
    )
