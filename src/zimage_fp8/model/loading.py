"""From a model's name to a pipeline that runs under a policy, calibrating when it must."""

import gc
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from zimage_fp8.checkpoint.dialects import CONFIG_KEY
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ModelError, UsageError, ZImageError
from zimage_fp8.layout import linear_shapes, read_config, read_object
from zimage_fp8.model.calibration import CalibrationSettings, OnForward, run_calibration
from zimage_fp8.model.denoiser import Denoiser, PlainDenoiser
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import display_name, find_model
from zimage_fp8.model.text import PromptEncoder, TextEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.policy import PRESETS, Policy, find_policy, resolve

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """How the three models are opened and run; the defaults are the plain ones."""

    text: Callable[[Path, torch.dtype, torch.device], PromptEncoder] = TextEncoder
    decoder: Callable[[Path, torch.dtype, torch.device], Decoder] = Decoder
    denoiser: Callable[[ZImageTransformer], Denoiser] = PlainDenoiser


PLAIN = Parts()


class Opened(Protocol):
    """What a transformer draws with, opened before: a `Pipeline` has it, and `Companions` are."""

    @property
    def text(self) -> PromptEncoder: ...

    @property
    def decoder(self) -> Decoder: ...


@dataclass(frozen=True)
class Companions:
    text: PromptEncoder
    decoder: Decoder


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_pipeline(
    model: str,
    *,
    policy: str | None = None,
    calibration: Calibration | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    on_calibration: OnForward | None = None,
    share: Opened | None = None,
    parts: Parts = PLAIN,
) -> Pipeline:
    """Load `nano`, a local folder or a Hub id, under a policy.

    A policy that needs it is calibrated first on an unquantized model, with the default settings,
    unless `calibration` is given; `on_calibration(done, total)` reports every forward. device: as
    PyTorch names it; by default CUDA where there is one. share: the text encoder and VAE, which
    must be the same, to use instead of loading them again. parts: what runs them
    (`engine.load_pipeline` chooses the fast ones). Raises UsageError, ModelError or
    CheckpointError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}", param="dtype")
    chosen = find_policy(policy) if policy else None
    folder, where = find_model(model), find_device(device)
    must_calibrate = bool(chosen and chosen.needs_calibration and not is_quantized(folder))
    if calibration is not None and not must_calibrate:
        raise UsageError(
            "a calibration has no effect here: it serves static policies and int8-rot on a "
            "BF16 model",
            param="calibration",
        )
    if must_calibrate and calibration is None:
        calibration, share = calibrate(
            model, DTYPES[dtype], where, share=share, parts=parts, on_calibration=on_calibration
        )
    if calibration is not None:
        check_calibration(calibration, folder)
    return _assemble(model, folder, chosen, calibration, DTYPES[dtype], where, share, parts)


def calibrate(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    share: Opened | None = None,
    parts: Parts = PLAIN,
    on_calibration: OnForward | None = None,
) -> tuple[Calibration, Opened]:
    """Calibrate a BF16 model with the default settings, on its plain transformer, whose memory is
    given back.

    Returns also the text encoder and VAE that drew, for the model that follows: a second text
    encoder would lie beside the first, which graphs hold.
    """
    folder, observed = find_model(model), replace(parts, denoiser=PlainDenoiser)
    base = _assemble(model, folder, None, None, dtype, device, share, observed)
    settings = CalibrationSettings.default(folder, base.default_size)
    calibration = run_calibration(base, folder, settings, on_calibration)
    opened = Companions(base.text, base.decoder)
    del base
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return calibration, opened


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
    dtype: torch.dtype,
    device: torch.device,
    share: Opened | None,
    parts: Parts,
) -> Pipeline:
    shift = read_shift(folder)
    where = (folder, dtype, device)
    # The decoder first: on a GPU it rehearses while the others are read.
    decoder = share.decoder if share else _opened("VAE", lambda: parts.decoder(*where))
    # One after the other, so that what the transformer's denoiser frees is the text encoder's: side
    # by side they left holes, 0.26 GiB, for half a second less.
    with _timed("transformer"):
        loaded = load_transformer(
            folder / "transformer",
            policy=policy,
            calibration=calibration,
            dtype=dtype,
            device=device,
        )
        denoiser = parts.denoiser(loaded.model)
    digest = calibration.digest if calibration else None
    return Pipeline(
        display_name(model),
        loaded.model,
        share.text if share else _opened("text encoder", lambda: parts.text(*where)),
        decoder,
        denoiser=denoiser,
        plan=loaded.plan,
        shift=shift,
        calibration_digest=loaded.stored.facts.get("calibration_digest")
        if loaded.stored
        else digest,
    )


def _opened(what: str, load: Callable[[], T]) -> T:
    """What `load` returns; a damaged file becomes one sentence."""
    try:
        with _timed(what):
            return load()
    except ZImageError:
        raise
    except Exception as error:  # three libraries, each with errors of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"the {what} cannot be loaded: {reason}", hint="copy it again") from error


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Log how long a model took to load."""
    began = time.perf_counter()
    yield
    log.info("%s loaded in %.1f s", what, time.perf_counter() - began)


def read_shift(folder: Path) -> float:
    """The shift of the FlowMatch Euler schedule. Raises ModelError for other schedulers."""
    path = folder / "scheduler" / "scheduler_config.json"
    raw = read_object(path)
    if not isinstance(raw.get("shift", 1.0), (int, float)):
        raise ModelError(f"{path}: shift is {raw['shift']!r}, expected a number")
    if raw.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"{path}: {raw.get('_class_name')} is not supported, FlowMatch Euler is")
    if raw.get("use_dynamic_shifting"):
        raise ModelError(f"{path}: use_dynamic_shifting is not supported; Turbo's shift is fixed")
    return float(raw.get("shift", 1.0))


def find_device(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; by default CUDA where there is one. Raises UsageError."""
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
