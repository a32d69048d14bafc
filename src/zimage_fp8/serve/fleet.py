"""Several models behind one server: named, checked to fit, and loaded with what they share."""

import filecmp
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zimage_fp8.engine import EngineOptions, fast_parts
from zimage_fp8.errors import UsageError
from zimage_fp8.model.loading import (
    DTYPES,
    Opened,
    calibrate,
    find_device,
    is_quantized,
    load_pipeline,
)
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.policy import Policy, find_policy
from zimage_fp8.serve.budget import available, check_fits, shared_bytes, transformer_bytes

log = logging.getLogger(__name__)

BETWEEN_POLICIES = re.compile(r",(?![^\[]*\])")  # not the commas of full[0,3]
SHARED = ("text_encoder", "tokenizer", "vae")


@dataclass(frozen=True)
class Variant:
    """One model to serve: a name for requests, what to load, and under which policy."""

    name: str
    model: str
    policy: str | None

    @property
    def folder(self) -> Path:
        return find_model(self.model)

    @property
    def chosen(self) -> Policy | None:
        return find_policy(self.policy) if self.policy else None

    @property
    def must_calibrate(self) -> bool:
        chosen = self.chosen
        return bool(chosen and chosen.needs_calibration and not is_quantized(self.folder))


def name_variants(
    models: Sequence[str], policies: Sequence[str | None], served_name: str | None
) -> list[Variant]:
    """One model under several policies, or several models, each by its own name.

    models: `MODEL` or `NAME=MODEL`. policies: one per model, or several for one model. A single
    variant is called as its model, several policies as they are, several models by the last part of
    their paths. Raises UsageError when names are not unique.
    """
    if len(models) > 1 and len(policies) > 1:
        raise UsageError(
            f"{len(models)} models and {len(policies)} policies: serve several models, or one "
            "under several policies",
            param="policy",
        )
    split = [_name_and_model(model) for model in models]
    several_models, several_policies = len(models) > 1, len(policies) > 1
    if served_name and (several_models or several_policies):
        raise UsageError(
            "--served-model-name names one model; name several as NAME=MODEL",
            param="served_model_name",
        )
    variants = []
    for name, model in split:
        for policy in policies:
            last_part = Path(model).name if several_models else model
            called = str(policy) if several_policies else served_name or name or last_part
            variants.append(Variant(called, model, policy))
    names = [variant.name for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"{', '.join(sorted(twice))} is served twice: give each a name as NAME=MODEL",
            param="model",
        )
    return variants


def split_policies(policies: str | None) -> list[str | None]:
    """`full,fp8-row[0,3],bf16_base` -> three policies; None is the model as it is."""
    if policies is None:
        return [None]
    return [part.strip() for part in BETWEEN_POLICIES.split(policies)]


def _name_and_model(argument: str) -> tuple[str | None, str]:
    name, equals, model = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, argument
    if not name or not model:
        raise UsageError(f"{argument!r}: expected NAME=MODEL", param="model")
    return name, model


def check_memory(
    variants: Sequence[Variant], dtype: str, device: torch.device, share: float | None
) -> dict[str, int]:
    """The bytes of each variant's weights. Raises ZImageError when they cannot all be loaded."""
    of_dtype = DTYPES[dtype]
    sizes = {it.name: transformer_bytes(it.folder, it.chosen, of_dtype) for it in variants}
    parts = dict(sizes)
    for index, variant in enumerate(variants):
        if not any(shares_with(variant.folder, other.folder) for other in variants[:index]):
            what = "text encoder and VAE" if index == 0 else f"those of {variant.name}"
            parts[what] = shared_bytes(variant.folder, of_dtype)
    calibrated = [
        transformer_bytes(it.folder, None, of_dtype) for it in variants if it.must_calibrate
    ]
    if calibrated:
        parts["BF16 while calibrating"] = max(calibrated)
    check_fits(parts, available(device, share))
    return sizes


def load_all(
    variants: Sequence[Variant], dtype: str, device: str | None, options: EngineOptions
) -> Mapping[str, Pipeline]:
    """The pipelines by name. What they have in common is loaded, and calibrated, once."""
    parts = fast_parts(options, find_device(device))
    loaded: dict[str, Pipeline] = {}
    calibrations: dict[Path, Calibration] = {}
    for index, variant in enumerate(variants):
        twin = next((it for it in variants[:index] if shares_with(it.folder, variant.folder)), None)
        share: Opened | None = loaded[twin.name] if twin else None
        calibration = None
        if variant.must_calibrate:
            if variant.folder not in calibrations:
                log.info("calibrating %s", variant.model)
                calibrations[variant.folder], share = calibrate(
                    variant.model, DTYPES[dtype], find_device(device), share=share, parts=parts
                )
            calibration = calibrations[variant.folder]
        loaded[variant.name] = load_pipeline(
            variant.model,
            policy=variant.policy,
            calibration=calibration,
            dtype=dtype,
            device=device,
            share=share,
            parts=parts,
        )
        log.info("loaded %s%s", variant.name, f", sharing with {twin.name}" if twin else "")
    return loaded


def shares_with(folder: Path, other: Path) -> bool:
    """Whether two models have the same text encoder, tokenizer and VAE, file by file.

    Files that are links to the same one, as `quantize` leaves them, are not read.
    """
    if folder == other:
        return True
    return all(_same_files(folder / part, other / part) for part in SHARED)


def _same_files(folder: Path, other: Path) -> bool:
    names = sorted(path.name for path in folder.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(_same_file(folder / name, other / name) for name in names)


def _same_file(path: Path, other: Path) -> bool:
    return path.samefile(other) or filecmp.cmp(path, other, shallow=False)
