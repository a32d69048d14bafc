"""bench: measure every policy."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import Device, Dtype, Model, parse_size


def bench(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the record, the report and pictures.")],
    policies: Annotated[
        list[str], typer.Option(help="`all` (BF16, online_fp8, the seven static), or names.")
    ] = ["all"],  # noqa: B006 - typer copies it
    profile: Annotated[
        str | None,
        typer.Option(
            help="The workload: card, standard, quick, nano, nano-standard, or a .toml file; "
            "nano for small models, else quick. The options below change it."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one per line.")] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(help="One per prompt; from 1235 by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH, instead of the profile's sizes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="0 is off; sent explicitly.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Untimed pictures per size before, exactly as many.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Timed pictures per size.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    engine: Annotated[
        str, typer.Option(help="What is started: zimage-fp8, or vllm-omni (0.26 or later).")
    ] = "zimage-fp8",
    launch: Annotated[
        str | None,
        typer.Option(
            help="Start this instead, e.g. 'my-server {model} --port {port}'; it may also use "
            "{policy}, {attention} and {host}, and must answer GET /health."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure a server that runs, as [NAME=]URL; repeatable, bf16_base=URL is the "
            "reference."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="lpips or clip beside PSNR and SSIM; repeatable.")
    ] = None,
    no_quality: Annotated[
        str | None, typer.Option(help="Compare no pictures, for this reason (random weights).")
    ] = None,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Measure on a GPU that others use; flagged.")
    ] = False,
) -> None:
    """Measure every policy over HTTP, each in a fresh server: time, memory, PSNR, SSIM, pictures.

    Interrupted, the same command goes on where it was.

    zimage-fp8 bench nano --policies all --out results
    """
    from zimage_fp8.bench import bench as measure
    from zimage_fp8.model.calibration import read_prompts

    report = measure(
        model,
        out=out,
        profile=profile,
        policies=policies,
        prompts=read_prompts(prompts) if prompts else None,
        seeds=seeds,
        size=parse_size(size),
        steps=steps,
        guidance=guidance,
        warmup=warmup,
        runs=runs,
        dtype=dtype,
        device=device,
        engine=engine,
        launch=launch,
        targets=target or (),
        metrics=metric or (),
        no_quality=no_quality,
        allow_busy=allow_busy,
    )
    print(report)
