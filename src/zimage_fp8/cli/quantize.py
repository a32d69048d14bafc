"""quantize and verify: from a BF16 model to checkpoints, and proof that they are sound."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import Device, Json, Model, parse_size
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
            help="A policy, `all` for the seven static ones, or a .toml file; repeatable."
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
    dtype: Annotated[
        str | None, typer.Option(help="What calibration computes in: bfloat16 (default), float32.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Calibrate once, then write one FP8 checkpoint per policy.

    zimage-fp8 quantize nano --policy all --out checkpoints
    """
    from zimage_fp8 import quantize as verb
    from zimage_fp8.render import dry_run_tables

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
    with progress() as report:
        written = verb.quantize(model, policy, out, calibration=options, on_progress=report)
    emit([str(path) for path in written] if as_json else "\n".join(map(str, written)), as_json)


def verify(
    folder: Annotated[Path, typer.Argument(help="A quantized pipeline folder.")],
    against: Annotated[
        str | None, typer.Option(help="The BF16 model it was made from; recomputes every code.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what would corrupt pictures silently: scales, types, names, coverage, config.

    Exit code 1 when there is an error.
    """
    from zimage_fp8.checkpoint.verify import verify as check
    from zimage_fp8.quantize import find_unquantized
    from zimage_fp8.render import verification_text

    original = find_unquantized(against) if against else None
    with progress() as report:
        found = check(folder, original, lambda done, total: report("checking", done, total))
    emit(found if as_json else verification_text(found), as_json)
    if not found.is_sound:
        raise typer.Exit(1)
