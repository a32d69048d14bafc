"""From a model's name to a pipeline that runs under a policy, calibrating when it must."""

import json
from pathlib import Path

import torch

from zimage_fp8.checkpoint.dialects import CONFIG_KEY
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.layout import read_config
from zimage_fp8.model.calibration import CalibrationSettings, OnForward, run_calibration
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import display_name, find_model
from zimage_fp8.model.text import TextEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.policy import Policy, find_policy

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
    if chosen and chosen.is_static and calibration is None and not is_quantized(folder):
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
    if is_quantized(folder):
        return
    with ShardReader(folder / "transformer") as reader:
        if reader.fingerprint() != calibration.fingerprint:
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
    return Pipeline(
        display_name(model),
        loaded.model,
        TextEncoder(folder, DTYPES[dtype], device),
        Decoder(folder, DTYPES[dtype], device),
        plan=loaded.plan,
        shift=read_shift(folder),
        stored=loaded.stored,
    )


def read_shift(folder: Path) -> float:
    """The shift of the FlowMatch Euler schedule. Raises ModelError for other schedulers."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if raw.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"{path}: {raw.get('_class_name')} is not supported, FlowMatch Euler is")
    if raw.get("use_dynamic_shifting"):
        raise ModelError(f"{path}: use_dynamic_shifting is not supported; Turbo's shift is fixed")
    return float(raw.get("shift", 1.0))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: expected cpu, cuda or cuda:N", param="device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device cuda: this machine or this PyTorch has no CUDA",
            param="device",
            hint="zimage-fp8 doctor says why",
        )
    return device
