"""What stands around a table: how to read it, what was run, on what; from a record alone."""

from collections import Counter
from collections.abc import Iterator, Sequence

from zimage_fp8.bench.record import MEMORY_METHODS, Pass, Record, VariantRecord
from zimage_fp8.bench.summary import guidance_cost, strata
from zimage_fp8.bench.table import BEST_RULE, BEST_RULE_WITHOUT_QUALITY, GIB, Table, close_to_best

FEW_PICTURES = 30  # below, an interval of the mean PSNR spans decibels
MANY_PROMPTS = 8


def notes(record: Record) -> Iterator[str]:
    """How to read the main table, and what not to read into it."""
    parameters, one = record.parameters, record.passes[0]
    yield BEST_RULE_WITHOUT_QUALITY if record.no_quality else BEST_RULE
    if close := close_to_best(record):
        yield (
            f"The star is not certain: the latencies of {', '.join(close)} overlap with those of "
            "the starred variant, so another run may star another one."
        )
    yield (
        "Latency is wall-clock seconds of one HTTP round trip to /v1/images/generations, the mean "
        f"of {len(record.reference.latencies_s(parameters.size))} timed requests after "
        f"{_warmups(record)} warm-up, each variant in a server process of its own. "
        f"{one.order_reason}"
    )
    if one.memory_method:
        yield f"Memory is the {MEMORY_METHODS[one.memory_method].sentence}."
    yield _about_quality(record)
    yield _about_forwards(record)
    yield f"Attention backend: {attention_text(one)}."
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


def _warmups(record: Record) -> str:
    counts = sorted({len(variant.warmup_latencies_s) for variant in record.variants})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _about_quality(record: Record) -> str:
    if record.no_quality:
        return f"Pictures were not compared: {record.no_quality}."
    parameters = record.parameters
    count = len(parameters.prompts) * len(parameters.sizes)
    few = (
        f" {count} pictures per variant are too few to rank variants that lie close together."
        if count < FEW_PICTURES
        else ""
    )
    return (
        "PSNR and SSIM (scikit-image, window 11) compare each picture with the bf16_base picture "
        f"of the same prompt, size and seed; higher is closer.{few}"
    )


def _about_forwards(record: Record) -> str:
    """What ran: as the server counted, and as a probe with guidance turned on confirmed."""
    asked = f"guidance {record.parameters.guidance:g}"
    told = {row.nfe for variant in record.variants for row in variant.requests}
    if told == {None}:
        text = f"The servers do not tell how many forwards a picture took; asked for was {asked}."
    elif len(told) == 1:
        text = (
            f"Every picture took {told.pop()} forwards of the transformer at {asked}, counted by "
            "the server, the same for all variants."
        )
    else:
        counts = ", ".join(sorted(map(str, told)))
        text = f"The variants took different numbers of forwards at {asked}: {counts}."
    costs = [guidance_cost(v.probe) for v in record.variants if v.probe]
    if costs:
        span = " to ".join(dict.fromkeys(f"{cost:.2f}" for cost in (min(costs), max(costs))))
        text += (
            f" Turned on as a test, guidance cost {span} forwards more per step; a server that "
            "runs it unasked would show none."
        )
    return text


def attention_text(one: Pass) -> str:
    """What ran, and what was asked for when that is not the server's own choice."""
    ran = dict.fromkeys(variant.attention or "not told" for variant in one.variants)
    asked = f", asked for as {one.attention}" if one.attention else ""
    return f"{', '.join(ran)}{asked}"


def is_on_cpu(record: Record) -> bool:
    return str(record.reference.server.get("device", "")).startswith("cpu")


def parameter_table(record: Record) -> Table:
    """The seed card's table of benchmark parameters, and what it leaves out."""
    parameters, one = record.parameters, record.passes[0]
    reference = record.reference
    warm = f"{parameters.warmup}"
    if parameters.warm_tolerance is not None:
        warm += (
            f" at least, until two medians agree within {parameters.warm_tolerance:.0%}, at most "
            f"{parameters.max_warmup}"
        )
    nfe = reference.requests[0].nfe
    method = one.memory_method
    body = {
        "Profile": f"{record.profile.name}, digest {record.profile.digest or 'none'}",
        "Resolution": ", ".join(size.replace("x", " × ") for size in parameters.sizes),
        "Inference steps": str(parameters.steps),
        "Forwards per picture": "not told" if nfe is None else str(nfe),
        "Sigmas": ", ".join(f"{sigma:.4g}" for sigma in reference.sigmas) or "not told",
        "Guidance scale": f"{parameters.guidance}",
        "Seeds": f"{_seeds(parameters.seeds)} (one per prompt)",
        "Warm-up images per variant": warm,
        "Timed runs per variant": f"{parameters.runs} per size",
        "Order": f"{one.order}. {one.order_reason}",
        "Prompts": _prompts(record),
        "Dtype of what is not quantized": parameters.dtype,
        "Attention": attention_text(one),
        "Engine": ", ".join(dict.fromkeys(v.engine for v in record.variants)),
        "Server command": f"`{' '.join(reference.command)}`",
        "GPU memory utilization": _flag(reference, "--gpu-memory-utilization", "not capped"),
        "Tensor parallel size": _flag(reference, "--tensor-parallel-size", "1"),
        "Hardware": hardware(record),
        "Latency metric": "Wall-clock seconds for one HTTP /v1/images/generations round trip",
        "Memory metric": MEMORY_METHODS[method].sentence.capitalize() if method else "n/a",
        "Image quality": (
            "PSNR (dB) and SSIM, scikit-image, win_size=11, channel_axis=-1, data_range=255, "
            "against the BF16 image at the same (prompt, size, seed)"
        ),
        "Intervals": "95 %, percentile bootstrap; pictures of one prompt are resampled together",
    }
    return Table(["Parameter", "Value"], [[key, value] for key, value in body.items()])


def _flag(variant: VariantRecord, name: str, default: str) -> str:
    command = variant.command
    return command[command.index(name) + 1] if name in command[:-1] else default


def _seeds(seeds: Sequence[int]) -> str:
    is_counting = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    if len(seeds) > MANY_PROMPTS and is_counting:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _prompts(record: Record) -> str:
    prompts = record.parameters.prompts
    if len(prompts) <= MANY_PROMPTS:
        return "<br>".join(prompts)
    counts = Counter(record.parameters.strata)
    kinds = (f"{kind.replace('_', ' ')} {counts[kind]}" for kind in strata(record.parameters))
    return f"{len(prompts)}: {', '.join(kinds)}; all of them are in the record"


def machine_table(record: Record) -> Table:
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
    return Table(["", ""], [[key, value] for key, value in body.items()])


def hardware(record: Record) -> str:
    """What computed the pictures, in a few words."""
    machine = record.machine
    if machine.gpus and not is_on_cpu(record):
        return machine.gpus[0].name
    return f"{machine.cpu} ({machine.cores} cores, no GPU used)"
