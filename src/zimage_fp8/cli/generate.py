"""generate and inspect: a picture, and what it says about itself."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import (
    AttentionBackend,
    Device,
    Dtype,
    EngineName,
    Json,
    Offload,
    PolicyName,
    TextEncoderPrecision,
    let_segments_grow,
    parse_size,
)
from zimage_fp8.terminal import emit, progress


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[str, typer.Option(help="nano, a local folder, or a Hub id.")] = "nano",
    policy: PolicyName = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    negative_prompt: Annotated[str, typer.Option(help="Needs --guidance above 0.")] = "",
    seed: Annotated[int, typer.Option(help="One seed is one picture on every machine.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoise steps; Turbo is made for 8.")] = 8,
    guidance: Annotated[
        float, typer.Option(help="g in pos + g·(pos − neg); 0 is off, the Turbo default.")
    ] = 0.0,
    size: Annotated[str | None, typer.Option(help="WxH, multiples of 16.")] = None,
    n: Annotated[int, typer.Option("--n", help="How many; seeds count up.")] = 1,
    embed_metadata: Annotated[
        bool, typer.Option(help="Write prompt and parameters into the PNG.")
    ] = True,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration for a static policy on a BF16 model.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    engine: EngineName = "auto",
    attention_backend: AttentionBackend = "auto",
    text_encoder: TextEncoderPrecision = "bf16",
    offload: Offload = "none",
    profile: Annotated[
        Path | None,
        typer.Option(help="JSON file for where the time goes, by stage and kernel; printed too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a picture.

    zimage-fp8 generate "a 3d icon of a red apple on a teal background" -o apple.png
    """
    let_segments_grow()

    from zimage_fp8.checkpoint.read_ahead import read_ahead

    read_ahead([model])  # while the imports below take their seconds

    from zimage_fp8.engine import EngineOptions, load_pipeline
    from zimage_fp8.generate import check_early, check_path, profile_to
    from zimage_fp8.generate import generate as draw
    from zimage_fp8.model.request import ImageRequest
    from zimage_fp8.quant.calibrate import read_calibration
    from zimage_fp8.render import profile_text

    wanted = parse_size(size)
    width, height = wanted or (16, 16)  # the model's own size is known once it is loaded
    request = ImageRequest(prompt, width, height, negative_prompt, steps, guidance, seed)
    check_early(request, output, n)
    if profile:
        check_path(profile, ".json", "profile")
    known = read_calibration(calibration) if calibration else None
    options = EngineOptions(engine, attention_backend, text_encoder, offload)
    with progress() as report:
        pipeline = load_pipeline(
            model,
            policy=policy,
            options=options,
            calibration=known,
            dtype=dtype,
            device=device,
            on_calibration=lambda done, total: report("calibrating", done, total),
        )
        width, height = wanted or pipeline.default_size
        request = replace(request, width=width, height=height)
        files = draw(
            pipeline,
            request,
            output,
            count=n,
            embed_metadata=embed_metadata,
            on_step=lambda picture, done, total: report(f"picture {picture + 1}", done, total),
        )
        found = profile_to(profile, pipeline, request) if profile else None
    emit([str(path) for path in files] if as_json else "\n".join(map(str, files)), as_json)
    if found and not as_json:
        emit(profile_text(found), as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="A PNG, or a pipeline folder.")],
    as_json: Json = False,
) -> None:
    """Read back what a picture or a checkpoint says about itself."""
    from zimage_fp8.inspect import inspect as read_back
    from zimage_fp8.render import facts_text

    facts = read_back(path)
    emit(facts if as_json else facts_text(facts), as_json)
