"""What quantization does to pictures: the same prompts and latents, drawn twice and compared.

Pairs are what makes small numbers of prompts useful: prompts differ from each other by far more
than two policies do on one prompt. Errors are kept as mean squares, which add up where decibels do
not: what each layer costs by itself predicts what several cost together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles, stdev

import numpy as np
import torch
from torch import Tensor, nn

from zimage_fp8.bench.workload import FIRST_SEED, profile_of
from zimage_fp8.checkpoint.provenance import stored_factors
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import members_of
from zimage_fp8.model.calibration import (
    CalibrationSettings,
    OnForward,
    read_prompts,
    run_calibration,
)
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import ImageRequest, Pipeline
from zimage_fp8.model.sampling import Velocity, denoise, schedule
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.fold import FEEDS, Factors
from zimage_fp8.quant.linear import QuantLinear
from zimage_fp8.quant.policy import Policy

WHITE = 255

Wrap = Callable[[Velocity], Velocity]


@dataclass(frozen=True)
class Drawn:
    """latent: fp32 [1, channels, h, w], where the denoise loop ended; pixels: uint8 [H, W, 3]."""

    latent: Tensor
    pixels: np.ndarray


@dataclass(frozen=True)
class Difference:
    """One picture against its reference.

    mse: mean squared difference of the 8-bit levels. latent_error: ‖difference‖ / ‖reference‖ of
    the latents.
    """

    mse: float
    latent_error: float

    @property
    def psnr_db(self) -> float:
        return psnr_db(self.mse)


@dataclass(frozen=True)
class Quality:
    """Several pictures against their references, in dB of PSNR where not said otherwise.

    ci95: half the width of the 95 % interval of the mean over prompts (normal approximation), NaN
    for a single prompt. pooled: the PSNR of the mean of all squared errors.
    """

    pictures: int
    mean: float
    ci95: float
    median: float
    p10: float
    pooled: float
    latent_error: float


@torch.inference_mode()
def draw(pipeline: Pipeline, request: ImageRequest, wrap: Wrap | None = None) -> Drawn:
    """One picture and its latent; `wrap` may change the velocity field. Raises ZImageError when
    the numbers are not finite."""
    pipeline.validate(request)
    pipeline.captions.clear()  # refined by other modules, perhaps
    velocity = pipeline.velocity(request)
    sigmas = schedule(request.steps, pipeline.shift)
    latent = denoise(wrap(velocity) if wrap else velocity, pipeline.draw_latent(request), sigmas)
    if not latent.isfinite().all():
        raise ZImageError(f"the latent of {request.prompt!r} is not finite, there is no picture")
    return Drawn(latent, pipeline.decoder.decode(latent))


def difference(drawn: Drawn, reference: Drawn) -> Difference:
    """How far a picture is from its reference of the same size."""
    levels = drawn.pixels.astype(np.float64) - reference.pixels.astype(np.float64)
    error = (drawn.latent - reference.latent).double().norm()
    return Difference(float(np.mean(levels**2)), float(error / reference.latent.double().norm()))


def psnr_db(mse: float) -> float:
    """Peak signal to noise ratio of 8-bit levels; infinite for equal pictures."""
    return 10 * math.log10(WHITE**2 / mse) if mse > 0 else math.inf


def summarize(differences: Sequence[Difference]) -> Quality:
    """Raises ValueError when there are none."""
    values = [it.psnr_db for it in differences]
    count = len(values)
    is_spread = count > 1 and all(map(math.isfinite, values))
    return Quality(
        pictures=count,
        mean=fmean(values),
        ci95=1.96 * stdev(values) / math.sqrt(count) if is_spread else math.nan,
        median=median(values),
        p10=quantiles(values, n=10, method="inclusive")[0] if is_spread else min(values),
        pooled=psnr_db(fmean(it.mse for it in differences)),
        latent_error=fmean(it.latent_error for it in differences),
    )


@contextmanager
def exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with these submodules in the places of their names, put back at the end."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        _place(model, modules.items())
        yield
    finally:
        _place(model, originals.items())


def _place(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


@dataclass(frozen=True)
class Workload:
    """Which pictures are drawn; None stands for the benchmark's own prompts and size.

    first_seed: of the first prompt's latent, then counting up.
    """

    prompts: Path | None = None
    limit: int | None = None
    size: tuple[int, int] | None = None
    steps: int = 8
    first_seed: int = FIRST_SEED


def load_requests(folder: Path, workload: Workload) -> list[ImageRequest]:
    """One request per prompt, with the benchmark's seeds, which calibration does not use.

    Raises UsageError for a limit below 1, ZImageError for a file without prompts.
    """
    if workload.limit is not None and workload.limit < 1:
        raise UsageError(f"{workload.limit} prompts: expected at least 1", param="limit")
    profile = profile_of(folder)
    prompts = read_prompts(workload.prompts) if workload.prompts else profile.prompts
    size = workload.size or profile.size
    return [
        ImageRequest(prompt, *size, steps=workload.steps, seed=workload.first_seed + index)
        for index, prompt in enumerate(prompts[: workload.limit])
    ]


@dataclass(frozen=True)
class Subject:
    """A model in full precision, its linear layers under a policy, and the pictures to draw.

    quantized: by the name of the module whose place they take.
    """

    pipeline: Pipeline
    fingerprint: str
    policy: str
    quantized: Mapping[str, nn.Module]
    requests: Sequence[ImageRequest]
    calibration: Calibration | None = None

    def settings(self) -> dict[str, object]:
        """What results depend on."""
        first = self.requests[0]
        return {
            "model": self.pipeline.model,
            "fingerprint": self.fingerprint,
            "policy": self.policy,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
            "size": f"{first.width}x{first.height}",
            "steps": first.steps,
            "prompts": [request.prompt for request in self.requests],
            "seeds": [request.seed for request in self.requests],
        }


def load_subject(
    model: str,
    folder: Path,
    policy: Policy,
    requests: Sequence[ImageRequest],
    *,
    dtype: str = "float32",
    device: str | None = None,
    on_calibration: OnForward | None = None,
) -> Subject:
    """Load `folder`, the BF16 model's, in `dtype`, and once more under `policy`.

    Calibrates with the default settings if the policy needs it. Raises UsageError for a policy
    that quantizes nothing, or a request that the model cannot draw.
    """
    pipeline = load_pipeline(model, dtype=dtype, device=device)
    for request in requests:
        pipeline.validate(request)
    calibration = None
    if policy.needs_calibration:
        settings = CalibrationSettings.default(folder, pipeline.default_size)
        calibration = run_calibration(pipeline, folder, settings, on_calibration)
    quantized = quantized_modules(folder, policy, pipeline, calibration)
    if not quantized:
        raise UsageError(f"policy {policy.name!r} quantizes nothing", param="policy")
    fingerprint = fingerprint_of(folder)
    return Subject(pipeline, fingerprint, policy.name, quantized, requests, calibration)


def load_checkpoint_subject(
    model: str, folder: Path, checkpoint: Path, workload: Workload, *, device: str | None = None
) -> Subject:
    """The BF16 model `model` in `folder`, and the layers that a checkpoint of it holds in 8 bits.

    Raises UsageError when the checkpoint is not quantized, or was made from other weights.
    """
    pipeline = load_pipeline(model, dtype="float32", device=device)
    loaded = load_transformer(
        checkpoint / "transformer",
        policy=None,
        calibration=None,
        dtype=pipeline.dtype,
        device=pipeline.device,
    )
    fingerprint = fingerprint_of(folder)
    if loaded.stored is None:
        raise UsageError(f"{checkpoint} is not quantized")
    if loaded.stored.facts.get("base_fingerprint") not in (None, fingerprint):
        raise UsageError(
            f"{checkpoint} was not made from {model}: the weights' fingerprints differ",
            param="against",
        )
    with ShardReader(folder / "transformer") as original:
        factors = stored_factors(checkpoint, loaded.stored, original)
    quantized = fitting_modules(loaded.model, factors)
    requests = load_requests(folder, workload)
    return Subject(pipeline, fingerprint, loaded.plan.policy, quantized, requests)


def fingerprint_of(folder: Path) -> str:
    """Of a pipeline folder's transformer."""
    with ShardReader(folder / "transformer") as reader:
        return reader.fingerprint()


def quantized_modules(
    folder: Path, policy: Policy, pipeline: Pipeline, calibration: Calibration | None
) -> dict[str, nn.Module]:
    """The quantized modules of a transformer, by name, each fit to take its original's place."""
    loaded = load_transformer(
        folder / "transformer",
        policy=policy,
        calibration=calibration if policy.needs_calibration else None,
        dtype=pipeline.dtype,
        device=pipeline.device,
    )
    return fitting_modules(loaded.model, loaded.factors)


def fitting_modules(model: nn.Module, factors: Factors) -> dict[str, nn.Module]:
    """The quantized modules of `model`, whose channel scales `factors` were folded, such that each
    by itself computes what the same module of the model as it was does."""
    return {
        name: Unfolded(module, *_around(name, module, factors)) if factors else module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


class Unfolded(nn.Module):
    """A layer of a folded model in the place of the same layer of the model as it was.

    Both factors are powers of two, so this changes no bit of what the layer computes. inputs: fp32
    [in], what its input channels are multiplied by; outputs: fp32 [out], what its rows were.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, inner: QuantLinear, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.inputs.to(x.dtype))
        return out / self.outputs.to(x.dtype)


def _around(name: str, module: QuantLinear, factors: Factors) -> tuple[Tensor, Tensor]:
    """What folding did to a module's input channels and to its rows."""
    rows, columns = module.weight.shape
    where = module.weight.device
    inputs = factors.get(name, torch.ones(columns))
    members, outputs = members_of(name), []
    for member in members:
        feed = next((f for f in FEEDS if f"{member}.weight".endswith(f".{f}")), None)
        fed = f"{member}.weight".removesuffix(feed) + FEEDS[feed] if feed else ""
        outputs.append(factors.get(fed, torch.ones(rows // len(members))))
    return inputs.to(where), torch.cat(outputs).to(where)
