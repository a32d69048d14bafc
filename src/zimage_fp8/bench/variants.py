"""The variants of a benchmark: which policies, and what each server is started with."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8 import __version__
from zimage_fp8.bench.engines import Engine, OurEngine
from zimage_fp8.bench.facts import CheckpointFacts, read_facts
from zimage_fp8.bench.launch import note_process, stop
from zimage_fp8.bench.record import REFERENCE
from zimage_fp8.checkpoint.dialects import CONFIG_KEY, algorithm_of
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.source import display_name
from zimage_fp8.quant.policy import STATIC_POLICIES, Policy, find_policy, resolve

ALL = (REFERENCE, "online_fp8", *STATIC_POLICIES)
CHECKPOINTS = "checkpoints"  # inside the benchmark's folder


@dataclass(frozen=True)
class Variant:
    """One row of the table. `asked` is the policy as the user wrote it, perhaps a file.

    `checkpoint` is None when the policy is applied while loading.
    """

    chosen: Policy
    asked: str
    checkpoint: Path | None

    @property
    def policy(self) -> str:
        return self.chosen.name

    @property
    def summary(self) -> str:
        return self.chosen.summary


def travelling_name(asked: str) -> str:
    """A policy as asked for, without the folder of its file."""
    return Path(asked).name if asked.endswith(".toml") else asked


def plan_variants(
    policies: Sequence[str], checkpoints: Path, engine: Engine | None = None
) -> list[Variant]:
    """One variant per policy, `all` standing for the card's nine. The reference is always first.

    engine: what will serve them; it decides which need a checkpoint. Ours by default. Raises
    UsageError for unknown policies, for two of one name, and for what the engine cannot serve.
    """
    named = [p for policy in policies for p in (ALL if policy == "all" else (policy,))]
    if not named:
        raise UsageError("no policy to benchmark", param="policies")
    engine = engine or OurEngine()
    variants = [_variant(name, checkpoints, engine) for name in dict.fromkeys([REFERENCE, *named])]
    names = [variant.policy for variant in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two policies are named {twice[0]!r}", param="policies")
    return variants


def _variant(asked: str, checkpoints: Path, engine: Engine) -> Variant:
    policy = find_policy(asked)
    is_stored = engine.needs_checkpoint(policy.name, is_static=policy.needs_calibration)
    return Variant(policy, asked, checkpoints / policy.name if is_stored else None)


def check_policies(variants: Sequence[Variant], folder: Path) -> None:
    """Raise UsageError unless the model in `folder` is BF16 and every policy suits its layers."""
    config, raw = read_config(folder / "transformer")
    if CONFIG_KEY in raw:
        raise UsageError(
            f"{folder} is already quantized, so there is no BF16 reference to compare with",
            hint="give the BF16 model it was made from",
        )
    for variant in variants:
        plan = resolve(variant.chosen, linear_shapes(config))
        if variant.checkpoint:
            algorithm_of(plan)


def find_missing(
    variants: Sequence[Variant], model: str, folder: Path, dtype: str
) -> list[Variant]:
    """The variants whose checkpoint has to be made; an earlier run may have left the others.

    Raises ZImageError when there is anything else in a checkpoint's place.
    """
    stored = [variant for variant in variants if variant.checkpoint]
    existing = [v for v in stored if v.checkpoint and v.checkpoint.exists()]
    if existing:
        with ShardReader(folder / "transformer") as reader:
            fingerprint = reader.fingerprint()
        for variant in existing:
            _refuse_others(variant, display_name(model), fingerprint, dtype)
    return [variant for variant in stored if variant not in existing]


def _refuse_others(variant: Variant, model: str, fingerprint: str, dtype: str) -> None:
    assert variant.checkpoint is not None
    facts = read_facts(variant.checkpoint)
    differing = list(_differences(facts, variant.chosen, model, fingerprint, dtype))
    if differing:
        raise ZImageError(
            f"{variant.checkpoint} is not {variant.policy} of {model} as this run would make it: "
            + ", ".join(differing),
            hint="remove it or choose another --out",
        )


def _differences(
    facts: CheckpointFacts | None, policy: Policy, model: str, fingerprint: str, dtype: str
) -> Iterator[str]:
    if facts is None:
        yield "it is no checkpoint of this program"
        return
    if facts.policy != policy.name:
        yield f"its policy is {facts.policy}"
    if facts.base_model != model:
        yield f"it is made from {facts.base_model}"
    if facts.base_fingerprint != fingerprint:
        yield "it is made from other weights"
    if [(r.layers, r.spec) for r in facts.rules] != [(r.pattern, r.spec) for r in policy.rules]:
        yield "its policy has other rules"
    if facts.version != __version__:
        yield f"it is made by version {facts.version}, this is {__version__}"
    if facts.calibration and facts.calibration.dtype != dtype:
        yield f"it is calibrated in {facts.calibration.dtype}, not in {dtype}"


def make_checkpoints(
    model: str,
    missing: Sequence[Variant],
    checkpoints: Path,
    dtype: str,
    device: str | None,
    notes: Path,
) -> None:
    """Quantize what is missing, from one calibration, in a process that is gone afterwards.

    Its memory and its hold on the GPU must not be there while servers are measured. Whatever ends
    this process by unwinding also ends that one, politely, so that it removes what is unfinished;
    after a kill the next run finds it in `notes` and ends it, or both would write one folder.
    """
    if not missing:
        return
    out = checkpoints if len(missing) > 1 else checkpoints / missing[0].policy
    command = [sys.executable, "-m", "zimage_fp8", "quantize", model, "--out", str(out)]
    for variant in missing:
        command += ["--policy", variant.asked]
    command += ["--dtype", dtype, *(["--device", device] if device else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    note_process(process.pid, notes)
    try:
        code = process.wait()
    finally:
        stop(process)
    if code:
        raise ZImageError(f"quantizing {model} ended with exit code {code}")
