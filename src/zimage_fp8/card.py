"""VERB card: the README.md of each repository in the family, every number from a record.

A card has the sections of the seed card, in its order: what this variant quantizes, the best
choice, this variant's numbers, quick start, the table, pictures, parameters, family, licence.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from zimage_fp8.bench.grid import write_grids
from zimage_fp8.bench.record import MEMORY_METHODS, REFERENCE, Record, read_record
from zimage_fp8.bench.report import hardware, notes, parameter_table
from zimage_fp8.bench.table import Row, db_text, marked_table, rows
from zimage_fp8.bench.variants import checkpoint_facts
from zimage_fp8.errors import ZImageError
from zimage_fp8.quant.policy import STATIC_POLICIES

UPSTREAM = "Tongyi-MAI/Z-Image-Turbo"
PORT = 18002


@dataclass(frozen=True)
class Card:
    """Everything one README is made of. `folder` is the checkpoint that it is written into."""

    policy: str
    folder: Path
    record: Record
    facts: Mapping[str, object]
    family: Sequence[str]
    namespace: str

    @property
    def row(self) -> Row:
        return next(row for row in rows(self.record) if row.policy == self.policy)

    @property
    def name(self) -> str:
        return f"{base_name(self.record)}-FP8-{self.policy}"

    @property
    def repository(self) -> str:
        return self.repository_of(self.policy)

    def repository_of(self, policy: str) -> str:
        return f"{self.namespace}/{base_name(self.record)}-FP8-{policy}"

    @property
    def base_model(self) -> str:
        is_own = self.record.is_test_model
        return f"{self.namespace}/{base_name(self.record)}" if is_own else UPSTREAM


def write_cards(checkpoints: Path, record: Path, *, namespace: str = "your-name") -> list[Path]:
    """Write README.md and images/ into every checkpoint of the family; return the READMEs.

    checkpoints: a folder of checkpoints named by policy, or one checkpoint. record: record.json,
    with its pictures beside it. Raises ZImageError when a checkpoint was not measured, or when the
    record measures another model.
    """
    measured = read_record(record)
    cards = plan_cards(checkpoints, measured, namespace)
    grids = write_grids(measured, record.parent, record.parent)
    return [write_card(card, record.parent, grids) for card in cards]


def write_card(card: Card, measured: Path, grids: Sequence[Path]) -> Path:
    """One README.md with its pictures. `measured` is the record's folder."""
    readme = card.folder / "README.md"
    try:
        copy_pictures(card, measured, grids)
        readme.write_text(render_card(card))
    except OSError as error:
        raise ZImageError(f"cannot write {readme}: {error}") from None
    return readme


def plan_cards(checkpoints: Path, record: Record, namespace: str) -> list[Card]:
    """One card per checkpoint found, checked against the record before anything is written."""
    found = _find_checkpoints(checkpoints)
    measured = [variant.policy for variant in record.variants]
    for policy, (_, facts) in found.items():
        if policy not in measured:
            raise ZImageError(
                f"the record has no row for {policy}, only {', '.join(measured)}",
                hint="run zimage-fp8 bench with this policy",
            )
        if (made_from := facts.get("base_model")) != record.model:
            raise ZImageError(f"{policy} is made from {made_from}, the record is of {record.model}")
    family = [policy for policy in STATIC_POLICIES if policy in {*found, *measured}]
    return [
        Card(policy, folder, record, facts, family, namespace)
        for policy, (folder, facts) in found.items()
    ]


def _find_checkpoints(root: Path) -> dict[str, tuple[Path, dict[str, object]]]:
    """policy -> (folder, what the checkpoint says of itself)"""
    found = {}
    for folder in (root, *(root / policy for policy in STATIC_POLICIES)):
        if facts := checkpoint_facts(folder):
            found[str(facts["policy"])] = folder, facts
    if not found:
        raise ZImageError(
            f"{root} holds no quantized checkpoint",
            hint="zimage-fp8 quantize MODEL --policy all --out DIR makes them",
        )
    return found


def copy_pictures(card: Card, measured: Path, grids: Sequence[Path]) -> None:
    """This variant's pictures and the comparisons, to images/ beside the README."""
    images = card.folder / "images"
    images.mkdir(exist_ok=True)
    for grid in grids:
        shutil.copy(grid, images / grid.name)
    for prompt, picture in _pictures(card).items():
        shutil.copy(measured / picture, images / f"prompt{prompt}.png")


def _pictures(card: Card) -> dict[int, str]:
    """prompt index -> this variant's picture of it, relative to the record."""
    variant = next(v for v in card.record.variants if v.policy == card.policy)
    return {request.prompt: request.picture for request in reversed(variant.requests)}


def render_card(card: Card) -> str:
    """README.md: Hub metadata, then the sections."""
    sections = [
        f"---\n{metadata(card).to_yaml()}\n---",
        f"# {card.name}",
        _introduction(card),
        "## Quick start\n\n" + _quick_start(card),
        f"## Benchmark: every policy at {_workload(card.record)}\n\n" + _benchmark(card),
        "## Image comparisons\n\n" + _comparisons(card),
        "## Benchmark parameters\n\n" + parameter_table(card.record),
        "## Calibration\n\n" + _calibration(card),
        f"## All {len(card.family)} repositories of this family\n\n" + _family(card),
        "## License and attribution\n\n" + _attribution(card),
    ]
    return "\n\n".join(sections) + "\n"


def metadata(card: Card) -> ModelCardData:
    """The Hub's YAML. `base_model_relation` puts the card under Quantizations in the model tree."""
    return ModelCardData(
        base_model=card.base_model,
        base_model_relation="quantized",
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        language=["en"] if card.record.is_test_model else ["en", "zh"],
        tags=["fp8", "e4m3", "quantized", "modelopt", "z-image", "zimage-fp8", "vllm-omni"],
        inference=False,
        widget=[
            {"text": prompt, "output": {"url": f"images/prompt{index}.png"}}
            for index, prompt in enumerate(card.record.parameters.prompts)
        ],
        model_name=card.name,
        eval_results=_results(card),
    )


def _results(card: Card) -> list[EvalResult]:
    """PSNR and SSIM for the Hub's model-index; identical pictures have no finite PSNR to state."""
    values = {
        ("psnr", "PSNR vs BF16 (dB)"): card.row.psnr_db,
        ("ssim", "SSIM vs BF16"): card.row.ssim,
    }
    prompts = len(card.record.parameters.prompts)
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="bf16-reference",
            dataset_name=f"{prompts} prompts at {_workload(card.record)}, against BF16",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (metric, name), value in values.items()
        if value is not None and value != float("inf")
    ]


def base_name(record: Record) -> str:
    return record.model if record.is_test_model else UPSTREAM.partition("/")[2]


def _workload(record: Record) -> str:
    parameters = record.parameters
    size = f"{parameters.width}×{parameters.height}"
    return f"{parameters.steps} steps, {size}, on {hardware(record)}"


def _introduction(card: Card) -> str:
    record, row = card.record, card.row
    reference, best = rows(record)[0], next(r for r in rows(record) if r.is_best)
    paragraphs = [
        f"{row.summary} Weights and activations are E4M3 with per-tensor static scales. "
        f"Quantized layers: {_quantized_layers(card)}.",
        f"**Best overall choice in this benchmark: `{best.policy}`** ({_numbers(record, best)}). "
        + _how_to_get(best.policy, record),
        f"**This variant (`{row.policy}`)**: {_numbers(record, row)}; image quality "
        f"PSNR {_db(row)} / SSIM {row.ssim:.4f} against the BF16 reference at identical "
        f"(prompt, seed). BF16 itself: {reference.latency_s:.3f} s/image, "
        f"{reference.memory_gib:.2f} GiB.",
        f"It is one of {len(card.family)} FP8 policies of {card.base_model}. They differ only in "
        "which linear layers of the transformer are quantized; everything else stays BF16, and "
        "all share the scales of one calibration.",
    ]
    if record.is_test_model:
        paragraphs.insert(0, TOY_WARNING.format(model=record.model))
    return "\n\n".join(paragraphs)


def _quantized_layers(card: Card) -> str:
    """The globs of the policy's rules, as the checkpoint itself states them."""
    rules = card.facts.get("rules")
    assert isinstance(rules, list)
    return ", ".join(f"`{rule['layers']}`" for rule in rules if rule["spec"])


TOY_WARNING = (
    "> **A test model, not an image model.** `{model}` is a tiny network of Z-Image's structure, "
    "made so that quantizing, serving and measuring can be tried on a laptop. Its decibels and "
    "seconds are not Z-Image-Turbo's."
)


def _numbers(record: Record, row: Row) -> str:
    """Latency and memory of a row; the changes are left out where the row is their base."""
    latency = f"{row.latency_s:.3f} s/image"
    memory = f"{row.memory_gib:.2f} GiB {MEMORY_METHODS[record.memory_method].short}"
    if row.policy == REFERENCE:
        return f"{latency}, {memory}"
    return (
        f"{latency}, {row.latency_change:+.1%} vs BF16; {memory}, "
        f"{abs(row.memory_saving):.1%} {'less' if row.memory_saving >= 0 else 'more'} than BF16"
    )


def _db(row: Row) -> str:
    text = db_text(row.psnr_db)
    return text if text == "identical" else f"{text} dB"


def _how_to_get(policy: str, record: Record) -> str:
    if policy in STATIC_POLICIES:
        return "The repositories of the family are listed below."
    source = record.model if record.is_test_model else UPSTREAM
    return (
        f"It needs no separate download: `zimage-fp8 serve {source} --policy {policy}`. The "
        "checkpoints of this family are for static scales, calibrated once and frozen on disk."
    )


def _quick_start(card: Card) -> str:
    parameters = card.record.parameters
    return QUICK_START.format(
        repository=card.repository,
        port=PORT,
        prompt=_in_single_quotes(json.dumps(parameters.prompts[0], ensure_ascii=False)),
        size=parameters.size,
        steps=parameters.steps,
        guidance=parameters.guidance,
    )


def _in_single_quotes(text: str) -> str:
    """Text for the inside of a shell's '…', which cannot hold a quote itself."""
    return text.replace("'", "'\\''")


QUICK_START = """\
```bash
pip install zimage-fp8
zimage-fp8 serve {repository} --port {port}
```

Or with vLLM-Omni 0.26 or newer, which finds the quantization in `transformer/config.json` by
itself (0.20 took it as `--quantization-config`, since 0.22 the option is
`--diffusion-quantization-config`; the benchmark below did not run vLLM-Omni):

```bash
docker run --rm --gpus all --ipc=host \\
  -p {port}:8002 \\
  -e HF_HOME=/hf_cache \\
  -e DIFFUSION_ATTENTION_BACKEND=TORCH_SDPA \\
  -v /your/hf/cache:/hf_cache \\
  your-vllm-omni:0.26 \\
    vllm-omni serve {repository} \\
    --omni --host 0.0.0.0 --port 8002 \\
    --tensor-parallel-size 1
```

Then call the OpenAI-style image API. With vLLM-Omni always send `num_inference_steps` and
`guidance_scale`: left out they become 50 and 1.0, which is guidance on and twice the work.

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
    legend = "👈 marks this repository."
    listed = "\n".join(f"- {note}" for note in (legend, *notes(card.record)))
    return f"{marked_table(card.record, here=card.policy)}\n\n{listed}"


def _comparisons(card: Card) -> str:
    prompts = card.record.parameters.prompts
    shown = [
        f"**Prompt {index}**: {prompt}\n\n"
        f"[![comparison {index}](images/comparison-prompt{index}.png)]"
        f"(images/comparison-prompt{index}.png)"
        for index, prompt in enumerate(prompts)
    ]
    lead = f"The same {len(prompts)} prompts drawn by every variant from identical seeds."
    return "\n\n".join([lead, *shown])


def _calibration(card: Card) -> str:
    calibration = card.facts.get("calibration")
    if not isinstance(calibration, dict):
        return "The activation scales are computed per token at run time; nothing is calibrated."
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in calibration["sigmas"])
    return (
        f"{calibration['prompts']} prompts × {calibration['forwards']} forwards of the real "
        f"denoise loop at {calibration['size']}, {calibration['dtype']}, seeds from "
        f"{calibration['seed']}. Sigmas: {sigmas}. A scale is the largest magnitude seen divided "
        f"by 448. Digest of the calibration: `{card.facts.get('calibration_digest')}`."
    )


def _family(card: Card) -> str:
    return "\n".join(
        f"- `{card.repository_of(policy)}`" + (" ← you are here" if policy == card.policy else "")
        for policy in card.family
    )


def _attribution(card: Card) -> str:
    record = card.record
    quantized_by = f"zimage-fp8 {card.facts.get('version')}, in NVIDIA ModelOpt's FP8 format"
    origin = (
        TOY_ORIGIN if record.is_test_model else f"Apache 2.0, inherited from upstream {UPSTREAM}."
    )
    return "\n".join(
        f"- {line}"
        for line in (
            origin,
            f"Quantization: {quantized_by}.",
            f"Serving and measurement: zimage-fp8 {record.versions.get('zimage-fp8')}.",
            f"Benchmarked on {hardware(record)}, {record.created[:10]}.",
        )
    )


TOY_ORIGIN = (
    "Apache 2.0. Trained on Fluent Emoji 3D pictures (Microsoft, MIT) with labels from "
    "emojibase-data (MIT)."
)
