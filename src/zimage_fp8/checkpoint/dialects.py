"""Formats on disk <-> plans: ModelOpt FP8 as vLLM-Omni reads it where it can say what the plan
does, our own format (`own_format`) for the rest. In ModelOpt's,

`transformer/config.json` carries, in the flat form whose key is `ignore`,

    "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [...]}

and every quantized linear X has X.weight (E4M3 [out, in]), X.weight_scale and, when static,
X.input_scale. Our own facts sit under `zimage_fp8`, which other readers skip.

`ignore` must name the text encoder (`model*`, `lm_head*`): one config drives both models there, and
without these entries the encoder gets garbage scales. It speaks of fused runtime names (`to_qkv`,
`w13`) for vLLM-Omni and of shard names for everybody else. Wildcards only: a literal `layers.1`
would also hit `layers.10`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from zimage_fp8.checkpoint.own_format import METHOD as OWN_METHOD
from zimage_fp8.checkpoint.own_format import own_config, read_own_plan
from zimage_fp8.checkpoint.shards import DTYPE_NAMES, TensorInfo
from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.layout import Shape, fused_name
from zimage_fp8.numerics import DTYPE, E4M3_DYNAMIC, E4M3_ROW, E4M3_STATIC, QuantSpec
from zimage_fp8.quant.policy import Plan, PlanEntry

CONFIG_KEY = "quantization_config"
OWN_KEY = "zimage_fp8"

ALGORITHMS: dict[str, QuantSpec] = {
    "FP8": E4M3_STATIC,
    "FP8_PER_CHANNEL_PER_TOKEN": E4M3_ROW,
}

TEXT_ENCODER = ("model*", "lm_head*")
ALWAYS_KEPT = (
    "*adaLN_modulation*",
    "t_embedder*",
    "cap_embedder*",
    "all_x_embedder*",
    "all_final_layer*",
)


@dataclass(frozen=True)
class StoredQuantization:
    """What a quantized checkpoint says about itself."""

    plan: Plan
    facts: Mapping[str, object]


def algorithm_of(plan: Plan) -> str:
    """What a plan is stored as: a ModelOpt algorithm, or our own format.

    Raises UsageError for a plan that needs no checkpoint.
    """
    specs = {plan.spec(layer) for layer in plan.quantized}
    for name, spec in ALGORITHMS.items():
        if specs == {spec}:
            return name
    if not specs:
        raise UsageError(
            f"policy {plan.policy!r} quantizes nothing, so there is no checkpoint to write",
            param="policy",
        )
    if specs == {E4M3_DYNAMIC}:
        raise UsageError(
            f"policy {plan.policy!r} needs no checkpoint: it is quantized while loading",
            param="policy",
            hint=f"serve the BF16 model with --policy {plan.policy}",
        )
    return OWN_METHOD


def write_config(
    plan: Plan,
    base: Mapping[str, object],
    facts: Mapping[str, object],
    linears: Mapping[str, Shape],
) -> dict[str, object]:
    """The transformer's config.json for a quantized checkpoint; linears: name -> [out, in]."""
    clean = {k: v for k, v in base.items() if k not in ("_name_or_path", CONFIG_KEY)}
    algorithm = algorithm_of(plan)
    if algorithm == OWN_METHOD:
        stated = own_config(plan, linears)
    else:
        stated = {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "producer": {"name": "modelopt", "version": f"zimage-fp8 {facts['version']}"},
            "ignore": ignore_list(plan),
        }
    return {**clean, CONFIG_KEY: {**stated, OWN_KEY: {"policy": plan.policy, **facts}}}


def ignore_list(plan: Plan) -> list[str]:
    """Wildcards that hit every kept linear of a plan, by fused and by shard name, and no other."""
    kept = [layer for layer in plan.entries if layer not in set(plan.quantized)]
    names = {name: sorted({name, fused_name(name)}) for name in kept}
    ignore = [*TEXT_ENCODER, *ALWAYS_KEPT]
    quantized = {n for layer in plan.quantized for n in (layer, fused_name(layer))}
    for layer in kept:
        for name in names[layer]:
            if not any(fnmatchcase(name, pattern) for pattern in ignore):
                ignore.append(_widest(name, quantized))
    return ignore


def _widest(name: str, quantized: set[str]) -> str:
    """The most general wildcard for a kept layer that hits no quantized one."""
    stack, index, part, leaf = name.split(".")[:4]
    candidates = (
        f"*{part}*",
        f"*{part}.{leaf}*",
        f"{stack}.*",
        f"{stack}.{index}.*",
        f"{stack}.{index}.{part}*",
    )
    for pattern in candidates:
        if not any(fnmatchcase(other, pattern) for other in quantized):
            return pattern
    return f"{name}*"


def read_stored(
    raw: Mapping[str, object], linears: Mapping[str, Shape]
) -> StoredQuantization | None:
    """What a checkpoint's config says, or None when it is not quantized.

    linears: the model's, name -> [out, in]. Raises ModelError for methods and algorithms this
    program does not read.
    """
    config = raw.get(CONFIG_KEY)
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ModelError(f"{CONFIG_KEY} is {type(config).__name__}, expected an object")
    flat = _flatten(config)
    facts = flat.get(OWN_KEY, {})
    facts = facts if isinstance(facts, dict) else {}
    if flat.get("quant_method") == OWN_METHOD:
        return StoredQuantization(read_own_plan(config, linears), facts)
    spec = _spec(flat)
    ignore = flat.get("ignore", [])
    if not isinstance(ignore, list):
        raise ModelError(f"{CONFIG_KEY}.ignore is not a list")
    entries = {
        layer: PlanEntry(None, "named in the checkpoint's ignore list")
        if is_ignored(layer, ignore)
        else PlanEntry(spec, "quantized in the checkpoint")
        for layer in linears
    }
    return StoredQuantization(Plan(str(facts.get("policy", "unnamed")), entries), facts)


def _flatten(config: Mapping[str, object]) -> dict[str, object]:
    """ModelOpt's nested form (`quantization: {exclude_modules}`) read as the flat one."""
    nested = config.get("quantization")
    if not isinstance(nested, dict):
        return dict(config)
    flat = {**config, **nested}
    flat["ignore"] = nested.get("exclude_modules", [])
    return flat


def _spec(flat: Mapping[str, object]) -> QuantSpec:
    method, algorithm = flat.get("quant_method"), str(flat.get("quant_algo", "")).upper()
    if method != "modelopt" or algorithm not in ALGORITHMS:
        raise ModelError(
            f"quant_method {method!r} with quant_algo {flat.get('quant_algo')!r} is not a format "
            f"this program reads; expected 'modelopt' with one of {', '.join(ALGORITHMS)}, "
            f"or {OWN_METHOD!r}"
        )
    return ALGORITHMS[algorithm]


def is_ignored(layer: str, ignore: Sequence[object]) -> bool:
    """vLLM's matching: the fused or the shard name equals, contains, or matches a pattern."""
    for name in {layer, fused_name(layer)}:
        for pattern in map(str, ignore):
            if name == pattern or pattern in name or fnmatchcase(name, pattern):
                return True
    return False


def stored_infos(
    plan: Plan, bf16: Mapping[str, Shape], float_dtype: str = "BF16"
) -> dict[str, TensorInfo]:
    """Every tensor a checkpoint of this plan holds: name -> dtype and shape."""
    infos: dict[str, TensorInfo] = {}
    for name, shape in bf16.items():
        layer = name.removesuffix(".weight")
        spec = plan.spec(layer) if layer in plan.entries else None
        if spec is None or not name.endswith(".weight"):
            infos[name] = TensorInfo(float_dtype, shape)
            continue
        infos[name] = TensorInfo(DTYPE_NAMES[DTYPE[spec.format]], shape)
        per_channel = spec.weight == "per-channel"
        infos[f"{layer}.weight_scale"] = TensorInfo("F32", shape[:1] if per_channel else ())
        if spec.is_static:
            infos[f"{layer}.input_scale"] = TensorInfo("F32", ())
    return infos


FLOATS = ("BF16", "F16", "F32")


def tensor_problems(
    found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]
) -> list[str]:
    """Everything missing, unexpected, mis-shaped or mis-typed, one sentence each.

    Any float type may stand in for BF16, and a scale of shape [1] for a scalar.
    """
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name)
        if have is None:
            continue
        is_scalar = want.shape == () and have.shape == (1,)
        if have.shape != want.shape and not is_scalar:
            problems.append(f"{name}: shape {list(have.shape)}, expected {list(want.shape)}")
        both_float = have.dtype in FLOATS and want.dtype == "BF16"
        if have.dtype != want.dtype and not both_float:
            problems.append(f"{name}: {have.dtype}, expected {want.dtype}")
    return problems
