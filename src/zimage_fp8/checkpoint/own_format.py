"""Our own dialect, for what no other format can say: rotated INT8, and several formats in one file.

    "quantization_config": {
        "quant_method": "zimage-fp8",
        "format_version": 1,
        "schemes": {"int8-rot": {"format": "int8", "weight": "per-channel", ...}},
        "layers": {"layers.0.attention.to_q": {"scheme": "int8-rot", "rotation_group": 256}, ...}
    }

The method's name is our own on purpose: a loader that does not know it refuses, where a familiar
one would make it multiply by rotated codes and draw noise. Every quantized layer is listed, and
whatever is not listed is kept. docs/formats.md describes it for other programs.
"""

from collections.abc import Mapping
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, ValidationError

from zimage_fp8.errors import ModelError
from zimage_fp8.layout import Shape
from zimage_fp8.numerics import QuantSpec, rotation_group
from zimage_fp8.quant.policy import SPECS, Plan, PlanEntry

METHOD = "zimage-fp8"
FORMAT_VERSION = 1


class _Layer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    scheme: str
    rotation_group: int | None = None


class _Stored(BaseModel):
    """The keys that decide how tensors are read; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")
    quant_method: str
    format_version: int
    schemes: dict[str, QuantSpec]
    layers: dict[str, _Layer]
    zimage_fp8: dict[str, object] = {}


def own_config(plan: Plan, linears: Mapping[str, Shape]) -> dict[str, object]:
    """The quantization config of a plan; linears: name -> [out, in]."""
    names = {spec: name for name, spec in SPECS.items()}
    specs = {layer: spec for layer in plan.quantized if (spec := plan.spec(layer)) is not None}
    schemes = sorted({names[spec] for spec in specs.values()})
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "schemes": {name: asdict(spec) for name in schemes if (spec := SPECS[name])},
        "layers": {
            layer: {"scheme": names[spec]}
            | ({"rotation_group": rotation_group(linears[layer][1])} if spec.rotate else {})
            for layer, spec in specs.items()
        },
    }


def read_own_plan(config: Mapping[str, object], linears: Mapping[str, Shape]) -> Plan:
    """The plan that `own_config` describes. Raises ModelError for what this program cannot run."""
    if config.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"format_version is {config.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}",
            hint="update zimage-fp8",
        )
    try:
        stored = _Stored.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"quantization_config: {where}: {first['msg']}") from None
    problems = [problem for layer in stored.layers for problem in _problems(layer, stored, linears)]
    if problems:
        raise ModelError(f"quantization_config: {'; '.join(problems[:3])}")
    kept = PlanEntry(None, "not among the checkpoint's quantized layers")
    entries = dict.fromkeys(linears, kept)
    for layer, entry in stored.layers.items():
        entries[layer] = PlanEntry(stored.schemes[entry.scheme], "quantized in the checkpoint")
    return Plan(str(stored.zimage_fp8.get("policy", "unnamed")), entries)


def _problems(layer: str, stored: _Stored, linears: Mapping[str, Shape]) -> list[str]:
    if layer not in linears:
        return [f"{layer} is no linear layer of this model"]
    entry = stored.layers[layer]
    spec = stored.schemes.get(entry.scheme)
    if spec is None:
        return [f"{layer} names the scheme {entry.scheme!r}, which is not described"]
    group = rotation_group(linears[layer][1]) if spec.rotate else None
    if entry.rotation_group != group:
        return [f"{layer} was rotated in groups of {entry.rotation_group}, expected {group}"]
    return []
