"""The README.md of one checkpoint, as text: every number is the record's.

A card has the sections of the seed card, in its order: what this variant quantizes, the best
choice, this variant's numbers, quick start, the table, pictures, parameters, family, licence.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from zimage_fp8.bench.facts import CheckpointFacts
from zimage_fp8.bench.grid import grid_name
from zimage_fp8.bench.record import MEMORY_METHODS, REFERENCE, Record
from zimage_fp8.bench.report import hardware, notes, parameter_table
from zimage_fp8.bench.table import Row, marked_table, psnr_text, rows

UPSTREAM = "Tongyi-MAI/Z-Image-Turbo"
EMBEDDED = "nano"
PORT = 18002


@dataclass(frozen=True)
class Card:
    """Everything one README is made of. `folder` is the checkpoint that it is written into."""

    folder: Path
    facts: CheckpointFacts
    record: Record
    family: Sequence[str]
    namespace: str

    @property
    def policy(self) -> str:
        return self.facts.policy

    @property
    def readme(self) -> Path:
        return self.folder / "README.md"

    @property
    def row(self) -> Row:
        return next(row for row in rows(self.record) if row.policy == self.policy)

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    @property
    def repository(self) -> str:
        return self.repository_of(self.policy)

    def repository_of(self, policy: str) -> str:
        """`full[0-14]` is a policy, but the Hub allows no brackets."""
        base, suffix = self.record.model.rpartition("/")[2], re.sub(r"[^\w.]+", "-", policy)
        return f"{self.namespace}/{base}-FP8-{suffix.strip('-')}"

    @property
    def base_model(self) -> str:
        """As measured; only the embedded model has no home on the Hub but the namespace."""
        is_embedded = self.record.model == EMBEDDED
        return f"{self.namespace}/{EMBEDDED}" if is_embedded else self.record.model


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
        f"## The repositories of this family: {len(card.family)}\n\n" + _family(card),
        "## License and attribution\n\n" + _attribution(card),
    ]
    return "\n\n".join(sections) + "\n"


def metadata(card: Card) -> ModelCardData:
    """The Hub's YAML. `base_model_relation` puts the card under Quantizations in the model tree."""
    return ModelCardData(
        base_model=card.base_model,
        base_model_relation="quantized",
        license="apache-2.0" if card.record.model in ORIGINS else None,
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
    row = card.row
    scope = f", mean of the {row.num_pictures - row.num_identical} pictures that differ"
    values = {
        ("psnr", "PSNR vs BF16 (dB)" + (scope if row.num_identical else "")): row.psnr_db,
        ("ssim", "SSIM vs BF16"): row.ssim,
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


def _workload(record: Record) -> str:
    parameters = record.parameters
    size = f"{parameters.width}×{parameters.height}"
    return f"{parameters.steps} steps, {size}, on {hardware(record)}"


def _introduction(card: Card) -> str:
    record, row = card.record, card.row
    reference, best = rows(record)[0], next(r for r in rows(record) if r.is_best)
    paragraphs = [
        f"{row.summary} {_format(card)} Quantized layers: {_quantized_layers(card)}.",
        f"**Best overall choice in this benchmark: `{best.policy}`** ({_numbers(record, best)}). "
        + _how_to_get(best.policy, card),
        f"**This variant (`{row.policy}`)**: {_numbers(record, row)}; image quality "
        f"PSNR {psnr_text(row, ' dB')} / SSIM {row.ssim:.4f} against the BF16 reference at "
        f"identical (prompt, seed). BF16 itself: {reference.latency_s:.3f} s/image, "
        f"{reference.memory_gib:.2f} GiB.",
        f"It is one of {len(card.family)} FP8 policies of {card.base_model}. {_in_common(card)}",
    ]
    if record.is_test_model:
        paragraphs.insert(0, TOY_WARNING.format(model=record.model))
    return "\n\n".join(paragraphs)


WEIGHT_FORMAT = {
    "per-tensor": "Weights are E4M3 with one scale per matrix.",
    "per-channel": "Weights are E4M3 with one scale per output row.",
}
ACTIVATION_FORMAT = {
    "static-per-tensor": "Activations are E4M3 with one static scale per layer, from calibration.",
    "dynamic-per-token": "Activations are E4M3 with one scale per token, computed at run time.",
}


def _format(card: Card) -> str:
    spec = card.facts.spec
    return f"{WEIGHT_FORMAT[spec.weight]} {ACTIVATION_FORMAT[spec.activation]}"


def _in_common(card: Card) -> str:
    """What the family shares, as far as the servers that were measured said so themselves."""
    measured = {v.policy: v.server.get("calibration") for v in card.record.variants}
    calibrations = {measured[policy] for policy in card.family}
    if len(calibrations) == 1 and None not in calibrations:
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
    latency = f"{row.latency_s:.3f} s/image"
    memory = f"{row.memory_gib:.2f} GiB {MEMORY_METHODS[record.memory_method].short}"
    if row.policy == REFERENCE:
        return f"{latency}, {memory}"
    return (
        f"{latency}, {row.latency_change:+z.1%} vs BF16; {memory}, "
        f"{abs(row.memory_saving):.1%} {'less' if row.memory_saving >= 0 else 'more'} than BF16"
    )


def _how_to_get(policy: str, card: Card) -> str:
    if policy in card.family:
        return "The repositories of the family are listed below."
    command = f"zimage-fp8 serve {card.record.model} --policy {policy}"
    return f"It needs no separate download: `{command}`."


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
        f"[![comparison {index}](images/{grid_name(index)})](images/{grid_name(index)})"
        for index, prompt in enumerate(prompts)
    ]
    lead = f"The same {len(prompts)} prompts drawn by every variant from identical seeds."
    return "\n\n".join([lead, *shown])


def _calibration(card: Card) -> str:
    calibration = card.facts.calibration
    if calibration is None:
        return "The activation scales are computed per token at run time; nothing is calibrated."
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in calibration.sigmas)
    return (
        f"{calibration.prompts} prompts × {calibration.forwards} forwards of the real denoise loop "
        f"at {calibration.size}, {calibration.dtype}, seeds from {calibration.seed}. Sigmas: "
        f"{sigmas}. A scale is the largest magnitude seen divided by 448. Digest of the "
        f"calibration: `{card.facts.calibration_digest}`."
    )


def _family(card: Card) -> str:
    return "\n".join(
        f"- `{card.repository_of(policy)}`" + (" ← you are here" if policy == card.policy else "")
        for policy in card.family
    )


def _attribution(card: Card) -> str:
    record, facts = card.record, card.facts
    return "\n".join(
        f"- {line}"
        for line in (
            ORIGINS.get(record.model, f"The licence is that of {card.base_model}."),
            f"Quantization: zimage-fp8 {facts.version}, in NVIDIA ModelOpt's format "
            f"{facts.algorithm}.",
            f"Serving and measurement: zimage-fp8 {record.versions.get('zimage-fp8')}.",
            f"Benchmarked on {hardware(record)}, {record.created[:10]}.",
        )
    )


# Models whose licence this program knows: Apache 2.0, both of them.
ORIGINS = {
    UPSTREAM: f"Apache 2.0, inherited from upstream {UPSTREAM}.",
    EMBEDDED: "Apache 2.0. Trained on Fluent Emoji 3D pictures (Microsoft, MIT) with labels from "
    "emojibase-data (MIT).",
}
