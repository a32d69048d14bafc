"""Pictures that clients send: read with suspicion, turned into pixels of the size to be drawn.

Nothing is fetched and nothing is written: a picture is a part of the request, and is decoded in
memory after its header has said how large it is.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from zimage_fp8.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SOURCE_PIXELS = 50_000_000  # 150 MB once decoded; the largest phone cameras draw 50 million
SIZE_MULTIPLE = 16
DATA_URL = re.compile(r"data:[\w/+.-]*(;[\w=.-]+)*;base64,", re.ASCII)
OPAQUE = 255


def from_data_url(url: str, param: str) -> bytes:
    """The bytes inside a data URL. Raises UsageError for every other address."""
    head = DATA_URL.match(url[:200])
    if head is None:
        found = "an address" if "://" in url[:20] else "no data URL"
        raise UsageError(
            f"{param} is {found}: this server fetches nothing; send a file in a form, or "
            "data:image/png;base64,…",
            param=param,
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{param}: its base64 is damaged: {error}", param=param) from None


def open_picture(data: bytes, param: str) -> Image.Image:
    """The picture in `data` as RGB or RGBA, upright as EXIF says.

    What it is, its first bytes say, not its name. Raises UsageError when it is no PNG, JPEG or
    WebP, moves, is damaged, or has more than MAX_SOURCE_PIXELS.
    """
    with _one_sentence(param):
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MAX_SOURCE_PIXELS:
        raise UsageError(
            f"{param} has {width}x{height} pixels, at most {MAX_SOURCE_PIXELS} are read",
            param=param,
        )
    if getattr(picture, "n_frames", 1) > 1:
        raise UsageError(f"{param} moves: send one picture, not several frames", param=param)
    with _one_sentence(param):
        picture.load()
        return _in_8_bits(ImageOps.exif_transpose(picture))


def _in_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        levels = np.asarray(picture, dtype=np.float64) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


@contextmanager
def _one_sentence(param: str) -> Iterator[None]:
    """Whatever a decoder makes of foreign bytes is the sender's mistake, told as one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes, which we check
            yield
    except Exception as error:  # noqa: BLE001  decoders raise SyntaxError, struct.error and others
        reason = str(error).partition("\n")[0][:100] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "its first bytes are of another kind"
        raise UsageError(
            f"{param} cannot be read as PNG, JPEG or WebP: {reason}", param=param
        ) from None


def natural_size(picture: Image.Image, most: tuple[int, int]) -> tuple[int, int]:
    """The size for `auto`: the picture's own, not more pixels than `most`, in multiples of 16."""
    width, height = picture.size
    shrink = min(1.0, (most[0] * most[1] / (width * height)) ** 0.5)
    columns, rows = (max(1, round(side * shrink / SIZE_MULTIPLE)) for side in (width, height))
    return columns * SIZE_MULTIPLE, rows * SIZE_MULTIPLE


def pixels_of(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: the picture filling `size`, what sticks out cut off on both sides.

    Transparency becomes white, the paper that most pictures are looked at on.
    """
    if picture.mode == "RGBA":
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture).convert("RGB")
    return np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def mask_of(mask: Image.Image, source: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """bool [height, width]: true where the mask is transparent, as OpenAI means it.

    Raises UsageError when its size is not the picture's, or it has nothing to draw.
    """
    if mask.size != source.size:
        found, expected = ("x".join(map(str, it.size)) for it in (mask, source))
        raise UsageError(f"the mask is {found}, the picture {expected}", param="mask")
    if mask.mode != "RGBA":
        raise UsageError(
            "the mask has no transparency: what is to be drawn anew must be transparent in it",
            param="mask",
        )
    alpha = ImageOps.fit(mask.getchannel("A"), size, Image.Resampling.BOX)
    anew = np.asarray(alpha) <= OPAQUE // 2
    if not anew.any():
        raise UsageError("the mask is nowhere transparent: nothing would be drawn", param="mask")
    return anew
