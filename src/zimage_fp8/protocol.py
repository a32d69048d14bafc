"""The OpenAI Images API as it travels between our server, our benchmark and other people's clients.

Only wire types live here, and nothing here needs torch. Requests are parsed once, at the border:
aliases are resolved, and what is not honoured is refused by name or listed by name (`warnings`).
Every failure has OpenAI's one shape: `{"error": {"message", "type", "param", "code"}}`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from zimage_fp8.errors import UsageError

DEFAULT_STEPS = 8
DEFAULT_GUIDANCE = 0.0
MAX_IMAGES = 10
MAX_PROMPT_LENGTH = 32_000  # characters; how many tokens are read is the model's business
MAX_WARNINGS = 20
SHOWN_LENGTH = 60

# The largest integer every JSON client carries exactly; seeds of n images count upwards from it.
MAX_SEED = 2**53 - MAX_IMAGES

# OpenAI's `quality` asks for effort, and effort here is denoise steps. Turbo is made for 8.
QUALITY_STEPS = {
    "auto": DEFAULT_STEPS,
    "standard": DEFAULT_STEPS,
    "low": 4,
    "medium": DEFAULT_STEPS,
    "high": 12,
    "hd": 12,
    "xhigh": 16,
    "max": 24,
}

# Fields whose other values would change the answer's shape or the picture: refused, never ignored.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "response_format": ("b64_json", "url"),
    "output_format": ("png", "webp", "jpeg"),
    "background": ("auto", "opaque"),
    "quality": tuple(QUALITY_STEPS),
}
REFUSED = ("svg", "frame_count", "frame_duration_ms", "markup")

# Of a picture that is edited, so much of the way from noise is walked anew.
DEFAULT_STRENGTH = 0.6

# Values of fields we do not implement that ask for nothing, so that nobody needs a warning.
NEUTRAL = ("auto", 0, False)


class UnsupportedField(UsageError):
    """A field of OpenAI's API that this server does not have."""


class ImagesRequest(BaseModel):
    """The body of POST /v1/images/generations. `null` means: as if the field were absent.

    `steps`, `cfg_scale`, `true_cfg_scale`, `width` and `height` are other programs' names; after
    `parse_images_request` their meaning stands in num_inference_steps, guidance_scale and size.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_LENGTH)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    size: str = "auto"
    quality: str = "auto"
    response_format: str = "b64_json"
    output_format: str = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    background: str = "auto"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT_LENGTH)
    user: str | None = None
    safety_identifier: str | None = None

    steps: int | None = None
    cfg_scale: float | None = None
    true_cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    @property
    def warnings(self) -> list[str]:
        """One sentence per field that was sent, asks for something, and has no effect here."""
        every = list(self._not_honoured())
        if len(every) > MAX_WARNINGS:
            every[MAX_WARNINGS:] = [f"{len(every) - MAX_WARNINGS} more fields were ignored"]
        return every

    def _not_honoured(self) -> Iterator[str]:
        if self.negative_prompt and not self.guidance_scale:
            yield "negative_prompt has no effect while guidance_scale is 0"
        if self.quality not in ("auto", "standard") and self._chooses_steps:
            yield "quality has no effect beside num_inference_steps"
        if self.partial_images and not self.stream:
            yield "partial_images has no effect without stream"
        if self.output_format == "png" and self.output_compression != 100:
            yield "output_compression has no effect on png, which loses nothing"
        for field, value in (self.model_extra or {}).items():
            if value not in NEUTRAL:
                yield f"{_shown(field)} is not supported and was ignored"

    @property
    def _chooses_steps(self) -> bool:
        return not self.model_fields_set.isdisjoint({"num_inference_steps", "steps"})


class ImageReference(BaseModel):
    """A picture inside JSON, as OpenAI's newer body names it. No address is ever fetched."""

    model_config = ConfigDict(extra="forbid")

    image_url: str


class EditsRequest(ImagesRequest):
    """The body of POST /v1/images/edits: one picture, and what to make of it.

    Pictures are data URLs here; in a form they are files. `strength` is how much is drawn anew:
    above 0 to 1, which forgets the picture. `mask` is a picture of the same size, transparent
    where it is to be drawn anew.
    """

    strength: float | None = Field(default=None, gt=0, le=1)
    image: str | list[str] | None = None
    images: list[ImageReference] | None = None
    mask: str | ImageReference | None = None

    def strength_for(self, has_mask: bool) -> float:
        """What was sent, else a default: a masked part is drawn wholly anew."""
        if self.strength is not None:
            return self.strength
        return 1.0 if has_mask else DEFAULT_STRENGTH


AnyRequest = TypeVar("AnyRequest", bound=ImagesRequest)


def parse_images_request(body: bytes) -> ImagesRequest:
    """The request in `body`. Raises UsageError naming the first field that is wrong."""
    return _parsed(lambda: ImagesRequest.model_validate_json(body))


def parse_edits_request(body: bytes | Mapping[str, str]) -> EditsRequest:
    """The request in a JSON `body`, or in the text fields of a form, where empty means absent.

    Raises UsageError naming the first field that is wrong.
    """
    if isinstance(body, bytes):
        return _parsed(lambda: EditsRequest.model_validate_json(body))
    fields = {name: text for name, text in body.items() if text or name == "prompt"}
    return _parsed(lambda: EditsRequest.model_validate(fields))


def _parsed(validate: Callable[[], AnyRequest]) -> AnyRequest:
    try:
        request = validate()
    except ValidationError as error:
        raise _usage_error(error) from None
    _refuse_what_we_lack(request)
    _resolve_steps(request)
    _resolve_guidance(request)
    _resolve_size(request)
    return request


def _refuse_what_we_lack(request: ImagesRequest) -> None:
    for field in REFUSED:
        if field in (request.model_extra or {}):
            raise UnsupportedField(f"{field} is not supported", param=field)
    for field, accepted in ACCEPTED.items():
        if (value := getattr(request, field)) not in accepted:
            choices = " or ".join(map(str, accepted))
            raise UsageError(
                f"{field} {_shown(value)!r} is not supported; send {choices}", param=field
            )
    if request.stream and request.response_format == "url":
        raise UsageError("a stream carries b64_json, not url", param="response_format")


def _resolve_steps(request: ImagesRequest) -> None:
    sent = request.model_fields_set
    if request.steps is None:
        if "num_inference_steps" not in sent:
            # Not by assignment: a default does not count as sent.
            request.__dict__["num_inference_steps"] = QUALITY_STEPS[request.quality]
    elif "num_inference_steps" in sent and request.steps != request.num_inference_steps:
        raise _contradiction("steps", "num_inference_steps")
    else:
        request.num_inference_steps = request.steps


def _resolve_guidance(request: ImagesRequest) -> None:
    """A textbook CFG scale is our guidance plus one, so 1 is off; 0 is what Turbo's users mean."""
    for field in ("cfg_scale", "true_cfg_scale"):
        scale: float | None = getattr(request, field)
        if scale is None:
            continue
        if scale != 0 and scale < 1:
            raise UsageError(f"{field} is {scale:g}, expected 0 or 1 (off) or more", param=field)
        guidance = max(scale - 1, 0.0)
        if "guidance_scale" in request.model_fields_set and guidance != request.guidance_scale:
            raise _contradiction(field, "guidance_scale")
        request.guidance_scale = guidance


def _resolve_size(request: ImagesRequest) -> None:
    if request.width is None and request.height is None:
        return
    if request.width is None or request.height is None:
        missing = "width" if request.width is None else "height"
        raise UsageError("width and height go together", param=missing)
    size = f"{request.width}x{request.height}"
    if request.size not in ("auto", size):
        raise _contradiction("width", "size")
    request.size = size


def _contradiction(alias: str, field: str) -> UsageError:
    return UsageError(f"{alias} and {field} contradict each other; send one", param=alias)


def _usage_error(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    param = ".".join(_shown(str(part)) for part in first["loc"]) or None
    where = f"{param}: " if param else ""
    return UsageError(f"{where}{first['msg']}", param=param)


def _shown(text: str) -> str:
    """Other people's words, short enough for one of our sentences."""
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 1]}…"


def parse_size(size: str) -> tuple[int, int]:
    """`1024x512` -> (1024, 512), else UsageError. Which sizes a model can draw is its business."""
    if not (match := re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", size.strip(), re.ASCII)):
        raise UsageError(
            f"size {_shown(size)!r} is not WIDTHxHEIGHT in pixels, such as 1024x512", param="size"
        )
    return int(match[1]), int(match[2])


class Usage(BaseModel):
    """Tokens in OpenAI's sense. A picture counts one token per 16 x 16 pixels."""

    input_tokens: int | None = None
    output_tokens: int
    total_tokens: int | None = None


class RunFacts(BaseModel):
    """What the server did for this request, in the block `zimage_fp8`.

    `nfe` counts forwards of the transformer over all n images; `timings_s` are sums over them,
    except `queue`, the wait before the first. `batch` is the most pictures that shared a forward
    with one of these. `strength` is there when a picture was edited.
    `server` is the server's self-description.
    """

    policy: str
    steps: int
    nfe: int
    batch: int = 1
    guidance: float
    strength: float | None = None
    sigmas: list[float]
    timings_s: dict[str, float]
    peak_memory_bytes: dict[str, int]
    server: dict[str, JsonValue]


class ImageData(BaseModel):
    """One picture, as base64 of the file or as an address, and the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    expires_at: int | None = None
    seed: int | None = None


class ImagesAnswer(BaseModel):
    """The body of a 200. `zimage_fp8` is absent when another server answered."""

    created: int
    data: list[ImageData]
    size: str | None = None
    quality: str | None = None
    background: str | None = None
    output_format: str | None = None
    safety_identifier: str | None = None
    usage: Usage | None = None
    warnings: list[str] = []
    zimage_fp8: RunFacts | None = None


EventType = Literal[
    "image_generation.partial_image",
    "image_generation.completed",
    "image_edit.partial_image",
    "image_edit.completed",
]


class StreamEvent(BaseModel):
    """One event of a streamed answer, except its picture. `index` counts the n pictures.

    Clients tell events apart by `type` alone, and take one that they do not know for a partial
    picture: there are no other types.
    """

    type: EventType
    created_at: int
    size: str
    quality: str
    background: str = "opaque"
    output_format: str
    index: int
    seed: int
    partial_image_index: int | None = None
    usage: Usage | None = None
    warnings: list[str] | None = None
    zimage_fp8: RunFacts | None = None


class ApiError(BaseModel):
    """The inside of OpenAI's error envelope."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a 2xx, and the last event of a stream that failed."""

    error: ApiError
