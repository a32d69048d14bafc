"""What a picture is drawn from, and what comes out; which values no model could draw."""

from dataclasses import dataclass, field

import numpy as np

from zimage_fp8.errors import UsageError
from zimage_fp8.model.sampling import steps_to_walk

SIZE_MULTIPLE = 16  # the VAE's factor 8 times the transformer's patch of 2
MAX_STEPS = 200
MAX_GUIDANCE = 20.0


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
    """pixels: uint8 [height, width, 3]. nfe: DiT forwards. timings_s: encode, denoise, decode.

    company: the most pictures that shared a forward with this one, itself included.
    """

    pixels: np.ndarray
    request: ImageRequest
    sigmas: tuple[float, ...]
    nfe: int
    timings_s: dict[str, float]
    company: int = 1


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
