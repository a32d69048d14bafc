"""serve: the OpenAI Images API."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import (
    AttentionBackend,
    Device,
    Dtype,
    EngineName,
    Offload,
    TextEncoderPrecision,
    let_segments_grow,
)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            help="nano, a local folder, or a Hub id; several, as NAME=MODEL, are chosen from by "
            "the request's `model`.",
            metavar="MODEL...",
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="As for generate; several, as full,fp8-row,bf16_base, are chosen from by the "
            "request's `model`."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in /v1/models of a single model; MODEL by default.")
    ] = None,
    quantization_config: Annotated[
        str | None,
        typer.Option(
            "--quantization-config",
            "--diffusion-quantization-config",
            "--quantization",
            help='As vLLM-Omni spells it, e.g. \'{"method":"fp8"}\'.',
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the GPU's memory this process may use.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs per picture; 1 so far.")] = 1,
    omni: Annotated[bool, typer.Option("--omni", help="Accepted as vLLM-Omni's flag.")] = False,
    embed_metadata: Annotated[
        bool, typer.Option(help="Write prompt and parameters into pictures.")
    ] = True,
    a1111: Annotated[
        bool, typer.Option("--a1111", help="Also speak AUTOMATIC1111's API, under /sdapi/v1.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option(help="Write prompts to the log.")] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; repeatable. Better in ZIMAGE_FP8_API_KEY, separated "
            "by spaces: command lines can be read by others.",
            envvar="ZIMAGE_FP8_API_KEY",
            show_envvar=False,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Such keys, one per line.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page origin that may use this server, `*` for all; repeatable."),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=256, help="Largest picture, width times height.")
    ] = 4194304,
    max_steps: Annotated[int, typer.Option(min=1, help="Most denoise steps.")] = 200,
    max_images: Annotated[int, typer.Option(min=1, help="Most pictures per request.")] = 10,
    max_prompt_length: Annotated[
        int, typer.Option(min=1, help="Longest prompt, in characters.")
    ] = 32000,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Largest body without pictures in it.")
    ] = 1048576,
    max_upload_bytes: Annotated[
        int, typer.Option(min=1, help="Largest body with pictures in it.")
    ] = 20971520,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Pictures that may wait; beyond it the answer is 429.")
    ] = 32,
    max_batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pictures of one size that may share forwards, joining and leaving between steps. "
            "More of them are drawn per second where one does not fill the device; each waits "
            "longer, and may round differently than alone.",
        ),
    ] = 1,
    warm_up: Annotated[bool, typer.Option(help="Draw two pictures before /ready says so.")] = True,
    record: Annotated[
        Path | None,
        typer.Option(help="A record.json of bench: /v1/models then tells measured quality."),
    ] = None,
    log_format: Annotated[str, typer.Option(help="human, or json: one object per line.")] = "human",
    traces: Annotated[
        bool,
        typer.Option("--traces", help="Send OpenTelemetry spans, where OTEL_EXPORTER_OTLP_* say."),
    ] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    engine: EngineName = "auto",
    attention_backend: AttentionBackend = "auto",
    text_encoder: TextEncoderPrecision = "bf16",
    offload: Offload = "none",
) -> None:
    """Serve the OpenAI Images API: POST /v1/images/generations and /v1/images/edits.

    zimage-fp8 serve nano --policy online_fp8 --port 8000
    """
    let_segments_grow()

    from zimage_fp8.checkpoint.read_ahead import read_ahead

    read_ahead(models)  # while the imports below take their seconds

    from zimage_fp8.engine import EngineOptions
    from zimage_fp8.serve import ServeOptions, api_keys
    from zimage_fp8.serve import serve as run

    options = ServeOptions(
        warm_up=warm_up,
        max_waiting=max_waiting,
        max_batch=max_batch,
        max_images=max_images,
        max_pixels=max_pixels,
        max_steps=max_steps,
        max_prompt_length=max_prompt_length,
        max_body_bytes=max_body_bytes,
        max_upload_bytes=max_upload_bytes,
        embed_metadata=embed_metadata,
        log_prompts=log_prompts,
        a1111=a1111,
        api_keys=api_keys(api_key or (), api_key_file),
        cors_origins=tuple(cors_origin or ()),
    )
    run(
        models,
        options,
        policy=policy,
        served_model_name=served_model_name,
        quality=measured_quality(record) if record else None,
        quantization_config=quantization_config,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        engine=EngineOptions(engine, attention_backend, text_encoder, offload),
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        omni=omni,
        log_format=log_format,
        traces=traces,
    )


def measured_quality(path: Path) -> dict[str, dict[str, object]]:
    """policy -> medians over a benchmark's pictures, from its main table."""
    from math import isinf
    from statistics import median

    from zimage_fp8.bench.record import REFERENCE, read_record

    record = read_record(path)
    measured: dict[str, dict[str, object]] = {}
    for variant in record.passes[0].variants:
        rows = [row.quality for row in variant.requests if row.quality]
        if not rows:
            continue
        psnr_db = median(row.psnr_db for row in rows)
        measured[variant.policy] = {
            "against": REFERENCE,
            "model": record.model,
            "pictures": len(rows),
            "median_psnr_db": None if isinf(psnr_db) else round(psnr_db, 2),  # JSON has no infinity
            "median_ssim": round(median(row.ssim for row in rows), 4),
        }
    return measured
