"""VERB verify: everything that would corrupt a picture without an error message.

Loaders of this format forgive too much. A missing scale is a warning and the parameter keeps a
sentinel; a BF16 tensor where FP8 was promised is cast silently; a text encoder the ignore list
forgets gets garbage scales. Each check below is one such trap.
"""

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from torch import Tensor

from zimage_fp8.checkpoint.against import check_against, check_input_scales
from zimage_fp8.checkpoint.dialects import (
    CONFIG_KEY,
    OWN_KEY,
    is_ignored,
    read_stored,
    stored_infos,
    tensor_problems,
)
from zimage_fp8.checkpoint.findings import Finding, OpenCheckpoint
from zimage_fp8.checkpoint.own_format import METHOD as OWN_METHOD
from zimage_fp8.checkpoint.shards import ShardReader, scale_problems
from zimage_fp8.checkpoint.writer import CALIBRATION_FILE
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import (
    COMPONENTS,
    fused_name,
    linear_shapes,
    members_of,
    read_config,
    tensor_shapes,
)
from zimage_fp8.numerics import QuantSpec
from zimage_fp8.quant.calibrate import read_calibration
from zimage_fp8.quant.policy import (
    GEMM_MULTIPLE,
    PRESETS,
    Policy,
    Rule,
    find_policy,
    resolve,
)

# A linear layer multiplies its input's size by about rms(weight) · sqrt(inputs): 0.9 to 1.9 for
# nano's 182. Inverting a scale multiplies that by (448 / amax)², at least 3e5 there.
ABSURD_GAIN = 1e3

OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    folder: str
    policy: str
    quantized_linears: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)


def verify(
    folder: Path, against: Path | None = None, on_layer: OnLayer | None = None
) -> Verification:
    """Check a quantized pipeline folder; `against` is the BF16 pipeline it was made from.

    Raises ModelError or CheckpointError when it cannot be opened at all (not a Z-Image folder,
    truncated shards), UsageError when it is not quantized. Everything else is a finding.
    """
    transformer = folder / "transformer"
    config, raw = read_config(transformer)
    linears, shapes = linear_shapes(config), tensor_shapes(config)
    stored = read_stored(raw, linears)
    if stored is None:
        raise UsageError(f"{folder} is not quantized: transformer/config.json has no {CONFIG_KEY}")
    with ShardReader(transformer) as reader:
        checkpoint = OpenCheckpoint(folder, reader, stored, raw, linears)
        findings = [
            *_check_folder(checkpoint),
            *_check_config(checkpoint),
            *_check_coverage(checkpoint),
        ]
        problems = tensor_problems(reader.infos, stored_infos(stored.plan, shapes))
        findings += [Finding("error", "tensors", problem) for problem in problems]
        findings += _check_numbers(checkpoint, on_layer)
        if against is not None and not problems:
            findings += check_against(checkpoint, against)
    return Verification(
        str(folder), stored.plan.policy, len(stored.plan.quantized), tuple(findings)
    )


def _check_folder(checkpoint: OpenCheckpoint) -> Iterator[Finding]:
    folder = checkpoint.folder
    if not (folder / "model_index.json").is_file():
        yield Finding("error", "model_index.json", "missing: no loader will find the pipeline")
    for name in COMPONENTS:
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            yield Finding("error", name, "missing: the folder is not a complete pipeline")
        elif name in ("text_encoder", "vae"):
            try:
                ShardReader(folder / name).close()
            except ZImageError as error:
                yield Finding("error", name, str(error))
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        if not path.stat().st_mode & stat.S_IROTH:
            message = "readable by its owner only: a container under another user cannot load it"
            yield Finding("warning", path.name, message)
    if "_name_or_path" in checkpoint.config:
        yield Finding("warning", "config.json", "_name_or_path tells where it was made; remove it")


def _check_config(checkpoint: OpenCheckpoint) -> Iterator[Finding]:
    config = checkpoint.config[CONFIG_KEY]
    assert isinstance(config, dict)
    is_nested = isinstance(config.get("quantization"), dict)
    if "exclude_modules" in config and not is_nested:
        yield Finding(
            "error",
            "exclude_modules",
            "belongs to the nested form; in the flat one it is `ignore`, so nothing is excluded",
        )
    if config.get("quant_method") == OWN_METHOD:
        return  # nobody else reads it: there are no traps of other readers
    ignore = [
        str(p)
        for p in (config["quantization"] if is_nested else config).get(
            "exclude_modules" if is_nested else "ignore", []
        )
    ]
    for needed, example in (("model*", "model.layers.0.mlp.gate_proj"), ("lm_head*", "lm_head")):
        if not any(p in example or fnmatchcase(example, p) for p in ignore):
            yield Finding(
                "error",
                "ignore",
                f"does not cover {needed}: vLLM-Omni would read the text encoder's BF16 weights "
                "as FP8 without scales",
            )
    for pattern in ignore:
        hit = [layer for layer in checkpoint.linears if is_ignored(layer, [pattern])]
        blocks = {".".join(layer.split(".")[:2]) for layer in hit}
        if "*" not in pattern and pattern.rpartition(".")[2].isdigit() and len(blocks) > 1:
            yield Finding(
                "error",
                "ignore",
                f"{pattern!r} is matched as a substring and hits {len(blocks)} blocks "
                f"({', '.join(sorted(blocks)[:3])}, …); write {pattern + '.*'!r}",
            )


def _check_coverage(checkpoint: OpenCheckpoint) -> Iterator[Finding]:
    """The plan against the fused groups, the shapes, and the policy it claims to follow."""
    plan = checkpoint.plan
    for layer in plan.quantized:
        group = members_of(fused_name(layer))
        if layer == group[0] or plan.spec(group[0]) is None:
            kept = [member for member in group if plan.spec(member) is None]
            if kept:
                message = f"{', '.join(kept)} stay BF16 while {layer} is FP8: one GEMM, one type"
                yield Finding("error", fused_name(layer), message)
        if any(size % GEMM_MULTIPLE for size in checkpoint.linears[layer]):
            shape = list(checkpoint.linears[layer])
            yield Finding("error", layer, f"{shape} is not in multiples of {GEMM_MULTIPLE}")
    for rule in PRESETS["full"].rules:
        if rule.spec is None and rule.pattern != "*":
            for layer in plan.quantized:
                if rule.matches(layer):
                    yield Finding("error", layer, f"must stay BF16: {rule.why}")
    yield from _check_policy(checkpoint)


def _check_policy(checkpoint: OpenCheckpoint) -> Iterator[Finding]:
    name = checkpoint.stored.facts.get("policy")
    if not isinstance(name, str):
        yield Finding("warning", OWN_KEY, "the checkpoint does not say which policy made it")
        return
    try:
        claimed = resolve(_claimed_policy(name, checkpoint.stored.facts), checkpoint.linears)
    except (ZImageError, KeyError, TypeError) as error:
        yield Finding("error", "policy", f"{name!r} cannot be resolved on this model: {error}")
        return
    plan = checkpoint.plan
    wrong = [layer for layer in plan.entries if plan.spec(layer) != claimed.spec(layer)]
    if wrong:
        yield Finding(
            "error",
            "policy",
            f"claims {name!r} but differs in {len(wrong)} layers: {', '.join(wrong[:3])}",
        )


def _claimed_policy(name: str, facts: Mapping[str, object]) -> Policy:
    """The preset of that name; for a user's own policy, the rules the checkpoint states."""
    if name.partition("[")[0] in PRESETS:
        return find_policy(name)
    stated = facts["rules"]
    assert isinstance(stated, list)
    rules = [
        Rule(rule["layers"], QuantSpec(**rule["spec"]) if rule["spec"] else None, rule["why"])
        for rule in stated
    ]
    return Policy(name, str(facts.get("summary")), tuple(rules))


def _check_numbers(checkpoint: OpenCheckpoint, on_layer: OnLayer | None) -> list[Finding]:
    """Scales finite and positive, and shared where they must be; codes finite and not all zero."""
    scales = scale_problems(checkpoint.reader)
    findings = [Finding("error", name, problem) for name, problem in scales.items()]
    layers = checkpoint.plan.quantized
    for done, layer in enumerate(layers):
        findings += _check_codes(checkpoint, layer)
        if on_layer is not None:
            on_layer(done + 1, len(layers))
    for fused in sorted({fused_name(layer) for layer in layers}):
        findings += _check_sharing(checkpoint, fused)
    findings += _check_calibration(checkpoint)
    return findings


def _check_calibration(checkpoint: OpenCheckpoint) -> Iterator[Finding]:
    """Every input scale against the calibration that travels with the checkpoint.

    Where channel scales were folded, the source's weights are needed: `check_against` does it.
    """
    path = checkpoint.folder / CALIBRATION_FILE
    if not path.is_file():
        return
    try:
        calibration = read_calibration(path)
    except ZImageError as error:
        yield Finding("error", CALIBRATION_FILE, str(error))
        return
    if checkpoint.stored.facts.get("calibration_digest") != calibration.digest:
        yield Finding("error", CALIBRATION_FILE, "is not the one the checkpoint was made from")
        return
    if not checkpoint.method.fold:
        yield from check_input_scales(checkpoint, calibration, {})


def _check_codes(checkpoint: OpenCheckpoint, layer: str) -> Iterator[Finding]:
    info = checkpoint.reader.infos.get(f"{layer}.weight")
    if info is None or info.dtype not in ("F8_E4M3", "I8"):
        return
    codes = checkpoint.reader.read(f"{layer}.weight").float()
    if bad := int(codes.isnan().sum()):
        yield Finding("error", f"{layer}.weight", f"{bad} of {codes.numel()} codes are NaN")
    elif not codes.any():
        yield Finding("error", f"{layer}.weight", "is all zero")
    else:
        yield from _check_gain(checkpoint, layer, codes)


def _check_gain(checkpoint: OpenCheckpoint, layer: str, codes: Tensor) -> Iterator[Finding]:
    """An inverted scale is finite and positive, but makes weights of absurd size."""
    name = f"{layer}.weight_scale"
    if name not in checkpoint.reader.infos or len(checkpoint.reader.infos[name].shape) > 1:
        return
    scale = checkpoint.reader.read(name).float()
    weight = codes * (scale[:, None] if scale.numel() > 1 else scale)
    gain = weight.pow(2).mean().sqrt().item() * codes.shape[1] ** 0.5
    if not 1 / ABSURD_GAIN < gain < ABSURD_GAIN:
        message = f"makes inputs {gain:.3g} times as large: is it inverted?"
        yield Finding("error", name, message)


MUST_SHARE: tuple[tuple[str, Literal["error", "warning"], str], ...] = (
    ("weight_scale", "warning", "vLLM will quantize the group again: double rounding"),
    ("input_scale", "error", "they share one input"),
)


def _check_sharing(checkpoint: OpenCheckpoint, fused: str) -> Iterator[Finding]:
    members, read = members_of(fused), checkpoint.reader.read
    if len(members) == 1:
        return
    for leaf, level, cost in MUST_SHARE:
        names = [f"{member}.{leaf}" for member in members]
        if not all(n in checkpoint.reader.infos for n in names):
            continue
        scales = [read(name).float() for name in names]
        if any(scale.numel() != 1 for scale in scales):
            continue
        if len({scale.item() for scale in scales}) > 1:
            shown = ", ".join(f"{scale.item():.6g}" for scale in scales)
            yield Finding(level, fused, f"{leaf} differs within the group ({shown}): {cost}")
