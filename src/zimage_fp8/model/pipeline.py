"""From a prompt to pixels: encode, draw noise, denoise, decode."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from zimage_fp8.errors import OutOfMemory, UsageError, ZImageError
from zimage_fp8.layout import PATCH
from zimage_fp8.model.denoiser import Denoiser, PlainDenoiser
from zimage_fp8.model.inpainting import blend, inside
from zimage_fp8.model.sampling import (
    OnStep,
    Velocity,
    add_noise,
    denoise,
    draw_latent,
    guide,
    last_part,
    schedule,
    steps_to_walk,
    transformer_time,
)
from zimage_fp8.model.text import PromptEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.z_image import ZImageTransformer, pad_captions
from zimage_fp8.provenance import commit, versions
from zimage_fp8.quant.policy import Plan

SIZE_MULTIPLE = 16  # the VAE's factor 8 times the transformer's patch of 2
MAX_STEPS = 200
MAX_GUIDANCE = 20.0
STAGE_MARK = "end of stage: "  # what a profiler's timeline shows where a stage ends


@dataclass(frozen=True)
class ImageRequest:
    """One picture. `steps` are denoise steps; `guidance` 0 is off; one seed is one latent.

    source: uint8 [height, width, 3], a picture to start from; then only the last `strength` (above
    0, to 1) of the steps are run. mask: bool [height, width], true where the source is drawn anew;
    elsewhere its pixels stay.
    """

    prompt: str
    width: int
    height: int
    negative_prompt: str = ""
    steps: int = 8
    guidance: float = 0.0
    seed: int = 0
    strength: float = 1.0
    source: np.ndarray | None = field(default=None, compare=False, repr=False)
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def steps_to_run(self) -> int:
        """`steps`, without those that `strength` leaves out."""
        return steps_to_walk(self.steps, self.strength)


@dataclass(frozen=True)
class GeneratedImage:
    """pixels: uint8 [height, width, 3]. nfe: DiT forwards. timings_s: encode, denoise, decode."""

    pixels: np.ndarray
    request: ImageRequest
    sigmas: tuple[float, ...]
    nfe: int
    timings_s: dict[str, float]


@dataclass(frozen=True)
class Previews:
    """Pictures of the model's running guess: `show(pixels)` is called once in each step of `steps`.

    steps count from 1. pixels: uint8 [height, width, 3] of `latent − sigma · velocity`, which is
    where the current step points to. `show` may raise to cancel.
    """

    steps: frozenset[int]
    show: Callable[[np.ndarray], None]


def check_values(request: ImageRequest) -> None:
    """Raise UsageError, naming the field, for what no model could draw."""
    if not request.prompt.strip():
        raise UsageError("the prompt is empty; describe a picture", param="prompt")
    for text, param in ((request.prompt, "prompt"), (request.negative_prompt, "negative_prompt")):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"the {param} is not valid Unicode", param=param)
    _check_size(request.width, request.height)
    if not 1 <= request.steps <= MAX_STEPS:
        raise UsageError(
            f"steps is {request.steps}, expected 1 to {MAX_STEPS}; Turbo is made for 8",
            param="steps",
        )
    if not 0 <= request.guidance <= MAX_GUIDANCE:
        raise UsageError(
            f"guidance is {request.guidance}, expected 0 (off) to {MAX_GUIDANCE:g}",
            param="guidance",
        )
    if not 0 <= request.seed < 2**63:
        raise UsageError(f"seed is {request.seed}, expected 0 to 2^63 - 1", param="seed")
    _check_source(request)


def _check_source(request: ImageRequest) -> None:
    if not 0 < request.strength <= 1:
        raise UsageError(
            f"strength is {request.strength:g}, expected above 0 (keep the picture) to 1 (draw "
            "it anew)",
            param="strength",
        )
    if request.source is None and (request.strength != 1 or request.mask is not None):
        param = "mask" if request.mask is not None else "strength"
        raise UsageError(f"{param} has no meaning without a picture to start from", param=param)
    for array, param in ((request.source, "image"), (request.mask, "mask")):
        if array is not None and array.shape[:2] != (request.height, request.width):
            found = "x".join(map(str, array.shape[1::-1]))
            raise UsageError(
                f"the {param} is {found}, not {request.width}x{request.height}", param=param
            )


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UsageError(f"size {width}x{height}: both sides must be positive", param="size")
    if width % SIZE_MULTIPLE or height % SIZE_MULTIPLE:
        nearest = (max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in (width, height))
        raise UsageError(
            f"size {width}x{height}: both sides must be multiples of {SIZE_MULTIPLE}; "
            f"the nearest is {'x'.join(map(str, nearest))}",
            param="size",
        )


class Pipeline:
    """A loaded model. Not thread-safe: one thread draws."""

    def __init__(
        self,
        model: str,
        transformer: ZImageTransformer,
        text: PromptEncoder,
        decoder: Decoder,
        *,
        plan: Plan,
        shift: float,
        calibration_digest: object = None,
        denoiser: Denoiser | None = None,
    ) -> None:
        self.model = model
        self.transformer = transformer
        self.denoiser = denoiser or PlainDenoiser(transformer)
        self.text = text
        self.decoder = decoder
        self.plan = plan
        self.shift = shift
        self.calibration_digest = calibration_digest
        self.forwards = 0  # of the transformer, ever: counted, so that nfe is not a formula
        self.captions = CaptionCache()
        self.dtype = transformer.x_pad_token.dtype
        self.device = transformer.x_pad_token.device
        sample = int(getattr(decoder.vae.config, "sample_size", 1024))
        self.default_size = (sample, sample)

    @property
    def policy(self) -> str:
        return self.plan.policy

    def validate(self, request: ImageRequest) -> None:
        """Raise UsageError, naming the field, when the request cannot be drawn."""
        check_values(request)
        self.text.tokens(request.prompt)
        self.text.tokens(request.negative_prompt)
        _, rows, columns = self.transformer.config.axes_lens
        limit = min(rows, columns) * 8 * PATCH
        if max(request.width, request.height) > limit:
            size = f"{request.width}x{request.height}"
            raise UsageError(f"size {size}: this model draws at most {limit} a side", param="size")

    def num_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, chat template included. Raises UsageError when it is too long."""
        return len(self.text.tokens(prompt))

    def generate(
        self,
        request: ImageRequest,
        on_step: OnStep | None = None,
        previews: Previews | None = None,
    ) -> GeneratedImage:
        """Draw one picture. `on_step(done, total)` runs after every step and may raise to cancel.

        Previews cost one decoding each, timed as the stage `preview`; the picture is the same.
        Raises UsageError for a request that cannot be drawn, OutOfMemory when the device has not
        enough left (the next picture may be drawn), ZImageError when the numbers are not finite.
        """
        self.validate(request)
        try:
            return self._generate(request, on_step, previews)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Outside the handler, whose traceback keeps every tensor of the attempt alive.
        raise self._out_of_memory(request, reason)

    @torch.inference_mode()
    def _generate(
        self, request: ImageRequest, on_step: OnStep | None, previews: Previews | None
    ) -> GeneratedImage:
        clock, before = _Clock(self.device), self.forwards
        velocity = self.velocity(request)
        clock.lap("encode")
        if previews:
            velocity = self._previewed(velocity, previews, clock)
        sigmas = last_part(schedule(request.steps, self.shift), request.strength)
        noise = latent = self.draw_latent(request)
        if request.source is not None:
            start = self.decoder.encode(request.source)
            latent = add_noise(start, noise, sigmas[0])
            if request.mask is not None:
                velocity = inside(self._mask(request.mask), velocity, noise - start)
            clock.lap("encode")
        latent = denoise(velocity, latent, sigmas, on_step)
        clock.lap("denoise")
        if not latent.isfinite().all():
            raise ZImageError(
                f"the latent is not finite under policy {self.policy!r}; no picture was drawn",
                hint="run zimage-fp8 verify on the checkpoint, or try --dtype float32",
            )
        pixels = self.decoder.decode(latent)
        if request.source is not None and request.mask is not None:
            pixels = blend(request.source, pixels, request.mask)
        clock.lap("decode")
        return GeneratedImage(pixels, request, sigmas, self.forwards - before, clock.laps)

    def _out_of_memory(self, request: ImageRequest, reason: str) -> OutOfMemory:
        self.denoiser.release()
        self.captions.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = f"{_halved(request.width)}x{_halved(request.height)}"
        return OutOfMemory(
            f"{request.width}x{request.height} does not fit into the memory of "
            f"{_device_name(self.device)}: {reason.partition('. ')[0]}",
            hint=f"try {smaller}, a policy with fewer BF16 layers, --text-encoder fp8, or "
            "--offload text-encoder",
        )

    def _previewed(self, velocity: Velocity, previews: Previews, clock: "_Clock") -> Velocity:
        steps = count(1)

        def previewed(latent: Tensor, sigma: float) -> Tensor:
            direction = velocity(latent, sigma)
            if next(steps) in previews.steps:
                clock.lap("denoise")
                previews.show(self.decoder.decode(latent - sigma * direction))
                clock.lap("preview")
            return direction

        return previewed

    def _mask(self, mask: np.ndarray) -> Tensor:
        """bool [height, width] -> [1, 1, height/8, width/8]: true where any pixel is."""
        height, width = mask.shape
        cells = mask.reshape(height // 8, 8, width // 8, 8).any(axis=(1, 3))
        return torch.from_numpy(cells).to(self.device)[None, None]

    def draw_latent(self, request: ImageRequest) -> Tensor:
        channels = self.transformer.config.in_channels
        latent = draw_latent(request.seed, channels, request.height, request.width)
        return latent.to(self.device)

    @torch.inference_mode()
    def velocity(self, request: ImageRequest) -> Velocity:
        """The velocity field of a prompt: captions are encoded and refined once, here.

        Positive and negative captions may lie in different 32-token buckets, so each has its own
        forward.
        """
        positive = self._refine(request.prompt)
        if not request.guidance:
            return lambda latent, sigma: -self._forward(latent, sigma, positive)
        negative = self._refine(request.negative_prompt)

        def guided(latent: Tensor, sigma: float) -> Tensor:
            with_prompt = self._forward(latent, sigma, positive)
            without = self._forward(latent, sigma, negative)
            return -guide(with_prompt, without, request.guidance)

        return guided

    def _refine(self, prompt: str) -> Tensor:
        """The refined caption, kept for the next picture of the same prompt."""
        if (kept := self.captions.get(prompt)) is not None:
            return kept
        refined = self.denoiser.refine_caption(*pad_captions([self.text.encode(prompt)]))
        self.captions.put(prompt, refined)
        return refined

    def _forward(self, latent: Tensor, sigma: float, caption: Tensor) -> Tensor:
        self.forwards += 1
        return self.denoiser.forward(latent, transformer_time(sigma), caption)

    def describe(self) -> dict[str, object]:
        """What runs, for logs, records and pictures."""
        return {
            "model": self.model,
            "policy": self.policy,
            "quantized_linears": len(self.plan.quantized),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": _device_name(self.device),
            **self.denoiser.describe(),
            "text_encoder": self.text.describe(),
            "calibration": self.calibration_digest,
            "versions": versions(),
            "commit": commit(),
        }


class CaptionCache:
    """Refined captions by prompt, the least recently used forgotten first.

    At full size one takes 0.5 MB for 64 tokens, 4 MB for the longest prompt.
    """

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = capacity
        self.hits = self.misses = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, prompt: str) -> Tensor | None:
        if prompt in self._kept:
            self.hits += 1
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        self.misses += 1
        return None

    def put(self, prompt: str, caption: Tensor) -> None:
        self._kept[prompt] = caption
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()


@dataclass
class _Clock:
    """Wall time per stage, summed over its laps, with the device's queue drained at every lap."""

    device: torch.device
    laps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        with record_function(STAGE_MARK + stage):
            self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _halved(side: int) -> int:
    return max(SIZE_MULTIPLE, side // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
