"""VERB quantize: one calibration run, then one checkpoint per policy."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from re import sub

from zimage_fp8 import __version__
from zimage_fp8.checkpoint.dialects import algorithm_of, stored_infos, tensor_problems
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.writer import (
    NO_CODES,
    WeightScales,
    component_bytes,
    new_infos,
    write_checkpoint,
)
from zimage_fp8.errors import CheckpointError, UsageError, ZImageError
from zimage_fp8.layout import fused_name, linear_shapes, read_config, tensor_shapes
from zimage_fp8.model.calibration import (
    FORWARDS,
    CalibrationSettings,
    check_forwards,
    read_prompts,
    run_calibration,
)
from zimage_fp8.model.loading import check_calibration, is_quantized, load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.rounding import rounded_codes
from zimage_fp8.model.source import display_name, find_model
from zimage_fp8.quant.calibrate import Calibration, read_calibration, write_calibration
from zimage_fp8.quant.fold import channel_factors
from zimage_fp8.quant.method import Method, folded_modules
from zimage_fp8.quant.policy import (
    PRESETS,
    STATIC_POLICIES,
    Plan,
    Policy,
    find_policy,
    resolve,
)

PLAIN = Method()

OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user may change about calibration; None means the default."""

    file: Path | None = None
    prompts: Path | None = None
    forwards: int | None = None
    size: tuple[int, int] | None = None
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that were given, as a user spells them, the file apart."""
        spelled = {"forwards": "steps"}
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return [f"--{spelled.get(name, name)}" for name in names if name != "file"]


@dataclass(frozen=True)
class Job:
    """One checkpoint to write."""

    policy: Policy
    plan: Plan
    out: Path

    def needs_calibration(self, method: Method) -> bool:
        return self.policy.needs_calibration or method.fold or method.rounding == "gptq"


def quantize(
    model: str,
    policies: Sequence[str],
    out: Path,
    *,
    calibration: CalibrationOptions | None = None,
    method: Method = PLAIN,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Write one checkpoint per policy: several (or `all`) to out/<policy>/, one to `out` itself.

    The model is calibrated once, if a policy or the method needs it. Returns the folders written.
    Raises UsageError for policies that cannot be stored, or a method that does nothing for one, and
    ZImageError when writing fails; finished checkpoints stay, an unfinished one leaves nothing.
    """
    options = calibration or CalibrationOptions()
    source = find_unquantized(model)
    jobs = plan_jobs(source, policies, out)
    check_output(source, jobs)
    check_method(method, jobs)
    is_measured = any(job.needs_calibration(method) for job in jobs)
    check_options(options, needs_calibration=is_measured)
    measured, pipeline = None, None
    if is_measured:
        measured, pipeline = calibrate_or_read(model, source, options, on_progress)
    if method.rounding == "gptq" and pipeline is None:
        pipeline = load_pipeline(model, dtype=options.dtype or "bfloat16", device=options.device)
    with ShardReader(source / "transformer") as reader:
        plain = WeightScales(reader)
        for job in jobs:
            needed = measured if job.needs_calibration(method) else None
            scales, codes = plain, NO_CODES
            if needed and (modules := folded_modules(job.plan, method)):
                factors = channel_factors(modules, reader.read, needed.channel_amax)
                scales = WeightScales(reader, factors)
            if needed and pipeline and method.rounding == "gptq":
                report = _stage(f"rounding {job.policy.name}", on_progress)
                codes = rounded_codes(pipeline, needed, job.plan, scales, report)
            write_checkpoint(
                source,
                job.plan,
                needed,
                checkpoint_facts(model, job.policy, needed, reader) | {"method": asdict(method)},
                job.out,
                scales,
                _stage(f"writing {job.policy.name}", on_progress),
                headroom=method.headroom,
                codes=codes,
            )
    return [job.out for job in jobs]


def find_unquantized(model: str) -> Path:
    """The folder of a BF16 model, its tensors complete. Raises UsageError when it is quantized."""
    source = find_model(model)
    if is_quantized(source):
        raise UsageError(
            f"{model} is already quantized; quantizing twice only loses more",
            hint="give the BF16 model it was made from",
        )
    config, _ = read_config(source / "transformer")
    nothing = resolve(PRESETS["bf16_base"], linear_shapes(config))
    with ShardReader(source / "transformer") as reader:
        expected = stored_infos(nothing, tensor_shapes(config))
        if problems := tensor_problems(reader.infos, expected):
            raise CheckpointError(str(source / "transformer"), problems)
    return source


def plan_jobs(source: Path, policies: Sequence[str], out: Path) -> list[Job]:
    """Resolve the policies against the model. `all` stands for the seven static ones."""
    names = [n for name in policies for n in (STATIC_POLICIES if name == "all" else (name,))]
    if len(set(names)) != len(names):
        raise UsageError(f"a policy is named twice: {', '.join(names)}", param="policy")
    config, _ = read_config(source / "transformer")
    linears = linear_shapes(config)
    jobs = []
    for name in names:
        policy = find_policy(name)
        plan = resolve(policy, linears)
        algorithm_of(plan)
        if policy.online:
            raise UsageError(
                f"policy {name!r} needs no checkpoint: it is quantized while loading",
                param="policy",
                hint=f"serve the BF16 model with --policy {name}",
            )
        jobs.append(Job(policy, plan, out / policy.name if len(names) > 1 else out))
    return jobs


def check_output(source: Path, jobs: Sequence[Job]) -> None:
    """Raise before any work when the output exists, cannot be written, or would not fit."""
    for job in jobs:
        if job.out.exists():
            raise ZImageError(f"{job.out} already exists", hint="remove it or choose another --out")
    root = next(parent for parent in jobs[0].out.absolute().parents if parent.exists())
    if not root.is_dir() or not os.access(root, os.W_OK):
        raise ZImageError(f"cannot write {jobs[0].out}: {root} is not a writable folder")
    free = shutil.disk_usage(root).free
    needed = sum(size_report(source, job.plan).bytes_after for job in jobs)
    if source.stat().st_dev != root.stat().st_dev:  # components cannot be hard-linked there
        needed += len(jobs) * component_bytes(source)
    if needed > free:
        raise ZImageError(
            f"{len(jobs)} checkpoints need {needed / 1e9:.1f} GB, "
            f"{root} has {free / 1e9:.1f} GB free"
        )


def check_method(method: Method, jobs: Sequence[Job]) -> None:
    """Refuse a method that makes no sense, or does nothing for one of the policies."""
    method.check()
    for job in jobs:
        specs = {job.plan.spec(layer) for layer in job.plan.quantized}
        if method.headroom != 1 and not any(spec and spec.is_static for spec in specs):
            raise UsageError(
                f"headroom has no effect on {job.policy.name!r}: no input scale of it is static",
                param="headroom",
            )


def check_options(options: CalibrationOptions, *, needs_calibration: bool) -> None:
    """Refuse options that would do nothing, and find bad ones before the model is loaded."""
    if not needs_calibration and (options.given or options.file):
        named = ", ".join([*options.given, *(["--calibration"] if options.file else [])])
        raise UsageError(f"{named}: none of these policies needs it, nothing is calibrated")
    if options.file is not None and options.file.exists():
        if options.given:
            raise UsageError(
                f"{', '.join(options.given)}: the calibration in {options.file} exists and is "
                "reused, so nothing is measured",
                hint="name another --calibration file to measure anew",
            )
        return
    if options.file is not None and not os.access(options.file.absolute().parent, os.W_OK):
        raise ZImageError(f"cannot write {options.file}: its folder does not exist or is read-only")
    if options.prompts is not None:
        read_prompts(options.prompts)
    if options.forwards is not None:
        check_forwards(options.forwards)


def calibrate_or_read(
    model: str, source: Path, options: CalibrationOptions, on_progress: OnProgress | None
) -> tuple[Calibration, Pipeline | None]:
    """Reuse the calibration file when it exists; else measure, and save it there when named.

    The pipeline is the one it was measured on, None when nothing was.
    """
    if options.file is not None and options.file.exists():
        calibration = read_calibration(options.file)
        check_calibration(calibration, source)
        return calibration, None
    pipeline = load_pipeline(model, dtype=options.dtype or "bfloat16", device=options.device)
    default = CalibrationSettings.default(source, pipeline.default_size)
    settings = CalibrationSettings(
        prompts=read_prompts(options.prompts) if options.prompts else default.prompts,
        width=options.size[0] if options.size else default.width,
        height=options.size[1] if options.size else default.height,
        forwards=options.forwards or FORWARDS,
        seed=options.seed or 0,
    )
    calibration = run_calibration(pipeline, source, settings, _stage("calibrating", on_progress))
    if options.file is not None:
        try:
            write_calibration(calibration, options.file)
        except OSError as error:
            raise ZImageError(f"cannot write {options.file}: {error.strerror}") from None
    return calibration, pipeline


def _stage(name: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(name, done, total)


def checkpoint_facts(
    model: str, policy: Policy, calibration: Calibration | None, reader: ShardReader
) -> dict[str, object]:
    """What the checkpoint says about its making, beyond what other readers need."""
    facts: dict[str, object] = {
        "version": __version__,
        "base_model": display_name(model),
        "base_fingerprint": reader.fingerprint(),
        "summary": policy.summary,
        "rules": [
            {
                "layers": rule.pattern,
                "spec": asdict(rule.spec) if rule.spec else None,
                "why": rule.why,
            }
            for rule in policy.rules
        ],
    }
    if calibration is not None:
        facts["calibration_digest"] = calibration.digest
        facts["calibration"] = {
            "prompts": len(calibration.prompts),
            "forwards": len(calibration.sigmas) - 1,
            "sigmas": list(calibration.sigmas),
            "size": f"{calibration.width}x{calibration.height}",
            "seed": calibration.seed,
            "dtype": calibration.dtype,
            "versions": dict(calibration.versions),
        }
    return facts


def group_label(layer: str) -> str:
    """`layers.7.attention.to_k` -> `layers.*.attention.to_{q,k,v}`."""
    label = sub(r"\.\d+\.", ".*.", fused_name(layer), count=1)
    return label.replace("to_qkv", "to_{q,k,v}").replace("w13", "w{1,3}")


@dataclass(frozen=True)
class GroupReport:
    """Layers of one kind that share a fate. `layers` has `*` in place of the block number."""

    layers: str
    count: int
    parameters: int
    format: str
    why: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SizeReport:
    """What a plan does to a transformer, from its headers alone."""

    policy: str
    groups: list[GroupReport]
    bytes_before: int
    bytes_after: int


def size_report(source: Path, plan: Plan) -> SizeReport:
    """The plan by module group, with sizes before and after. Reads headers only."""
    config, _ = read_config(source / "transformer")
    with ShardReader(source / "transformer") as reader:
        before = reader.infos
        after = new_infos(reader, plan, tensor_shapes(config))
    fates: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in before:
        layer = name.rpartition(".")[0]
        entry = plan.entries.get(layer)
        if entry is None:
            fates["norms and padding tokens", "BF16", "not linear layers"].append(name)
        else:
            format = entry.spec.format.upper() if entry.spec else "BF16"
            kind = group_label(layer)
            fates[kind, format, entry.why].append(name)
    groups = []
    for (kind, format, why), names in fates.items():
        layers = {name.rpartition(".")[0] or name for name in names}
        scales = [n for n in after if n not in before and n.rpartition(".")[0] in layers]
        groups.append(
            GroupReport(
                layers=kind,
                count=len(layers),
                parameters=sum(before[name].num_elements for name in names),
                format=format,
                why=why,
                bytes_before=sum(before[name].num_bytes for name in names),
                bytes_after=sum(after[name].num_bytes for name in [*names, *scales]),
            )
        )
    return SizeReport(
        plan.policy,
        groups,
        sum(group.bytes_before for group in groups),
        sum(group.bytes_after for group in groups),
    )
