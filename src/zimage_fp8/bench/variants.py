"""The variants of a benchmark: which policies, and what each server is started with."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.bench.record import REFERENCE
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.source import display_name
from zimage_fp8.quant.policy import STATIC_POLICIES, find_policy

ALL = (REFERENCE, "online_fp8", *STATIC_POLICIES)


@dataclass(frozen=True)
class Variant:
    """One row of the table. `asked` is the policy as the user wrote it, perhaps a file.

    `checkpoint` is None when the policy is applied while loading.
    """

    policy: str
    asked: str
    summary: str
    checkpoint: Path | None

    def serve_arguments(self, model: str, dtype: str, device: str | None) -> list[str]:
        source = [str(self.checkpoint)] if self.checkpoint else [model, "--policy", self.asked]
        return [*source, "--dtype", dtype, *(["--device", device] if device else [])]


def plan_variants(policies: Sequence[str], checkpoints: Path) -> list[Variant]:
    """One variant per policy, `all` standing for the card's nine. The reference is always first.

    Raises UsageError for unknown policies.
    """
    named = [p for policy in policies for p in (ALL if policy == "all" else (policy,))]
    if not named:
        raise UsageError("no policy to benchmark", param="policies")
    return [_variant(name, checkpoints) for name in dict.fromkeys([REFERENCE, *named])]


def _variant(asked: str, checkpoints: Path) -> Variant:
    policy = find_policy(asked)
    checkpoint = checkpoints / policy.name if policy.is_static else None
    return Variant(policy.name, asked, policy.summary, checkpoint)


def make_checkpoints(
    model: str, variants: Sequence[Variant], checkpoints: Path, device: str | None
) -> None:
    """Quantize what is missing, from one calibration, in a process that is gone afterwards.

    Its memory and its hold on the GPU must not be there while servers are measured.
    """
    missing = [v for v in variants if v.checkpoint and not _is_ready(model, v)]
    if not missing:
        return
    out = checkpoints if len(missing) > 1 else checkpoints / missing[0].policy
    command = [sys.executable, "-m", "zimage_fp8", "quantize", model, "--out", str(out)]
    for variant in missing:
        command += ["--policy", variant.asked]
    if device:
        command += ["--device", device]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ZImageError(f"quantizing {model} ended with exit code {code}")


def _is_ready(model: str, variant: Variant) -> bool:
    """True for a checkpoint left by an earlier run. Raises when something else is in its place."""
    assert variant.checkpoint is not None
    if not variant.checkpoint.exists():
        return False
    facts = checkpoint_facts(variant.checkpoint)
    if (facts.get("policy"), facts.get("base_model")) != (variant.policy, display_name(model)):
        raise ZImageError(
            f"{variant.checkpoint} is not {variant.policy} of {model}",
            hint="remove it or choose another --out",
        )
    return True


def checkpoint_facts(checkpoint: Path) -> dict[str, object]:
    """What a checkpoint of ours says of its making; empty for any other folder."""
    config = checkpoint / "transformer" / "config.json"
    if not config.is_file():
        return {}
    quantization = json.loads(config.read_text()).get("quantization_config", {})
    facts: dict[str, object] = quantization.get("zimage_fp8", {})
    return facts
