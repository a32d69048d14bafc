"""The Hub's YAML in front of a card."""

from huggingface_hub import EvalResult, ModelCardData

from zimage_fp8.bench.grid import grid_prompts
from zimage_fp8.card.family import ORIGINS, Card, workload

FORMAT_TAGS = {"e4m3": ("fp8", "e4m3"), "int8": ("int8",)}
TAGS = ("quantized", "z-image", "zimage-fp8")
MODELOPT_TAGS = ("modelopt", "vllm-omni")  # whose format it is, and who else reads it


def metadata(card: Card) -> ModelCardData:
    """The Hub's YAML. `base_model_relation` puts the card under Quantizations in the model tree."""
    return ModelCardData(
        base_model=card.base_model,
        base_model_relation="quantized",
        license="apache-2.0" if card.record.model in ORIGINS else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        language=["en"] if card.record.is_test_model else ["en", "zh"],
        tags=[
            *FORMAT_TAGS[card.facts.spec.format],
            *TAGS,
            *(() if card.is_own_format else MODELOPT_TAGS),
        ],
        inference=False,
        widget=[
            {
                "text": card.record.parameters.prompts[prompt],
                "output": {"url": f"images/prompt{prompt}.png"},
            }
            for prompt in grid_prompts(card.record)
        ],
        model_name=card.name,
        eval_results=_results(card),
    )


def _results(card: Card) -> list[EvalResult]:
    """PSNR and SSIM for the Hub's model-index; identical pictures have no finite PSNR to state."""
    row = card.row
    differing = row.num_pictures - row.num_identical
    scope = f", mean of the {differing} pictures that differ" if row.num_identical else ""
    values = {
        ("psnr", f"PSNR vs BF16 (dB){scope}"): row.psnr_db,
        ("ssim", "SSIM vs BF16"): row.ssim,
    }
    prompts = len(card.record.parameters.prompts)
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="bf16-reference",
            dataset_name=f"{prompts} prompts at {workload(card.record)}, against BF16",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (metric, name), value in values.items()
        if value is not None and value != float("inf")
    ]
