"""The README.md of one checkpoint, as text: every number is the record's.

A card has the sections of the seed card, in its order: what this variant quantizes, the best
choice, this variant's numbers, quick start, the tables of both passes, pictures, parameters,
family, licence. And what that card leaves out: intervals, what ran, how it was calibrated.
"""

import json
from collections.abc import Iterator

from pydantic import JsonValue

from zimage_fp8.bench.details import latency_table, quality_table, rival_of, warnings_of
from zimage_fp8.bench.grid import HEAT_RULE, grid_name, grid_prompts
from zimage_fp8.bench.notes import attention_text, hardware, notes, parameter_table
from zimage_fp8.bench.record import MEMORY_METHODS, Pass, Record
from zimage_fp8.bench.statistics import MIN_SAMPLES
from zimage_fp8.bench.table import BEST, HERE, Row, main_table, psnr_text, rows
from zimage_fp8.card.family import ORIGINS, Card, workload
from zimage_fp8.card.metadata import metadata
from zimage_fp8.quant.policy import STATIC_POLICIES

PORT = 18002


def render_card(card: Card) -> str:
    """README.md: Hub metadata, then the sections."""
    record = card.record
    sections = [
        f"---\n{metadata(card).to_yaml()}\n---",
        f"# {card.name}",
        _introduction(card),
        "## Quick start\n\n" + _quick_start(card),
        f"## Benchmark: every policy at {workload(record)}\n\n" + _benchmark(card),
        "## How sure\n\n" + _certainty(record),
        "## Image comparisons\n\n" + _comparisons(card),
        "## Benchmark parameters\n\n" + _left(parameter_table(record).markdown()),
        "## What ran\n\n" + _what_ran(card),
        "## Calibration\n\n" + _calibration(card),
        f"## The repositories of this family: {len(card.family)}\n\n" + _family(card),
        "## License and attribution\n\n" + _attribution(card),
    ]
    return "\n\n".join(sections) + "\n"


def _left(table: str) -> str:
    """A table of sentences reads from the left."""
    return table.replace("--:", "---")


def _introduction(card: Card) -> str:
    record, row = card.record, card.row
    found = rows(record)
    best = next(r for r in found if r.is_best)
    paragraphs = [
        f"{row.summary} {_format(card)} Quantized layers: {_quantized_layers(card)}.",
        f"**Best overall choice in this benchmark: `{best.name}`** ({_numbers(record, best)}). "
        + _how_to_get(best.policy, card),
        _this_variant(card, next((r for r in found if r.is_reference), None)),
        f"It is one of {len(card.family)} policies for {card.base_model} in 8 bits, for zimage-fp8"
        f"{'' if card.is_own_format else ' and vLLM-Omni'}. {_in_common(card)}",
        f"In the tables below, {BEST} marks the best overall choice (here `{best.name}`) and "
        f"{HERE} the row of this repository.",
    ]
    if record.is_test_model:
        paragraphs.insert(0, TOY_WARNING.format(model=record.model))
    return "\n\n".join(paragraphs)


def _this_variant(card: Card, reference: Row | None) -> str:
    record, row = card.record, card.row
    quality = f"Pictures were not compared: {record.no_quality}."
    if row.psnr_db is not None:
        quality = (
            f"Image quality: PSNR {psnr_text(row, ' dB')} / SSIM {row.ssim:.4f} against the "
            "BF16 reference at identical (prompt, seed)."
        )
    base = f" BF16 itself: {_numbers(record, reference)}." if reference else ""
    return f"**This variant (`{row.policy}`)**: {_numbers(record, row)}. {quality}{base}"


FORMATS = {"e4m3": "E4M3", "int8": "INT8"}
WEIGHT_SCALES = {"per-tensor": "one scale per matrix", "per-channel": "one scale per output row"}
ACTIVATION_SCALES = {
    "static-per-tensor": "one static scale per layer, from calibration",
    "dynamic-per-token": "one scale per token, computed at run time",
}


def _format(card: Card) -> str:
    spec = card.facts.spec
    name = FORMATS[spec.format]
    return (
        f"Weights are {name} with {WEIGHT_SCALES[spec.weight]}. "
        f"Activations are {name} with {ACTIVATION_SCALES[spec.activation]}."
    )


def _in_common(card: Card) -> str:
    """What the family shares, as far as the servers that were measured said so themselves.

    INT8 is calibrated too, but for the channel scales that are folded.
    """
    measured = {v.policy: v.server.get("calibration") for v in card.record.variants}
    calibrations = {measured[policy] for policy in card.family}
    is_static = all(policy.partition("[")[0] in STATIC_POLICIES for policy in card.family)
    if is_static and len(calibrations) == 1 and None not in calibrations:
        return (
            "They differ only in which linear layers of the transformer are quantized; everything "
            "else stays BF16, and all share the scales of one calibration."
        )
    return "Whatever a policy does not quantize stays BF16."


def _quantized_layers(card: Card) -> str:
    """The globs of the policy's rules, as the checkpoint itself states them."""
    return ", ".join(f"`{rule.layers}`" for rule in card.facts.rules if rule.spec)


TOY_WARNING = (
    "> **A test model, not an image model.** `{model}` is a tiny network of Z-Image's structure, "
    "made so that quantizing, serving and measuring can be tried on a laptop. Its decibels and "
    "seconds are not Z-Image-Turbo's."
)


def _numbers(record: Record, row: Row) -> str:
    """Latency and memory of a row; the changes are left out where the row is their base."""
    latency, memory = f"{row.latency_s:.3f} s/image", "memory not measured"
    method = record.passes[0].memory_method
    if row.memory_gib is not None and method:
        memory = f"{row.memory_gib:.2f} GiB {MEMORY_METHODS[method].short}"
    if row.is_reference:
        return f"{latency}, {memory}"
    if row.latency_change is not None:
        latency += f", {row.latency_change:+z.1%} vs BF16"
    if row.memory_saving is not None:
        less = "less" if row.memory_saving >= 0 else "more"
        memory += f", {abs(row.memory_saving):.1%} {less} than BF16"
    return f"{latency}; {memory}"


def _how_to_get(policy: str, card: Card) -> str:
    if policy in card.family:
        return "The repositories of the family are listed below."
    model = card.record.model
    if policy != "online_fp8":
        return f"It needs no separate download: `zimage-fp8 serve {model} --policy {policy}`."
    flag = """--quantization-config '{"method":"fp8"}'"""
    return (
        f"It runs straight from {model} with `{flag}`, no separate download. A checkpoint like "
        "this one is for when the scales should be static: calibrated offline, frozen on disk, "
        "the same everywhere."
    )


def _quick_start(card: Card) -> str:
    parameters = card.record.parameters
    is_vllm_measured = any(v.engine == "vllm-omni" for v in card.record.variants)
    also = NOT_FOR_VLLM_OMNI if card.is_own_format else VLLM_OMNI
    return "\n\n".join([SERVE, also, ASK]).format(
        repository=card.repository,
        omni="" if card.is_own_format else OMNI_DEFAULTS,
        # Its own choice of a kernel for static scales on Blackwell is reported to be slow.
        cutlass=" \\\n    --force-cutlass-fp8" if card.facts.spec.is_static else "",
        vllm="" if is_vllm_measured else "; the benchmark below did not run vLLM-Omni",
        port=PORT,
        prompt=_in_single_quotes(json.dumps(parameters.prompts[0], ensure_ascii=False)),
        size=parameters.size,
        steps=parameters.steps,
        guidance=parameters.guidance,
    )


def _in_single_quotes(text: str) -> str:
    """Text for the inside of a shell's '…', which cannot hold a quote itself."""
    return text.replace("'", "'\\''")


SERVE = """\
```bash
pip install zimage-fp8
zimage-fp8 serve {repository} --port {port}
```"""

NOT_FOR_VLLM_OMNI = "vLLM-Omni cannot read this format: rotated weights need rotated inputs."

VLLM_OMNI = """\
Or with vLLM-Omni 0.26 or newer, which finds the quantization in `transformer/config.json` by
itself (0.20 took it as `--quantization-config`, since 0.22 the option is
`--diffusion-quantization-config`{vllm}):

```bash
docker run --rm --gpus all --ipc=host \\
  -p {port}:8002 \\
  -e HF_HOME=/hf_cache \\
  -e DIFFUSION_ATTENTION_BACKEND=TORCH_SDPA \\
  -v /your/hf/cache:/hf_cache \\
  your-vllm-omni:0.26 \\
    vllm-omni serve {repository} \\
    --omni --host 0.0.0.0 --port 8002 \\
    --gpu-memory-utilization 0.90 \\
    --tensor-parallel-size 1{cutlass}
```"""

OMNI_DEFAULTS = """ With vLLM-Omni always
send `num_inference_steps` and `guidance_scale`: left out they become 50 and 1.0, which is guidance
on and twice the work. Releases 0.20 to 0.24 take 0.0 for "not given" and run guidance anyway."""

ASK = """\
Then call the OpenAI-style image API.{omni}

```bash
curl -s http://127.0.0.1:{port}/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{{
    "model": "{repository}",
    "prompt": {prompt},
    "size": "{size}",
    "num_inference_steps": {steps},
    "guidance_scale": {guidance},
    "n": 1,
    "response_format": "b64_json"
  }}'
```"""


def _benchmark(card: Card) -> str:
    record = card.record
    parts = [
        "Same machine, same (prompt, seed) pairs, same versions, each variant in a fresh server "
        "process."
    ]
    for one in record.passes:
        parts += [f"### {_pass_title(one)}"]
        for size in record.parameters.sizes:
            parts += [f"At {size.replace('x', '×')}:"] if len(record.parameters.sizes) > 1 else []
            parts += [main_table(record, one, size, here=card.variant.name).markdown()]
        if one is record.passes[0]:
            parts += ["\n".join(f"- {note}" for note in notes(record))]
    if warnings := list(warnings_of(record)):
        parts += ["### To know before believing", "\n".join(f"- {text}" for text in warnings)]
    return "\n\n".join(parts)


def _pass_title(one: Pass) -> str:
    ran = attention_text(one.model_copy(update={"attention": None}))
    if one.attention is None:
        return f"Pass {one.name}: attention of the server's own choice, {ran}"
    return f"Pass {one.name}: `DIFFUSION_ATTENTION_BACKEND={one.attention}`, {ran}"


def _certainty(record: Record) -> str:
    """Intervals and verdicts: of latency in every pass, of quality in the main one."""
    parts = [
        "95 % intervals by bootstrap. A change whose interval holds zero, or that comes of fewer "
        f"than {MIN_SAMPLES} samples, is `not distinguishable`."
    ]
    for one in record.passes:
        for size in record.parameters.sizes if one.variants else ():
            where = f"Pass {one.name}, {size.replace('x', '×')}:"
            parts += [where, latency_table(one, size).markdown()]
    main = record.passes[0]
    quality, rival = quality_table(record, main), rival_of(main)
    if quality and rival:
        parts += [
            f"Quality against BF16, and against `{rival.name}` picture by picture. Means come with "
            "their interval over prompts; p10 is the worst tenth.",
            quality.markdown(),
        ]
    return "\n\n".join(parts)


def _comparisons(card: Card) -> str:
    shown = [
        f"**Prompt {prompt}**: {card.record.parameters.prompts[prompt]}\n\n"
        f"[![comparison {prompt}](images/{grid_name(prompt)})](images/{grid_name(prompt)})"
        for prompt in grid_prompts(card.record)
    ]
    lead = (
        f"The same {len(shown)} prompts drawn by every variant from identical seeds. Click for "
        f"full resolution. {HEAT_RULE}"
    )
    return "\n\n".join([lead, *shown])


# What a server says of itself that the card says elsewhere, or better.
ELSEWHERE = {"model", "policy", "versions", "commit", "calibration", "dtype"}


def _what_ran(card: Card) -> str:
    """Kernels, attention and whatever else the measured server said of itself."""
    told = list(_flat({k: v for k, v in card.variant.server.items() if k not in ELSEWHERE}))
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in card.variant.sigmas)
    told += [f"sigmas: {sigmas}"] if sigmas else []
    if not told:
        return "The server that was measured tells nothing about itself."
    return "As the server told while this variant was measured:\n\n" + "\n".join(
        f"- {line}" for line in told
    )


def _flat(facts: dict[str, JsonValue], prefix: str = "") -> Iterator[str]:
    for key, value in facts.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        elif value is not None:
            yield f"{name}: {value}"


def _calibration(card: Card) -> str:
    calibration = card.facts.calibration
    if calibration is None:
        return "The activation scales are computed per token at run time; nothing is calibrated."
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in calibration.sigmas)
    return (
        f"{calibration.prompts} prompts × {calibration.forwards} forwards of the real denoise loop "
        f"at {calibration.size}, {calibration.dtype}, seeds from {calibration.seed}. Sigmas: "
        f"{sigmas}. {_use_of_calibration(card)} Digest of the calibration: "
        f"`{card.facts.calibration_digest}`."
    )


def _use_of_calibration(card: Card) -> str:
    if card.facts.spec.is_static:
        return "A scale is the largest magnitude seen divided by 448."
    return (
        "From it come the channel scales that are folded into the weights; activations are scaled "
        "per token at run time."
    )


def _family(card: Card) -> str:
    def line(name: str) -> str:
        here = " ← you are here" if name == card.repository else ""
        return f"- [{name}](https://huggingface.co/{name}){here}"

    return "\n".join(line(card.repository_of(policy)) for policy in card.family)


def _calibrated(card: Card) -> str:
    calibration = card.facts.calibration
    if calibration is None:
        return ""
    return f", {calibration.prompts} calibration prompts × {calibration.forwards} denoise forwards"


def _format_name(card: Card) -> str:
    if card.is_own_format:
        return "its own format"
    return f"NVIDIA ModelOpt's format {card.facts.algorithm}"


def _attribution(card: Card) -> str:
    record, facts = card.record, card.facts
    return "\n".join(
        f"- {line}"
        for line in (
            ORIGINS.get(record.model, f"The licence is that of {card.base_model}."),
            f"Quantization: zimage-fp8 {facts.version}, in {_format_name(card)}"
            f"{_calibrated(card)}.",
            f"Serving and measurement: zimage-fp8 {record.versions.get('zimage-fp8')}.",
            f"Benchmarked on {hardware(record)}, {record.created[:10]}.",
        )
    )
