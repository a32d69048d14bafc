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
    profile: str | None = None,
    policies: Sequence[str] = ("all",),
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    warmup: int | None = None,
    runs: int | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    engine: str = "zimage-fp8",
    launch: str | None = None,
    targets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    no_quality: str | None = None,
    allow_busy: bool = False,
) -> Path:
    """Measure `model` under each policy and write record.json, the report and pictures to `out`.

    profile: a shipped one or a .toml file; by default what suits the model. Options from prompts to
    runs change it where they are given. policies: presets, `all` for the nine of the seed card; the
    reference bf16_base always runs. engine, launch: what serves them (`bench.engines`). targets:
    servers that run already, as NAME=URL, instead of policies. metrics: lpips, clip. no_quality:
    why pictures are not compared. Static variants are quantized first, from one calibration, into
    out/checkpoints. A run that was interrupted goes on where it was. Returns the report's path.
    Raises UsageError and ZImageError; servers are ended in every case.
    """
    require_extra()
    # Here and not above: the record and the client must load without torch and the extra.
    from zimage_fp8.bench.conduct import Choices, conduct
    from zimage_fp8.bench.report import write_report
    from zimage_fp8.bench.workload import Wishes

    wishes = Wishes(
        profile=profile,
        prompts=prompts,
        seeds=seeds,
        size=size,
        steps=steps,
        guidance=guidance,
        warmup=warmup,
        runs=runs,
        dtype=dtype,
        device=device,
    )
    choices = Choices(
        policies=tuple(policies),
        engine=engine,
        launch=launch,
        targets=tuple(targets),
        metrics=tuple(metrics),
        no_quality=no_quality,
        allow_busy=allow_busy,
    )
    return write_report(conduct(model, out, wishes, choices), out)


def require_extra() -> None:
    """Raise ZImageError, naming what to install, unless everything `bench` needs is there."""
    if missing := [module for module in EXTRA if find_spec(module) is None]:
        raise ZImageError(
            f"bench needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'zimage-fp8[bench]'",
        )
