"""Which linear layers become 8-bit, and why the others stay BF16.

A policy is an ordered list of rules; the first rule whose pattern matches a layer's name decides,
and the last rule is explicit. Resolving a policy against a model's layers gives a plan: one
`QuantSpec` (or `None`, meaning keep in BF16) and one reason per linear.

    full                 a preset
    full[0-14]           of that preset, only layers 0..14
    ffn-only[!15-29]     that preset, but layers 15..29 stay BF16
    full[0-14,refiners]  layers 0..14 and both refiners
    my-policy.toml       ordered rules in a file (see `read_policy_file`)
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import FUSED, Shape, fused_name
from zimage_fp8.numerics import (
    E4M3_DYNAMIC,
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROT,
    INT8_ROW,
    QuantSpec,
)

GEMM_MULTIPLE = 16  # 8-bit tensor cores ask this of both dimensions of a weight

SPECS: dict[str, QuantSpec | None] = {
    "keep": None,
    "e4m3-static": E4M3_STATIC,
    "e4m3-dynamic": E4M3_DYNAMIC,
    "e4m3-row": E4M3_ROW,
    "int8-row": INT8_ROW,
    "int8-rot": INT8_ROT,
}


@dataclass(frozen=True)
class Rule:
    """Layers matching `pattern` (a glob over module names) get `spec`, because of `why`."""

    pattern: str
    spec: QuantSpec | None
    why: str
    must_match: bool = False

    def matches(self, layer: str) -> bool:
        return fnmatchcase(layer, self.pattern)


@dataclass(frozen=True)
class Policy:
    """A named, ordered list of rules; `summary` is one sentence for people.

    online: quantized while loading and never calibrated, so there is no checkpoint to make.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...]
    online: bool = False

    @property
    def specs(self) -> set[QuantSpec]:
        return {rule.spec for rule in self.rules if rule.spec is not None}

    @property
    def needs_calibration(self) -> bool:
        """Static scales are measured, and so are the channel scales folded before a rotation."""
        return not self.online and any(spec.is_static or spec.rotate for spec in self.specs)


@dataclass(frozen=True)
class PlanEntry:
    spec: QuantSpec | None
    why: str


@dataclass(frozen=True)
class Plan:
    """The resolved table: every linear layer's name -> what happens to it and why."""

    policy: str
    entries: Mapping[str, PlanEntry]

    def spec(self, layer: str) -> QuantSpec | None:
        return self.entries[layer].spec

    @property
    def quantized(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.spec is not None]


# Quantizing any of these turned pictures into noise (LPIPS 0.74 instead of 0.07, vLLM-Omni's pull
# request 2795). Together they are 2 % of the parameters.
ALWAYS_KEPT = (
    Rule("*.adaLN_modulation.*", None, "scales and gates every token: 8 bits here give noise"),
    Rule("t_embedder.*", None, "the timestep feeds every block's modulation"),
    Rule("cap_embedder.*", None, "runs once per prompt; every token passes it"),
    Rule("all_x_embedder.*", None, "the entrance of the latent: tiny and sensitive"),
    Rule("all_final_layer.*", None, "the exit to the velocity: tiny and sensitive"),
)

FFN = "*.feed_forward.w[123]"
QKV = "*.attention.to_[qkv]"
OUT = "*.attention.to_out.0"
TARGET_WHY = {FFN: "feed-forward", QKV: "attention q, k, v", OUT: "attention output"}


def _preset(
    name: str, summary: str, targets: tuple[str, ...], spec: QuantSpec, *, online: bool = False
) -> Policy:
    chosen = tuple(Rule(target, spec, f"{name}: {TARGET_WHY[target]}") for target in targets)
    rest = Rule("*", None, f"not part of {name}")
    return Policy(name, summary, (*ALWAYS_KEPT, *chosen, rest), online)


_STATIC: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("All linears of every block: feed-forward and attention.", (FFN, QKV, OUT)),
    "ffn-attn-qkv": ("Feed-forward and the q, k, v projections.", (FFN, QKV)),
    "ffn-attn-out": ("Feed-forward and the attention output.", (FFN, OUT)),
    "ffn-only": ("Feed-forward only.", (FFN,)),
    "attn-only": ("Attention only: q, k, v and the output.", (QKV, OUT)),
    "attn-qkv-only": ("The q, k, v projections only.", (QKV,)),
    "attn-out-only": ("The attention output only.", (OUT,)),
}

STATIC_POLICIES: tuple[str, ...] = tuple(_STATIC)

PRESETS: dict[str, Policy] = {
    "bf16_base": Policy(
        "bf16_base",
        "Nothing quantized: the reference every other policy is compared with.",
        (Rule("*", None, "the BF16 reference"),),
    ),
    "online_fp8": _preset(
        "online_fp8",
        "All linears of every block, quantized while loading; one activation scale per token.",
        (FFN, QKV, OUT),
        E4M3_DYNAMIC,
        online=True,
    ),
    **{name: _preset(name, text, parts, E4M3_STATIC) for name, (text, parts) in _STATIC.items()},
    "fp8-row": _preset(
        "fp8-row",
        "All linears of every block; one weight scale per output row, one input scale per token.",
        (FFN, QKV, OUT),
        E4M3_ROW,
    ),
    "int8-rot": _preset(
        "int8-rot",
        "All linears of every block in INT8, channel scales folded, then rotated; one weight scale "
        "per output row, one input scale per token.",
        (FFN, QKV, OUT),
        INT8_ROT,
    ),
    "online_int8-rot": _preset(
        "online_int8-rot",
        "As int8-rot, quantized while loading: nothing is calibrated, so no channel scales folded.",
        (FFN, QKV, OUT),
        INT8_ROT,
        online=True,
    ),
}


def find_policy(name: str) -> Policy:
    """The policy a user named: a preset, a preset with a block range, or a TOML file.

    Raises UsageError for an unknown name or a malformed range, ZImageError for a bad file.
    """
    if name.endswith(".toml"):
        return read_policy_file(Path(name))
    base, bracket, selection = name.partition("[")
    if base not in PRESETS:
        raise UsageError(
            f"unknown policy {name!r}: expected one of {', '.join(PRESETS)}, one of these with a "
            "block range such as full[0-14], or a .toml file",
            param="policy",
        )
    if not bracket:
        return PRESETS[base]
    if not selection.endswith("]"):
        raise UsageError(f"policy {name!r}: the block range has no closing ]", param="policy")
    return _restrict(PRESETS[base], name, selection[:-1])


def _restrict(preset: Policy, name: str, selection: str) -> Policy:
    """The preset on some blocks only: `0-14`, `!15-29`, `0,3,refiners`."""
    excluding = selection.startswith("!")
    blocks = _parse_blocks(name, selection.removeprefix("!"))
    if excluding:
        kept = tuple(Rule(f"{b}.*", None, f"excluded by [{selection}]", True) for b in blocks)
        rules = (*kept, *preset.rules)
    else:
        head = [rule for rule in preset.rules[:-1] if rule.spec is None]
        chosen = [
            Rule(f"{block}{rule.pattern.removeprefix('*')}", rule.spec, rule.why, True)
            for rule in preset.rules
            if rule.spec is not None
            for block in blocks
        ]
        rules = (*head, *chosen, Rule("*", None, f"outside [{selection}]"))
    return replace(
        preset, name=name, summary=f"{preset.summary} Blocks: [{selection}].", rules=rules
    )


REFINERS = {
    "refiners": ("noise_refiner.*", "context_refiner.*"),
    "noise_refiner": ("noise_refiner.*",),
    "context_refiner": ("context_refiner.*",),
}


def _parse_blocks(name: str, selection: str) -> list[str]:
    blocks: list[str] = []
    for part in selection.split(","):
        if part in REFINERS:
            blocks.extend(REFINERS[part])
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last > 999:
                raise UsageError(f"policy {name!r}: {part} is not a range", param="policy")
            blocks.extend(f"layers.{index}" for index in range(first, last + 1))
        else:
            raise UsageError(
                f"policy {name!r}: cannot read {part!r}; expected block numbers such as 0-14 or "
                f"3, or one of {', '.join(REFINERS)}, separated by commas; ! in front excludes",
                param="policy",
            )
    return blocks


class _RuleFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    layers: str
    spec: str
    why: str


class _PolicyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    summary: str
    rule: list[_RuleFile]


def read_policy_file(path: Path) -> Policy:
    """A policy from TOML. The layers that must never be quantized stay kept in front.

    name = "gentle"
    summary = "Feed-forward in FP8, except the first two blocks."

    [[rule]]
    layers = "layers.[01].*"            # a glob over layer names
    spec = "keep"                       # keep, e4m3-static, e4m3-row, int8-rot, …
    why = "first blocks hurt most"

    [[rule]]
    layers = "*.feed_forward.w[123]"
    spec = "e4m3-static"
    why = "two thirds of the parameters"
    """
    try:
        parsed = _PolicyFile.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ZImageError(f"policy file {path} does not exist") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ZImageError(f"policy file {path} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ZImageError(f"policy file {path}: {where}: {first['msg']}") from None
    if not re.fullmatch(r"\w[\w.-]*", parsed.name):
        raise ZImageError(
            f"policy file {path}: the name {parsed.name!r} becomes a folder's; "
            "use letters, digits, dots and dashes"
        )
    if parsed.name in PRESETS:
        raise ZImageError(
            f"policy file {path}: the name {parsed.name!r} is a preset's; choose another"
        )
    rules = [_rule_from_file(path, rule) for rule in parsed.rule]
    rest = Rule("*", None, "no rule of the file matches")
    return Policy(parsed.name, parsed.summary, (*ALWAYS_KEPT, *rules, rest))


def _rule_from_file(path: Path, rule: _RuleFile) -> Rule:
    if rule.spec not in SPECS:
        raise ZImageError(
            f"policy file {path}: spec {rule.spec!r} of {rule.layers!r} is unknown; "
            f"expected one of {', '.join(SPECS)}"
        )
    return Rule(rule.layers, SPECS[rule.spec], rule.why, must_match=True)


def resolve(policy: Policy, linears: Mapping[str, Shape]) -> Plan:
    """Apply the rules to a model's linear layers (name -> [out, in]).

    Raises UsageError when a rule matches nothing it was meant to match, when a fused group would
    be of mixed precision, or when a layer's shape does not suit 8-bit GEMM.
    """
    for rule in policy.rules:
        if rule.must_match and not any(rule.matches(layer) for layer in linears):
            raise UsageError(
                f"policy {policy.name!r}: no layer of this model matches {rule.pattern!r}",
                param="policy",
                hint="zimage-fp8 quantize MODEL --dry-run lists the layers",
            )
    entries = {layer: _first_match(policy, layer) for layer in linears}
    _check_groups(policy, entries)
    _check_shapes(policy, entries, linears)
    return Plan(policy.name, entries)


def _first_match(policy: Policy, layer: str) -> PlanEntry:
    rule = next(rule for rule in policy.rules if rule.matches(layer))
    return PlanEntry(rule.spec, rule.why)


def _check_groups(policy: Policy, entries: Mapping[str, PlanEntry]) -> None:
    groups: dict[str, set[QuantSpec | None]] = {}
    for layer, entry in entries.items():
        groups.setdefault(fused_name(layer), set()).add(entry.spec)
    for group, specs in groups.items():
        if len(specs) > 1:
            members = next(m for fused, m in FUSED.items() if group.endswith(fused))
            raise UsageError(
                f"policy {policy.name!r} mixes precisions inside {group}: "
                f"{', '.join(members)} share one GEMM and must share one spec",
                param="policy",
            )


def _check_shapes(
    policy: Policy, entries: Mapping[str, PlanEntry], linears: Mapping[str, Shape]
) -> None:
    for layer, entry in entries.items():
        if entry.spec is not None and any(size % GEMM_MULTIPLE for size in linears[layer]):
            raise UsageError(
                f"policy {policy.name!r}: {layer} is {list(linears[layer])}, but 8-bit GEMM needs "
                f"multiples of {GEMM_MULTIPLE}",
                param="policy",
                hint="keep this layer with a policy file",
            )
