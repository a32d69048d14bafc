"""sensitivity: which part of the model quantization hurts most."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import Device, Json, Model, parse_size
from zimage_fp8.terminal import emit, progress


def sensitivity(
    model: Model,
    policy: Annotated[
        str, typer.Option(help="The policy that is applied to one part at a time.")
    ] = "full",
    scan: Annotated[
        list[str],
        typer.Option(
            help="Parts: kinds (of layer), blocks, steps, text (encoder), cells (block by kind); "
            "repeatable. By default all but cells."
        ),
    ] = ["kinds", "blocks", "steps", "text"],  # noqa: B006 - typer copies it
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one per line; by default those of bench.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 8,
    size: Annotated[str | None, typer.Option(help="WxH, multiples of 16.")] = None,
    out: Annotated[
        Path, typer.Option(help="JSON to write, and to resume from; a heat map lies beside it.")
    ] = Path("sensitivity.json"),
    dtype: Annotated[
        str, typer.Option(help="Of all that is not quantized; BF16's own rounding hides a layer.")
    ] = "float32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Quantize one part of the model at a time and measure the pictures.

    zimage-fp8 sensitivity nano --scan kinds --scan steps
    """
    from zimage_fp8.evaluate import Workload
    from zimage_fp8.sensitivity import sensitivity as run
    from zimage_fp8.sensitivity.report import report_text

    workload = Workload(prompts, limit, parse_size(size), steps)
    with progress() as report:
        found, files = run(
            model,
            policy,
            out,
            scans=scan,
            workload=workload,
            dtype=dtype,
            device=device,
            on_progress=report,
        )
    emit(found.to_json() if as_json else report_text(found, files), as_json)
