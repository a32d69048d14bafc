"""`report.md` and its comparison pictures, rendered from a record and the pictures beside it."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from zimage_fp8.bench.grid import write_grids
from zimage_fp8.bench.record import MEMORY_METHODS, Record, VariantRecord
from zimage_fp8.bench.table import (
    BEST_RULE,
    GIB,
    close_to_best,
    markdown_table,
    marked_table,
    mean_latency_s,
)

STAGES = ("queue", "encode", "denoise", "decode", "picture")


def write_report(record: Record, folder: Path) -> Path:
    """Write report.md and one comparison picture per prompt to the record's folder."""
    grids = write_grids(record, folder, folder)
    path = folder / "report.md"
    path.write_text(render_report(record, [grid.name for grid in grids]))
    return path


def render_report(record: Record, grids: list[str]) -> str:
    """The report as markdown; `grids` are the comparison pictures' files, one per prompt."""
    parameters = record.parameters
    sections = [
        f"# {record.model}: every policy at {parameters.steps} steps, {parameters.size}",
        marked_table(record),
        "\n".join(f"- {note}" for note in notes(record)),
        "## Pictures",
        *(f"![{prompt}]({grid})" for prompt, grid in zip(parameters.prompts, grids, strict=True)),
        "## Where the time goes",
        stage_table(record),
        "Means in milliseconds. `outside` is the rest of the latency: HTTP, base64, the client. "
        "`load` is the time from starting the process to its first health.",
        "## Parameters",
        parameter_table(record),
        "## Machine and versions",
        machine_table(record),
    ]
    return "\n\n".join(sections) + "\n"


def notes(record: Record) -> Iterator[str]:
    """How to read the table, and what not to read into it."""
    parameters, method = record.parameters, record.memory_method
    yield BEST_RULE
    if close := close_to_best(record):
        yield (
            f"The star is not certain: the latencies of {', '.join(close)} overlap with those of "
            "the starred variant, so another run may star another one."
        )
    yield (
        "Latency is wall-clock seconds of one HTTP round trip to /v1/images/generations, the mean "
        f"of {parameters.runs} timed requests after {parameters.warmup} warm-up, each variant in a "
        "fresh server process."
    )
    yield f"Memory is the {MEMORY_METHODS[method].sentence}."
    yield (
        "PSNR and SSIM (scikit-image, window 11) compare each picture with the bf16_base picture "
        "of the same prompt and seed; higher is closer. "
        f"{len(parameters.prompts)} pictures per variant are too few to rank variants that lie "
        "close together."
    )
    yield (
        f"Every picture took {record.reference.requests[0].nfe} forwards of the transformer at "
        f"guidance {parameters.guidance:g}, counted by the server, the same for all variants."
    )
    if is_on_cpu(record):
        yield (
            "This ran on a CPU. Here 8-bit products are emulated to prove the arithmetic, not to "
            "save time: no FP8 unit exists, so latencies say nothing about a GPU, and peak RSS "
            "holds the Python runtime and the BF16 text encoder and VAE as well."
        )
    if record.is_test_model:
        yield (
            f"{record.model} is a test model a few hundred times smaller than Z-Image-Turbo. Its "
            "decibels are not Z-Image-Turbo's: fewer layers for an error to travel through."
        )


def is_on_cpu(record: Record) -> bool:
    return str(record.reference.server.get("device", "")).startswith("cpu")


def stage_table(record: Record) -> str:
    header = ["Variant", *STAGES, "outside", "latency min to max", "load (s)"]
    return markdown_table(header, map(_stage_cells, record.variants))


def _stage_cells(variant: VariantRecord) -> list[str]:
    stages = {
        stage: fmean(request.timings_s.get(stage, 0.0) for request in variant.requests)
        for stage in STAGES
    }
    latencies = [request.latency_s for request in variant.requests]
    outside = mean_latency_s(variant) - sum(stages.values())
    return [
        variant.policy,
        *(f"{seconds * 1000:.0f}" for seconds in (*stages.values(), outside)),
        f"{min(latencies) * 1000:.0f} to {max(latencies) * 1000:.0f}",
        f"{variant.load_s:.1f}",
    ]


def parameter_table(record: Record) -> str:
    """The seed card's table of benchmark parameters."""
    parameters, server = record.parameters, record.reference.server
    seeds = ", ".join(map(str, parameters.seeds))
    body = {
        "Resolution": f"{parameters.width} × {parameters.height}",
        "Inference steps": str(parameters.steps),
        "Forwards per picture": str(record.reference.requests[0].nfe),
        "Guidance scale": f"{parameters.guidance}",
        "Seeds": f"{seeds} (one per prompt)",
        "Warm-up images per variant": str(parameters.warmup),
        "Timed runs per variant": str(parameters.runs),
        "Prompts": "<br>".join(parameters.prompts),
        "Dtype of what is not quantized": parameters.dtype,
        "Attention": str(server.get("attention")),
        "Latency metric": "Wall-clock seconds for one HTTP /v1/images/generations round trip",
        "Memory metric": MEMORY_METHODS[record.memory_method].sentence.capitalize(),
        "Image quality": (
            "PSNR (dB) and SSIM, scikit-image, win_size=11, channel_axis=-1, data_range=255, "
            "against the BF16 image at the same (prompt, seed)"
        ),
    }
    return markdown_table(["Parameter", "Value"], body.items()).replace("--:", "---")


def machine_table(record: Record) -> str:
    machine = record.machine
    gpus = [f"{gpu.name} (driver {gpu.driver})" for gpu in machine.gpus]
    body = {
        "Hardware": hardware(record),
        "CPU": f"{machine.cpu}, {machine.cores} cores",
        "Memory": f"{machine.memory_bytes / GIB:.0f} GiB",
        "GPUs": ", ".join(gpus) or "none",
        "System": machine.system,
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "Commit": record.commit or "installed package",
        "Date": record.created,
        "Command": f"`{' '.join(record.command)}`",
    }
    return markdown_table(["", ""], body.items()).replace("--:", "---")


def hardware(record: Record) -> str:
    """What computed the pictures, in a few words."""
    machine = record.machine
    if machine.gpus and not is_on_cpu(record):
        return machine.gpus[0].name
    return f"{machine.cpu} ({machine.cores} cores, no GPU used)"
