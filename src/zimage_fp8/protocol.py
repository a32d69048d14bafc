"""The OpenAI Images API as it travels between our server, our benchmark and other people's clients.

Only wire types live here, and nothing here needs torch. Requests are parsed once, at the border;
what is not honoured is refused by name (`ACCEPTED`) or listed by name (`not_honoured`).
Every failure has OpenAI's one shape: `{"error": {"message", "type", "param", "code"}}`.
"""

import re

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from zimage_fp8.errors import UsageError

DEFAULT_STEPS = 8
DEFAULT_GUIDANCE = 0.0
MAX_IMAGES = 10

# The largest integer every JSON client carries exactly; seeds of n images count upwards from it.
MAX_SEED = 2**53 - MAX_IMAGES

# Fields whose other values would change the answer's shape or the picture: refused, never ignored.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "stream": (False,),
    "background": ("auto", "opaque"),
}

# Values of fields we do not implement that ask for nothing, so that nobody needs a warning.
NEUTRAL = ("auto", 0, False)


class ImagesRequest(BaseModel):
    """The body of POST /v1/images/generations. `null` means: as if the field were absent."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=32_000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    size: str = "auto"
    response_format: str = "b64_json"
    output_format: str = "png"
    background: str = "auto"
    stream: bool = False
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    negative_prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    @property
    def not_honoured(self) -> list[str]:
        """One sentence per field that was sent, asks for something, and has no effect here."""
        extra = self.model_extra or {}
        warnings = [
            f"{field} is not supported and was ignored"
            for field, value in extra.items()
            if value not in NEUTRAL
        ]
        if self.negative_prompt and not self.guidance_scale:
            warnings.append("negative_prompt has no effect while guidance_scale is 0")
        return warnings


def parse_images_request(body: bytes) -> ImagesRequest:
    """The request in `body`. Raises UsageError naming the first field that is wrong."""
    try:
        request = ImagesRequest.model_validate_json(body)
    except ValidationError as error:
        raise _usage_error(error) from None
    for field, accepted in ACCEPTED.items():
        if (value := getattr(request, field)) not in accepted:
            choices = " or ".join(str(choice).lower() for choice in accepted)
            raise UsageError(f"{field} {value!r} is not supported; send {choices}", param=field)
    return request


def _usage_error(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    where = f"{param}: " if param else ""
    return UsageError(f"{where}{first['msg']}", param=param)


def parse_size(size: str) -> tuple[int, int]:
    """`1024x512` -> (1024, 512), else UsageError. Which sizes a model can draw is its business."""
    if not (match := re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", size.strip())):
        raise UsageError(
            f"size {size!r} is not WIDTHxHEIGHT in pixels, such as 1024x512", param="size"
        )
    return int(match[1]), int(match[2])


class ImageData(BaseModel):
    """One picture: base64 of the PNG, and the seed that draws it again."""

    b64_json: str
    seed: int | None = None


class Usage(BaseModel):
    """Tokens in OpenAI's sense. A picture counts one token per 16 x 16 pixels."""

    input_tokens: int | None = None
    output_tokens: int
    total_tokens: int | None = None


class RunFacts(BaseModel):
    """What the server did for this request, in the block `zimage_fp8`.

    `nfe` counts forwards of the transformer over all n images; `timings_s` are sums over them,
    except `queue`, the wait before the first. `server` is the server's self-description.
    """

    policy: str
    steps: int
    nfe: int
    guidance: float
    sigmas: list[float]
    timings_s: dict[str, float]
    peak_memory_bytes: dict[str, int]
    server: dict[str, JsonValue]


class ImagesAnswer(BaseModel):
    """The body of a 200. `zimage_fp8` is absent when another server answered."""

    created: int
    data: list[ImageData]
    size: str | None = None
    output_format: str | None = None
    usage: Usage | None = None
    warnings: list[str] = []
    zimage_fp8: RunFacts | None = None


class ApiError(BaseModel):
    """The inside of OpenAI's error envelope."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a 2xx."""

    error: ApiError
