"""VERB bench: every variant of a model in a fresh server, over HTTP, measured and compared."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from zimage_fp8.errors import ZImageError

EXTRA = ("httpx2", "psutil", "pynvml", "skimage")


def bench(
    model: str,
    *,
    out: Path,
    policies: Sequence[str] = ("all",),
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 8,
    guidance: float = 0.0,
    warmup: int = 1,
    runs: int | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Path:
    """Measure `model` under each policy and write record.json, report.md and pictures to `out`.

    policies: presets, `all` for the nine of the seed card; the reference bf16_base always runs.
    prompts, size: by default those of the seed card, or nano's own. seeds: one per prompt. runs:
    timed requests per variant, cycling through the prompts, at least one each. Static variants are
    quantized first, from one calibration, into out/checkpoints. Returns the report's path. Raises
    UsageError and ZImageError; servers are ended in every case.
    """
    require_extra()
    # Here and not above: the record and the client must load without torch and the extra.
    from zimage_fp8.bench.progress import show_progress
    from zimage_fp8.bench.record import write_record
    from zimage_fp8.bench.report import write_report
    from zimage_fp8.bench.run import describe_run, measure_all, with_quality
    from zimage_fp8.bench.variants import (
        CHECKPOINTS,
        check_policies,
        find_missing,
        make_checkpoints,
        plan_variants,
    )
    from zimage_fp8.bench.workload import (
        FULL_SIZE,
        Wishes,
        choose_parameters,
        profile_of,
        recorded_command,
    )
    from zimage_fp8.model.source import find_model

    wishes = Wishes(prompts, seeds, size, steps, guidance, warmup, runs, dtype, device)
    variants = plan_variants(policies, out / CHECKPOINTS)
    choose_parameters(FULL_SIZE, wishes)  # what no model can do is refused before one is downloaded
    folder = find_model(model)
    parameters = choose_parameters(profile_of(folder), wishes)
    check_policies(variants, folder)
    missing = find_missing(variants, model, folder, dtype)

    make_folder(out)
    make_checkpoints(model, missing, out / CHECKPOINTS, dtype, device)
    with show_progress(len(variants) * (1 + parameters.warmup + parameters.runs)) as on_stage:
        measured = measure_all(model, variants, parameters, out, on_stage)
    judged = with_quality(measured, out)
    command = recorded_command(model, policies, wishes, out)
    record = describe_run(model, folder, command, parameters, judged)
    write_record(record, out / "record.json")
    return write_report(record, out)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZImageError(f"cannot write to {folder}: {error.strerror}") from None


def require_extra() -> None:
    """Raise ZImageError, naming what to install, unless everything `bench` needs is there."""
    if missing := [module for module in EXTRA if find_spec(module) is None]:
        raise ZImageError(
            f"bench needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'zimage-fp8[bench]'",
        )
