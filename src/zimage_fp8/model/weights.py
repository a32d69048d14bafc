"""From a folder to a transformer ready to run: strict, streaming, quantizing on the way.

Tensors are read one module at a time. A module that the plan quantizes is quantized before the
next one is read, so loading a BF16 model in 8 bits never holds more than one BF16 layer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_fp8.checkpoint.dialects import (
    StoredQuantization,
    read_stored,
    stored_infos,
    tensor_problems,
)
from zimage_fp8.checkpoint.shards import ShardReader, scale_problems
from zimage_fp8.errors import CheckpointError, UsageError
from zimage_fp8.layout import linear_shapes, members_of, read_config, tensor_shapes
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.numerics import QuantSpec
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.fold import Factors, channel_factors, folded
from zimage_fp8.quant.linear import (
    QuantLinear,
    quantize_weight,
    weight_amax,
    weight_scales,
)
from zimage_fp8.quant.method import Method, folded_modules
from zimage_fp8.quant.policy import PRESETS, Plan, Policy, resolve


@dataclass(frozen=True)
class LoadedTransformer:
    """factors: what the inputs of layers quantized while loading were multiplied by."""

    model: ZImageTransformer
    plan: Plan
    stored: StoredQuantization | None
    factors: Factors


def load_transformer(
    folder: Path,
    *,
    policy: Policy | None,
    calibration: Calibration | None,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadedTransformer:
    """Load `folder` (a transformer/ folder) under a policy.

    A quantized checkpoint brings its own plan; asking it for another policy is a UsageError. A
    static policy on a BF16 model needs `calibration`; rotated layers have their channel scales
    folded when it is given. Raises CheckpointError listing every
    missing, unexpected, mis-shaped or mis-typed tensor and every impossible scale before anything
    is loaded.
    """
    config, raw = read_config(folder)
    shapes, linears = tensor_shapes(config), linear_shapes(config)
    stored = read_stored(raw, linears)
    plan = _choose_plan(folder, stored, policy, resolve(policy or PRESETS["bf16_base"], linears))
    on_disk = stored.plan if stored else resolve(PRESETS["bf16_base"], linears)
    with ShardReader(folder) as reader:
        problems = tensor_problems(reader.infos, stored_infos(on_disk, shapes))
        problems += [f"{name}: {problem}" for name, problem in scale_problems(reader).items()]
        if problems:
            raise CheckpointError(
                str(folder), problems, hint="zimage-fp8 verify explains a quantized checkpoint"
            )
        with torch.device("meta"):
            model = ZImageTransformer(config)
        factors: Factors = {}
        if stored is None and calibration is not None:
            modules = folded_modules(plan, Method())
            factors = channel_factors(modules, reader.read, calibration.channel_amax)
        source = _Source(reader, stored is not None, plan, calibration, factors, dtype, device)
        _fill(model, source)
    return LoadedTransformer(model.eval(), plan, stored, factors)


def _choose_plan(
    folder: Path, stored: StoredQuantization | None, policy: Policy | None, resolved: Plan
) -> Plan:
    if stored is None:
        return resolved
    if policy is not None and policy.name != stored.plan.policy:
        raise UsageError(
            f"{folder.parent} is already quantized with policy {stored.plan.policy!r}; it cannot "
            f"be run as {policy.name!r}",
            param="policy",
            hint="leave --policy out, or give the BF16 model",
        )
    return stored.plan


@dataclass(frozen=True)
class _Source:
    """Where a module's tensors come from, and what becomes of them."""

    reader: ShardReader
    is_quantized: bool
    plan: Plan
    calibration: Calibration | None
    factors: Factors
    dtype: torch.dtype
    device: torch.device

    def read(self, name: str) -> Tensor:
        return folded(name, self.reader.read(name, self.device), self.factors)

    def floats(self, name: str) -> Tensor:
        return self.read(name).to(self.dtype)

    def scalar(self, name: str) -> Tensor:
        """On the CPU, where comparing it does not wait for the device."""
        return self.reader.read(name).reshape(())


def _fill(model: ZImageTransformer, source: _Source) -> None:
    # The fused engine packs all adaLN projections, 250 MB at full size, and frees them. Read first
    # they lie together, and can be given back; between other weights they would leave holes of
    # 8 MB, less than PyTorch's segments that grow give back.
    modules = sorted(model.named_modules(), key=lambda item: "adaLN_modulation" not in item[0])
    for module_name, module in modules:
        members = members_of(module_name)
        spec = source.plan.entries[members[0]].spec if members[0] in source.plan.entries else None
        if spec is not None:
            _replace(model, module_name, _quantized(members, spec, source))
            continue
        for leaf, _ in list(module.named_parameters(recurse=False)):
            names = [f"{member}.{leaf}" if member else leaf for member in members]
            value = torch.cat([source.floats(name) for name in names])
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _quantized(members: tuple[str, ...], spec: QuantSpec, source: _Source) -> QuantLinear:
    if source.is_quantized:
        return _stored_linear(members, spec, source)
    weight = torch.cat([source.read(f"{m}.weight") for m in members])
    (scale,) = weight_scales([weight_amax(weight, spec)], spec)
    input_scale = None
    if spec.is_static:
        if source.calibration is None:
            raise ValueError(f"{members[0]}: a static policy needs a calibration")
        input_scale = source.calibration.input_scale(members[0], spec, source.factors)
        input_scale = input_scale.to(source.device)
    return QuantLinear(spec, quantize_weight(weight, scale, spec), scale, input_scale)


def _stored_linear(members: tuple[str, ...], spec: QuantSpec, source: _Source) -> QuantLinear:
    read = source.reader.read
    codes = [read(f"{member}.weight", source.device) for member in members]
    if spec.weight == "per-channel":
        scale = torch.cat([read(f"{member}.weight_scale") for member in members])
    else:
        scale = _shared_or_per_row([source.scalar(f"{m}.weight_scale") for m in members], codes)
    input_scale = None
    if spec.is_static:
        scales = [source.scalar(f"{member}.input_scale") for member in members]
        if len({value.item() for value in scales}) > 1:
            raise CheckpointError(
                str(source.reader.folder),
                [f"{', '.join(members)}: share one input but have different input_scale"],
            )
        input_scale = scales[0].to(source.device)
    return QuantLinear(spec, torch.cat(codes), scale.to(source.device), input_scale)


def _shared_or_per_row(scales: list[Tensor], codes: list[Tensor]) -> Tensor:
    """One scalar when members agree (ours do); else exact per-row scales, never requantization."""
    if len({scale.item() for scale in scales}) == 1:
        return scales[0]
    return torch.cat([s.expand(len(c)) for s, c in zip(scales, codes, strict=True)])


@torch.no_grad()
def fold_transformer(model: ZImageTransformer, factors: Factors) -> None:
    """Fold channel scales into an unquantized model in memory. It computes the same bits after.

    Layers of a checkpoint folded with the same factors can then take their counterparts' places.
    """
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        members = members_of(module)
        parts = parameter.chunk(len(members))
        names = [f"{member}.{leaf}" if member else leaf for member in members]
        pairs = zip(names, parts, strict=True)
        parameter.copy_(torch.cat([folded(n, part, factors) for n, part in pairs]))
