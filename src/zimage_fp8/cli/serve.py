"""serve: the OpenAI Images API."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import Device, Dtype, Model, PolicyName


def serve(
    model: Model,
    policy: PolicyName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in /v1/models; MODEL by default.")
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
    max_pixels: Annotated[int, typer.Option(help="Largest picture, width times height.")] = 4194304,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Serve the OpenAI Images API: POST /v1/images/generations.

    zimage-fp8 serve nano --policy online_fp8 --port 8000
    """
    from zimage_fp8.serve import ServeOptions, api_keys
    from zimage_fp8.serve import serve as run

    options = ServeOptions(
        names=(served_model_name or model,),
        max_pixels=max_pixels,
        embed_metadata=embed_metadata,
        log_prompts=log_prompts,
        api_keys=api_keys(api_key or (), api_key_file),
        cors_origins=tuple(cors_origin or ()),
    )
    run(
        model,
        options,
        policy=policy,
        quantization_config=quantization_config,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        omni=omni,
    )
