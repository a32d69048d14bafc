"""AUTOMATIC1111's bodies as ours: every field is honoured, ignored with a warning, or refused.

Its clients send long lists of defaults, so a value that asks for nothing passes in silence.
"""

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from zimage_fp8.errors import UsageError
from zimage_fp8.protocol import (
    DEFAULT_STEPS,
    MAX_IMAGES,
    ImagesRequest,
    UnsupportedField,
    parse_edits_request,
    parse_images_request,
)
from zimage_fp8.serve.edits import Edit
from zimage_fp8.serve.uploads import open_picture

SAMPLER = "Euler"
SCHEDULER = "Automatic"
DEFAULT_DENOISING = 0.75
HIGH_CFG = 2.0  # textbook defaults are 5 to 7; Turbo is made for 1

# Their names of our fields, for errors.
THEIR_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "size": "width",
    "n": "batch_size",
    "strength": "denoising_strength",
    "image": "init_images",
    "model": "sd_model_checkpoint",
}

# Without these the picture would have another size, another model or another content.
REFUSED = {
    "enable_hr": "ask for the final size instead",
    "script_name": "scripts are not part of this server",
    "refiner_checkpoint": "there is no refiner",
    "firstpass_image": "send it to img2img",
    "latent_mask": "send mask",
    "controlnet_units": "there is no ControlNet",
}

# Values beyond null, "", 0, -1, false and empty lists that ask for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "s_noise": (1,),
    "eta": (1,),
    "initial_noise_multiplier": (1,),
    "styles": ([""],),
    "script_args": ([{}],),
    "resize_mode": (1,),
    "inpainting_fill": (1,),
    "mask_round": (True,),
}
# Only read together with a field that is refused or off, about files that nobody asked us to keep,
# or without effect where there is neither a grid nor a server-side setting to restore.
SILENT = re.compile(
    r"hr_.+|firstphase_.+|subseed|seed_resize_from_.|script_args|refiner_switch_at|image_cfg_scale"
    r"|do_not_save_.+|override_settings_restore_afterwards|disable_extra_networks|comments"
    r"|include_init_images|s_tmax|s_min_uncond|force_task_id|sampler_index|distilled_cfg_scale"
)
ONLY_WITH_MASK = re.compile(r"mask_.+|inpaint.+")
NETWORK = re.compile(r"<(lora|lyco|hypernet):[^>]*>")
WEIGHTED = re.compile(r"\([^()]*:\s*\d*\.?\d+\)")


class _Body(BaseModel):
    """What is honoured of /txt2img and /img2img. `null` means: as if the field were absent."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    batch_size: int = Field(default=1, ge=1)
    n_iter: int = Field(default=1, ge=1)
    steps: int = 0
    cfg_scale: float | None = None
    width: int = 0
    height: int = 0
    sampler_name: str = ""
    sampler_index: str = ""
    scheduler: str = ""
    override_settings: dict[str, JsonValue] = {}
    alwayson_scripts: dict[str, JsonValue] = {}
    send_images: bool = True
    denoising_strength: float = DEFAULT_DENOISING
    init_images: list[str] = []
    mask: str | None = None
    inpainting_mask_invert: int = 0

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}


@dataclass(frozen=True)
class Order:
    """A body in our terms. edit: set when it starts from a picture; `wanted` is the same object."""

    wanted: ImagesRequest
    edit: Edit | None
    warnings: list[str]
    batch_size: int
    cfg_scale: float
    parameters: dict[str, JsonValue]
    send_images: bool


def parse_order(body: bytes, chosen: str | None, *, from_picture: bool) -> Order:
    """The order in `body`. chosen: the model that the client selected through /options.

    Raises UsageError naming the first field that is wrong or not to be had here. Decodes the mask:
    call it off the event loop.
    """
    try:
        sent = _Body.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))[:60] or None
        raise UsageError(f"{param or 'body'}: {first['msg']}", param=param) from None
    _refuse(sent)
    fields = _translated(sent, chosen)
    if from_picture:
        image, mask = _pictures(sent)
        fields["strength"] = sent.denoising_strength
        edit = Edit(parse_edits_request(json.dumps(fields).encode()), image, mask)
        wanted: ImagesRequest = edit.wanted
    else:
        edit, wanted = None, parse_images_request(json.dumps(fields).encode())
    return Order(
        wanted,
        edit,
        list(_warnings(sent, wanted, from_picture)),
        sent.batch_size,
        wanted.guidance_scale + 1,
        {
            field: value
            for field, value in sent.model_dump(exclude_unset=True).items()
            if field not in ("init_images", "mask")
        },
        sent.send_images,
    )


def _translated(sent: _Body, chosen: str | None) -> dict[str, object]:
    if (count := sent.batch_size * sent.n_iter) > MAX_IMAGES:
        raise UsageError(
            f"batch_size times n_iter is {count}, at most {MAX_IMAGES} pictures are drawn at once",
            param="batch_size",
        )
    fields: dict[str, object] = {
        "prompt": sent.prompt,
        "negative_prompt": sent.negative_prompt,
        "n": count,
        "steps": sent.steps if sent.steps > 0 else DEFAULT_STEPS,
        "seed": sent.seed if sent.seed >= 0 else None,
        "cfg_scale": sent.cfg_scale,
        "width": sent.width or None,
        "height": sent.height or None,
        "model": sent.override_settings.get("sd_model_checkpoint") or chosen,
    }
    return {field: value for field, value in fields.items() if value is not None}


def _refuse(sent: _Body) -> None:
    extra = sent.model_extra or {}
    for field, instead in REFUSED.items():
        if not _is_neutral(field, extra.get(field)):
            raise UnsupportedField(f"{field} is not supported: {instead}", param=field)
    for name, script in sent.alwayson_scripts.items():
        if _is_on(script):
            raise UnsupportedField(
                f"alwayson_scripts: {name[:60]!r} is not part of this server; switch it off",
                param="alwayson_scripts",
            )


def _is_on(script: JsonValue) -> bool:
    """Extensions say that they are off by `false` as first argument, or `enabled` in each unit."""
    arguments = script.get("args", []) if isinstance(script, dict) else script
    units = list(arguments.values()) if isinstance(arguments, dict) else arguments
    if not isinstance(units, list) or not units or units[0] is False:
        return False
    return not all(isinstance(unit, dict) and unit.get("enabled") is False for unit in units)


def _is_neutral(field: str, value: object) -> bool:
    if value in (None, "", 0, -1, False) or value in ([], {}):
        return True
    return value in NEUTRAL.get(field, ())


def _warnings(sent: _Body, wanted: ImagesRequest, from_picture: bool) -> Iterator[str]:
    for named in NETWORK.finditer(f"{sent.prompt}\n{sent.negative_prompt}"):
        yield f"{named[0][:60]} is read as words: there are no extra networks"
    if WEIGHTED.search(sent.prompt):
        yield "weights such as (word:1.2) are read as words"
    if wanted.guidance_scale + 1 > HIGH_CFG:
        yield f"cfg_scale is {sent.cfg_scale:g}: this model is made for 1, and twice as fast there"
    if sent.negative_prompt and not wanted.guidance_scale:
        yield "negative_prompt has no effect at cfg_scale 1"
    sampler = sent.sampler_name or sent.sampler_index
    if sampler and sampler.lower() not in ("euler", "k_euler"):
        yield f"sampler {sampler[:60]!r} is not available: {SAMPLER} draws"
    if sent.scheduler and sent.scheduler.lower() != "automatic":
        yield f"scheduler {sent.scheduler[:60]!r} is not available: the model has its own"
    for field, value in sent.override_settings.items():
        if field != "sd_model_checkpoint" and not _is_neutral(field, value):
            yield f"override_settings.{field[:60]} is not supported and was ignored"
    if not from_picture and sent.init_images:
        yield "init_images was ignored: send it to img2img"
    for field, value in (sent.model_extra or {}).items():
        if _is_neutral(field, value) or SILENT.fullmatch(field):
            continue
        if ONLY_WITH_MASK.fullmatch(field) and sent.mask is None:
            continue
        yield f"{field[:60]} is not supported and was ignored"


def _pictures(sent: _Body) -> tuple[bytes, bytes | None]:
    """The files of the picture to start from and of the mask, the latter as OpenAI means it."""
    if not 0 < sent.denoising_strength <= 1:
        raise UsageError(
            f"denoising_strength is {sent.denoising_strength:g}, expected above 0 to 1",
            param="denoising_strength",
        )
    if len(sent.init_images) != 1:
        raise UsageError(
            f"init_images has {len(sent.init_images)} pictures, expected one", param="init_images"
        )
    image = _decoded(sent.init_images[0], "init_images")
    if sent.mask is None:
        return image, None
    source, mask = open_picture(image, "init_images"), _decoded(sent.mask, "mask")
    levels = open_picture(mask, "mask").convert("L").resize(source.size)
    return image, _transparent(levels, is_inverted=bool(sent.inpainting_mask_invert))


def _transparent(levels: Image.Image, *, is_inverted: bool) -> bytes:
    """Their masks are white where to draw anew, OpenAI's transparent."""
    alpha = levels if is_inverted else ImageOps.invert(levels)
    mask = Image.new("RGBA", levels.size)
    mask.putalpha(alpha)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _decoded(text: str, param: str) -> bytes:
    """Base64, alone or in a data URL."""
    try:
        text = text.partition(",")[2] if "," in text[:100] else text
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(
            f"{param} is no base64: this server fetches nothing and reads no paths", param=param
        ) from None
