"""From a prompt to pixels: encode, draw noise, denoise, decode."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from zimage_fp8.errors import OutOfMemory, UsageError, ZImageError
from zimage_fp8.layout import PATCH
from zimage_fp8.model.denoiser import Denoiser, PlainDenoiser
from zimage_fp8.model.drawing import Clock, Conditions, Drawing
from zimage_fp8.model.inpainting import Kept, blend
from zimage_fp8.model.request import SIZE_MULTIPLE, GeneratedImage, ImageRequest, check_values
from zimage_fp8.model.sampling import (
    OnStep,
    Velocity,
    add_noise,
    draw_latent,
    last_part,
    schedule,
    transformer_time,
)
from zimage_fp8.model.text import PromptEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.z_image import TOKEN_MULTIPLE, ZImageTransformer, pad_captions
from zimage_fp8.provenance import commit, versions
from zimage_fp8.quant.policy import Plan

T = TypeVar("T")


class Forward(NamedTuple):
    """What the transformer is asked. place: the caption's among those of its drawing."""

    latent: Tensor
    sigma: float
    caption: Tensor
    place: int


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

    def generate(self, request: ImageRequest, on_step: OnStep | None = None) -> GeneratedImage:
        """Draw one picture. `on_step(done, total)` runs after every step and may raise to cancel.

        Raises UsageError for a request that cannot be drawn, OutOfMemory when the device has not
        enough left (the next picture may be drawn), ZImageError when the numbers are not finite.
        """
        drawing = self.begin(request)
        while not drawing.is_done:
            self.step([drawing])
            if on_step is not None:
                on_step(drawing.done, drawing.total)
        return self.finish(drawing)

    def begin(self, request: ImageRequest) -> Drawing:
        """Encode what `request` is drawn by, and stand before its first step.

        Raises what `generate` does.
        """
        self.validate(request)
        return self._in_memory(request, lambda: self._begin(request))

    def step(self, drawings: Sequence[Drawing]) -> None:
        """Every drawing by one step, those of one `shape` with the same forward.

        On an exception no drawing has moved. Raises OutOfMemory.
        """
        self._in_memory(drawings[0].request, lambda: self._step(drawings))

    def preview(self, drawing: Drawing) -> np.ndarray:
        """uint8 [height, width, 3]: what the last step pointed to. The drawing stays as it is."""
        return self._in_memory(drawing.request, lambda: self._preview(drawing))

    def finish(self, drawing: Drawing) -> GeneratedImage:
        """The picture, after the last step. Raises OutOfMemory and ZImageError as `generate`."""
        return self._in_memory(drawing.request, lambda: self._finish(drawing))

    @torch.inference_mode()
    def _begin(self, request: ImageRequest) -> Drawing:
        clock = Clock(self.device)
        conditions = self._conditions(request)
        sigmas = last_part(schedule(request.steps, self.shift), request.strength)
        noise = latent = self.draw_latent(request)
        kept = None
        if request.source is not None:
            start = self.decoder.encode(request.source)
            latent = add_noise(start, noise, sigmas[0])
            if request.mask is not None:
                kept = Kept(self._mask(request.mask), noise - start)
        clock.lap("encode")
        return Drawing(request, sigmas, conditions, latent, clock, kept)

    @torch.inference_mode()
    def _step(self, drawings: Sequence[Drawing]) -> None:
        wanted = [
            Forward(drawing.latent, drawing.sigma, caption, place)
            for drawing in drawings
            for place, caption in enumerate(drawing.conditions.captions)
        ]
        ran = iter(self._run(wanted))
        for drawing in drawings:
            outputs, companies = zip(*(next(ran) for _ in drawing.conditions.captions), strict=True)
            drawing.advance(outputs, max(companies))

    @torch.inference_mode()
    def _preview(self, drawing: Drawing) -> np.ndarray:
        drawing.clock.lap("denoise")
        pixels = self.decoder.decode(drawing.guess)
        drawing.clock.lap("preview")
        return pixels

    @torch.inference_mode()
    def _finish(self, drawing: Drawing) -> GeneratedImage:
        request, latent = drawing.request, drawing.latent
        drawing.clock.lap("denoise")
        if not latent.isfinite().all():
            raise ZImageError(
                f"the latent is not finite under policy {self.policy!r}; no picture was drawn",
                hint="run zimage-fp8 verify on the checkpoint, or try --dtype float32",
            )
        pixels = self.decoder.decode(latent)
        if request.source is not None and request.mask is not None:
            pixels = blend(request.source, pixels, request.mask)
        drawing.clock.lap("decode")
        laps = drawing.clock.laps
        return GeneratedImage(pixels, request, drawing.sigmas, drawing.nfe, laps, drawing.company)

    def _in_memory(self, request: ImageRequest, attempt: Callable[[], T]) -> T:
        """What `attempt` returns; when it finds no memory, everything that can be is given back."""
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Outside the handler, whose traceback keeps every tensor of the attempt alive.
        raise self._out_of_memory(request, reason)

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

    def _mask(self, mask: np.ndarray) -> Tensor:
        """bool [height, width] -> [1, 1, height/8, width/8]: true where any pixel is."""
        height, width = mask.shape
        cells = mask.reshape(height // 8, 8, width // 8, 8).any(axis=(1, 3))
        return torch.from_numpy(cells).to(self.device)[None, None]

    def draw_latent(self, request: ImageRequest) -> Tensor:
        channels = self.transformer.config.in_channels
        latent = draw_latent(request.seed, channels, request.height, request.width)
        return latent.to(self.device)

    def shape(self, request: ImageRequest) -> Hashable:
        """Drawings of equal shape can share forwards: the size, and captions of equal buckets."""
        prompts = (
            [request.prompt, request.negative_prompt] if request.guidance else [request.prompt]
        )
        buckets = (-(-self.num_tokens(prompt) // TOKEN_MULTIPLE) for prompt in prompts)
        return (request.width, request.height, *buckets)

    @torch.inference_mode()
    def velocity(self, request: ImageRequest) -> Velocity:
        """The velocity field of a prompt: captions are encoded and refined once, here."""
        led = self._conditions(request)

        def velocity(latent: Tensor, sigma: float) -> Tensor:
            wanted = [Forward(latent, sigma, each, n) for n, each in enumerate(led.captions)]
            return led.velocity([output for output, _ in self._run(wanted)])

        return velocity

    def _conditions(self, request: ImageRequest) -> Conditions:
        positive = self._refine(request.prompt)
        if not request.guidance:
            return Conditions(positive)
        return Conditions(positive, self._refine(request.negative_prompt), request.guidance)

    def _refine(self, prompt: str) -> Tensor:
        """The refined caption, kept for the next picture of the same prompt."""
        if (kept := self.captions.get(prompt)) is not None:
            return kept
        refined = self.denoiser.refine_caption(*pad_captions([self.text.encode(prompt)]))
        self.captions.put(prompt, refined)
        return refined

    def _run(self, wanted: Sequence[Forward]) -> list[tuple[Tensor, int]]:
        """Each forward's output, and how many ran as one with it.

        Those of one latent shape and one caption length do: caption buckets must never share a
        batch, because only the padding inside a bucket is meant to be attended. The two captions of
        one drawing do not, so that guidance takes time and no memory.
        """
        groups: dict[Hashable, list[int]] = {}
        for index, (latent, _, caption, place) in enumerate(wanted):
            groups.setdefault((latent.shape, caption.shape, place), []).append(index)
        ran: dict[int, tuple[Tensor, int]] = {}
        for members in groups.values():
            latents, sigmas, captions, _ = zip(*(wanted[index] for index in members), strict=True)
            times = [transformer_time(sigma) for sigma in sigmas]
            output = self.denoiser.forward(_batch(latents), _batch(times), _batch(captions))
            for index, part in zip(members, output.chunk(len(members)), strict=True):
                ran[index] = part, len(members)
        return [ran[index] for index in range(len(wanted))]

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


def _halved(side: int) -> int:
    return max(SIZE_MULTIPLE, side // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
