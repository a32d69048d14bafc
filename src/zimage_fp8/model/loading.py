"""From a model's name to a pipeline that runs under a policy, calibrating when it must."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from zimage_fp8.checkpoint.dialects import CONFIG_KEY
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ModelError, UsageError, ZImageError
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.calibration import CalibrationSettings, OnForward, run_calibration
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import display_name, find_model
from zimage_fp8.model.text import TextEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.policy import PRESETS, Policy, find_policy, resolve

T = TypeVar("T")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_pipeline(
    model: str,
    *,
    policy: str | None = None,
    calibration: Calibration | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    on_calibration: OnForward | None = None,
) -> Pipeline:
    """Load `nano`, a local folder or a Hub id, under a policy.

    A static policy on an unquantized model is calibrated first with the default settings, unless
    `calibration` is given; `on_calibration(done, total)` then reports every forward. device: as
    PyTorch names it; by default CUDA where there is one. Raises UsageError, ModelError or
    CheckpointError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}", param="dtype")
    chosen = find_policy(policy) if policy else None
    folder, where = find_model(model), _device(device)
    must_calibrate = bool(chosen and chosen.is_static and not is_quantized(folder))
    if calibration is not None and not must_calibrate:
        raise UsageError(
            "a calibration has no effect here: it serves a static policy on a BF16 model",
            param="calibration",
        )
    if must_calibrate and calibration is None:
        base = _assemble(model, folder, None, None, dtype, where)
        settings = CalibrationSettings.default(folder, base.default_size)
        calibration = run_calibration(base, folder, settings, on_calibration)
        del base
    if calibration is not None:
        check_calibration(calibration, folder)
    return _assemble(model, folder, chosen, calibration, dtype, where)


def is_quantized(folder: Path) -> bool:
    """Whether the transformer of a pipeline folder carries a quantization config."""
    _, raw = read_config(folder / "transformer")
    return CONFIG_KEY in raw


def check_calibration(calibration: Calibration, folder: Path) -> None:
    """Raise ModelError when a calibration was measured on other weights than `folder`'s."""
    config, _ = read_config(folder / "transformer")
    needed = set(resolve(PRESETS["full"], linear_shapes(config)).quantized)
    with ShardReader(folder / "transformer") as reader:
        is_same = reader.fingerprint() == calibration.fingerprint
        if not is_same or set(calibration.amax) != needed:
            raise ModelError(
                f"the calibration was measured on another model ({calibration.model}); its weights "
                f"differ from those in {folder}",
                hint="calibrate this model: leave --calibration out",
            )


def _assemble(
    model: str,
    folder: Path,
    policy: Policy | None,
    calibration: Calibration | None,
    dtype: str,
    device: torch.device,
) -> Pipeline:
    loaded = load_transformer(
        folder / "transformer",
        policy=policy,
        calibration=calibration,
        dtype=DTYPES[dtype],
        device=device,
    )
    digest = calibration.digest if calibration else None
    return Pipeline(
        display_name(model),
        loaded.model,
        _opened("text encoder", lambda: TextEncoder(folder, DTYPES[dtype], device)),
        _opened("VAE", lambda: Decoder(folder, DTYPES[dtype], device)),
        plan=loaded.plan,
        shift=read_shift(folder),
        calibration_digest=loaded.stored.facts.get("calibration_digest")
        if loaded.stored
        else digest,
    )


def _opened(what: str, load: Callable[[], T]) -> T:
    """What `load` returns; a damaged file becomes one sentence."""
    try:
        return load()
    except ZImageError:
        raise
    except Exception as error:  # three libraries, each with errors of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"the {what} cannot be loaded: {reason}", hint="copy it again") from error


def read_shift(folder: Path) -> float:
    """The shift of the FlowMatch Euler schedule. Raises ModelError for other schedulers."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("shift", 1.0), (int, float)):
        raise ModelError(f"{path} is not a scheduler's configuration with a number as its shift")
    if raw.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"{path}: {raw.get('_class_name')} is not supported, FlowMatch Euler is")
    if raw.get("use_dynamic_shifting"):
        raise ModelError(f"{path}: use_dynamic_shifting is not supported; Turbo's shift is fixed")
    return float(raw.get("shift", 1.0))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r}: expected cpu, cuda or cuda:N", param="device")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device cuda: this machine or this PyTorch has no CUDA",
            param="device",
            hint="zimage-fp8 doctor says why",
        )
    return device
