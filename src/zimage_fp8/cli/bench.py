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
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one per line; three fit to MODEL by default.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(help="One per prompt; from 1235 by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH; fit to MODEL by default.")] = None,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 8,
    guidance: Annotated[float, typer.Option(help="0 is off; sent explicitly.")] = 0.0,
    warmup: Annotated[int, typer.Option(help="Pictures drawn before timing.")] = 1,
    runs: Annotated[int | None, typer.Option(help="Timed pictures; one per prompt.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Measure every policy over HTTP, each in a fresh server: time, memory, PSNR, SSIM, pictures.

    zimage-fp8 bench nano --policies all --out results
    """
    from zimage_fp8.bench import bench as measure
    from zimage_fp8.model.calibration import read_prompts

    report = measure(
        model,
        out=out,
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
    )
    print(report)
