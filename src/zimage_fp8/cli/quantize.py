"""quantize and verify: from a BF16 model to checkpoints, and proof that they are sound."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from zimage_fp8.cli.options import Device, Json, Model, parse_bytes, parse_size
from zimage_fp8.errors import UsageError
from zimage_fp8.terminal import emit, progress


def quantize(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; with several policies, one inside each.")
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(
            help="A policy, `all` for the seven static ones, a .toml file, or `auto` to search "
            "for the cheapest mix that reaches a goal; repeatable."
        ),
    ] = ["all"],  # noqa: B006 - typer copies it
    calibration: Annotated[
        Path | None, typer.Option(help="Reuse this calibration file, or save it there.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Calibration prompts, one per line; 8 are shipped.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="DiT forwards per prompt, the last at sigma 0; 9.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH of the calibration pictures.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first prompt, then counting up; 0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")
    ] = False,
    min_psnr: Annotated[
        float | None, typer.Option(help="Goal of auto: mean PSNR against full precision, in dB.")
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option(help="Goal of auto: seconds of one picture on this machine.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Goal of auto: all weights together, such as 12G or 30M.")
    ] = None,
    minimize: Annotated[
        Literal["latency", "memory"] | None,
        typer.Option(help="With --min-psnr: what to save; latency on CUDA, else memory."),
    ] = None,
    search_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts that auto draws, one per line; by default those of bench."),
    ] = None,
    verify_prompts: Annotated[
        Path | None,
        typer.Option(help="Other prompts, drawn once with what auto has chosen by its own."),
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Watch every layer on one picture; writes diagnostics.json and .svg."
        ),
    ] = False,
    rounding: Annotated[
        Literal["nearest", "gptq"],
        typer.Option(help="Of weights: to the nearest code, or by what calibration saw (slower)."),
    ] = "nearest",
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold channel scales into weights; int8-rot always does.")
    ] = False,
    headroom: Annotated[
        float,
        typer.Option(
            help="How far static input scales reach beyond calibration; with --fold, 4 at least."
        ),
    ] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help="What calibration computes in: bfloat16 (default), float32.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Calibrate once, then write one 8-bit checkpoint per policy.

    zimage-fp8 quantize nano --policy all --out checkpoints
    """
    from zimage_fp8 import quantize as verb
    from zimage_fp8.quant.method import Method
    from zimage_fp8.render import dry_run_tables

    method = Method(fold, rounding, headroom)

    goals = (min_psnr, max_latency, max_memory, minimize, search_prompts, verify_prompts)
    if "auto" not in policy and any(goal is not None for goal in goals):
        raise UsageError(
            "--min-psnr, --max-latency, --max-memory, --minimize, --search-prompts and "
            "--verify-prompts belong to --policy auto"
        )
    if dry_run and "auto" in policy:
        raise UsageError("auto has to draw pictures before there is a plan: leave out --dry-run")
    if dry_run:
        source = verb.find_unquantized(model)
        jobs = verb.plan_jobs(source, policy, out or Path("checkpoint"))
        reports = [verb.size_report(source, job.plan) for job in jobs]
        emit(reports if as_json else dry_run_tables(reports), as_json)
        return
    if out is None:
        raise UsageError("--out is missing: name the folder to write", param="out")
    options = verb.CalibrationOptions(
        calibration, prompts, steps, parse_size(size), seed, dtype, device
    )
    if "auto" in policy:
        from zimage_fp8.search import Goal
        from zimage_fp8.search.automatic import quantize_automatically

        calibrating = {*options.given, *(["--calibration"] if options.file else [])}
        if len(policy) > 1 or diagnose or method != Method() or calibrating - {"--device"}:
            raise UsageError(
                "auto stands alone: other policies, --diagnose, --rounding, --fold, --headroom and "
                "options of calibration do not go with it",
                param="policy",
            )
        goal = Goal(min_psnr, max_latency, parse_bytes(max_memory), minimize)
        with progress() as report:
            result = quantize_automatically(
                model,
                goal,
                out,
                search_prompts,
                verify_prompts,
                device=device,
                on_progress=report,
            )
        emit(result if as_json else result.text(), as_json)
        return
    with progress() as report:
        written = verb.quantize(
            model, policy, out, calibration=options, method=method, on_progress=report
        )
    found = []
    if diagnose:
        from zimage_fp8.diagnose import diagnose_checkpoint, diagnosis_text, write_diagnosis

        source = verb.find_unquantized(model)
        for folder in written:
            diagnosis = diagnose_checkpoint(model, source, folder, device)
            write_diagnosis(diagnosis, folder)
            found.append(f"{folder}: {diagnosis_text(diagnosis)}")
    emit(
        [str(path) for path in written] if as_json else "\n".join(found or map(str, written)),
        as_json,
    )


def verify(
    folder: Annotated[Path, typer.Argument(help="A quantized pipeline folder.")],
    against: Annotated[
        str | None, typer.Option(help="The BF16 model it was made from; recomputes every code.")
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Also watch every layer on one picture: amax, what is flushed to zero or "
            "saturated, SQNR, worst channel. Needs --against.",
        ),
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find what would corrupt pictures silently: scales, types, names, coverage, config.

    Exit code 1 when there is an error.
    """
    from zimage_fp8.checkpoint.verify import verify as check
    from zimage_fp8.quantize import find_unquantized
    from zimage_fp8.render import verification_text

    if diagnose and against is None:
        raise UsageError("--diagnose compares with the BF16 model: name it by --against")
    if device and not diagnose:
        raise UsageError("--device has no effect without --diagnose", param="device")
    original = find_unquantized(against) if against else None
    with progress() as report:
        found = check(folder, original, lambda done, total: report("checking", done, total))
    shown: dict[str, object] = asdict(found)
    text = verification_text(found)
    if diagnose and found.is_sound and against and original:
        from zimage_fp8.diagnose import diagnose_checkpoint, diagnosis_text

        diagnosis = diagnose_checkpoint(against, original, folder, device)
        shown["layers"] = [asdict(layer) for layer in diagnosis.layers]
        text = f"{text}\n{diagnosis_text(diagnosis)}"
    emit(shown if as_json else text, as_json)
    if not found.is_sound:
        raise typer.Exit(1)
