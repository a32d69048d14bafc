"""The command line. Each verb parses, calls the function of its name, and prints.

Heavy imports happen inside the verbs, so that `--help` answers at once. Data goes to stdout,
everything else to stderr. Exit codes: 0 done, 1 failed, 2 the request was wrong.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8 import __version__
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.terminal import emit, progress

app = typer.Typer(
    name="zimage-fp8",
    help="Z-Image-Turbo in 8 bits: quantize it, prove what it costs, serve it fast.\n\n"
    "MODEL is always one of: `nano` (a small model inside this package), a local diffusers "
    "folder, or a Hub id such as Tongyi-MAI/Z-Image-Turbo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(help="nano, a local folder, or a Hub id.", metavar="MODEL")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32, for everything not quantized.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")]
PolicyName = Annotated[
    str | None,
    typer.Option(
        help="bf16_base, online_fp8, fp8-row, a static policy such as full or ffn-only, one of "
        "these with blocks (full[0-14], full[!15-29]), or a .toml file."
    ),
]


@app.command()
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
    options = verb.CalibrationOptions(calibration, prompts, steps, _size(size), seed, dtype, device)
    with progress() as report:
        written = verb.quantize(model, policy, out, calibration=options, on_progress=report)
    emit([str(path) for path in written] if as_json else "\n".join(map(str, written)), as_json)


@app.command()
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


@app.command()
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
    as_json: Json = False,
) -> None:
    """Draw a picture.

    zimage-fp8 generate "a 3d icon of a red apple on a teal background" -o apple.png
    """
    from zimage_fp8.generate import check_early
    from zimage_fp8.generate import generate as draw
    from zimage_fp8.model.loading import load_pipeline
    from zimage_fp8.model.pipeline import ImageRequest
    from zimage_fp8.quant.calibrate import read_calibration

    wanted = _size(size)
    width, height = wanted or (16, 16)  # the model's own size is known once it is loaded
    request = ImageRequest(prompt, width, height, negative_prompt, steps, guidance, seed)
    check_early(request, output, n)
    known = read_calibration(calibration) if calibration else None
    with progress() as report:
        pipeline = load_pipeline(
            model,
            policy=policy,
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
    emit([str(path) for path in files] if as_json else "\n".join(map(str, files)), as_json)


@app.command(name="inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A PNG, or a pipeline folder.")],
    as_json: Json = False,
) -> None:
    """Read back what a picture or a checkpoint says about itself."""
    from zimage_fp8.inspect import inspect
    from zimage_fp8.render import facts_text

    facts = inspect(path)
    emit(facts if as_json else facts_text(facts), as_json)


@app.command()
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


@app.command()
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
        size=_size(size),
        steps=steps,
        guidance=guidance,
        warmup=warmup,
        runs=runs,
        dtype=dtype,
        device=device,
    )
    print(report)


@app.command()
def card(
    checkpoints: Annotated[Path, typer.Argument(help="The folder with one folder per policy.")],
    results: Annotated[Path, typer.Option(help="The record.json that bench wrote.")],
    namespace: Annotated[str, typer.Option(help="Your name on the Hub.")] = "your-name",
) -> None:
    """Write README.md, the model card, into each checkpoint, from measured numbers.

    zimage-fp8 card results/checkpoints --results results/record.json
    """
    from zimage_fp8.card import write_cards

    for written in write_cards(checkpoints, results, namespace=namespace):
        print(written)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run, and why not the rest."""
    from zimage_fp8 import doctor as verb

    report = verb.examine()
    emit(report if as_json else verb.render(report), as_json)


def _size(size: str | None) -> tuple[int, int] | None:
    from zimage_fp8.protocol import parse_size

    return parse_size(size) if size else None


def _version(value: bool) -> None:
    if value:
        print(f"zimage-fp8 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """The options in front of every verb."""


def main() -> None:
    """Run the command line; our errors become one sentence and an exit code."""
    # Being asked to end must unwind like Ctrl-C does, so that half-written folders are removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        app()
    except ZImageError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
