"""Pictures as files: text in each tells how to draw it again, and is read back from there.

PNG is written here: the rows' differences in numpy, deflated by Intel's ISA-L, parts of the picture
side by side. Measured beside Pillow and the zlibs: benchmarks/picture.py and what it wrote to
results/picture.json.
"""

import io
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib
from PIL import Image, UnidentifiedImageError

from zimage_fp8.errors import ZImageError

if TYPE_CHECKING:
    from zimage_fp8.model.request import GeneratedImage

PARAMETERS_KEY = "parameters"  # what Civitai, Forge, SD.Next and most galleries read
OWN_KEY = "zimage_fp8"

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_UP = 2  # the filter that stores every row as its difference from the row above
DEFLATE_LEVEL = 1  # of ISA-L's 0 to 3; 0 is little faster and makes larger files
# A millisecond of work a part. Cut by size, not by the number of cores: a picture is one file.
DEFLATE_PART_BYTES = 2**18
RAW, ZLIB_HEADER = -15, b"\x78\x01"  # deflate's widest window without a header; the header

UNICODE_COMMENT = b"UNICODE\0"
MAX_EXIF_BYTES = 65_000  # a JPEG segment holds 65,533, and EXIF needs some for itself


def encode_png(
    image: "GeneratedImage", describe: Mapping[str, object], *, embed_metadata: bool = True
) -> bytes:
    """The picture as PNG; with A1111's `parameters` and one JSON key of ours unless told not to."""
    texts = {}
    if embed_metadata:
        texts[PARAMETERS_KEY] = a1111_parameters(image, describe)
        texts[OWN_KEY] = json.dumps(own_metadata(image, describe), ensure_ascii=False)
    return _png(image.pixels, texts)


def encode_picture(
    image: "GeneratedImage",
    describe: Mapping[str, object],
    output_format: str,
    *,
    compression: int = 100,
    embed_metadata: bool = True,
) -> bytes:
    """The picture as png, webp or jpeg, whose `compression` is the quality that they keep.

    WebP and JPEG carry A1111's parameters as EXIF's UserComment, where galleries look.
    """
    if output_format == "png":
        return encode_png(image, describe, embed_metadata=embed_metadata)
    comment = a1111_parameters(image, describe) if embed_metadata else ""
    return _pillow(image.pixels, output_format, compression, _exif(comment))


def encode_pixels(pixels: np.ndarray, output_format: str, *, compression: int = 100) -> bytes:
    """uint8 [height, width, 3] as png, webp or jpeg, without metadata."""
    if output_format == "png":
        return _png(pixels, {})
    return _pillow(pixels, output_format, compression, b"")


def _pillow(pixels: np.ndarray, output_format: str, quality: int, exif: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=output_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def _png(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    return png_around(pixels, texts, *deflated(up_filtered(pixels)))


def deflated(rows: np.ndarray) -> list[bytes]:
    """Bytes as zlib data, in pieces. Parts are deflated by several threads, each without looking at
    the one before: a few bytes a part. (`isal_zlib.compress` would hold the interpreter.)"""
    flat = rows.reshape(-1)
    starts = range(0, len(flat), DEFLATE_PART_BYTES)
    parts = [flat[start : start + DEFLATE_PART_BYTES] for start in starts]
    is_last = [start == starts[-1] for start in starts]
    made = (_threads().map if len(parts) > 1 else map)(_deflated_part, parts, is_last)
    checksum = struct.pack(">I", isal_zlib.adler32(flat))  # while the threads work
    return [ZLIB_HEADER, *made, checksum]


def _deflated_part(part: np.ndarray, is_last: bool) -> bytes:
    """One part, ending at a whole byte; the last one ends the stream."""
    stream = isal_zlib.compressobj(DEFLATE_LEVEL, isal_zlib.DEFLATED, RAW)
    ending = isal_zlib.Z_FINISH if is_last else isal_zlib.Z_SYNC_FLUSH
    return bytes(stream.compress(part) + stream.flush(ending))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="png")


def png_around(pixels: np.ndarray, texts: Mapping[str, str], *deflated: bytes) -> bytes:
    """An 8-bit RGB PNG of uint8 [height, width, 3], whose filtered rows are given as zlib data, in
    one piece or several.

    `texts` become iTXt chunks in front of the pixels.
    """
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    itxt = (
        b"%s\0\0\0\0\0%s" % (key.encode("latin-1"), text.encode()) for key, text in texts.items()
    )
    return b"".join(
        [
            PNG_SIGNATURE,
            *_chunk(b"IHDR", header),
            *(part for text in itxt for part in _chunk(b"iTXt", text)),
            *_chunk(b"IDAT", *deflated),
            *_chunk(b"IEND"),
        ]
    )


def up_filtered(pixels: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] -> [height, 1 + 3 · width]: PNG's filter Up on every row."""
    rows = pixels.reshape(len(pixels), -1)
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = PNG_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(kind: bytes, *data: bytes) -> list[bytes]:
    checksum = isal_zlib.crc32(kind)
    for piece in data:
        checksum = isal_zlib.crc32(piece, checksum)
    size = struct.pack(">I", sum(map(len, data)))
    return [size, kind, *data, struct.pack(">I", checksum)]


def _exif(comment: str) -> bytes:
    """EXIF whose UserComment is `comment`, or nothing when there is none or it is too long."""
    text = UNICODE_COMMENT + comment.encode("utf-16-be")
    if not comment or len(text) > MAX_EXIF_BYTES:
        return b""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = text
    return exif.tobytes()


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
    if request.source is not None:
        fields["Denoising strength"] = f"{request.strength:g}"
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
        **({"strength": request.strength} if request.source is not None else {}),
        "sigmas": list(image.sigmas),
        "nfe": image.nfe,
        **describe,
    }


def read_metadata(path: Path) -> dict[str, object]:
    """What a picture says about itself: our JSON, else A1111's text.

    The latter stands under `parameters` in a PNG and in EXIF's UserComment elsewhere.
    Raises ZImageError when the file is no picture or carries neither.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            text = dict(picture.info)
            comment = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
            size = picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise ZImageError(f"{path} cannot be read as a picture: {error}") from None
    found: dict[str, object] = {"file": path.name, "pixels": f"{size[0]}x{size[1]}"}
    if OWN_KEY in text:
        try:
            own = json.loads(str(text[OWN_KEY]))
        except ValueError:
            own = None
        if not isinstance(own, dict):
            raise ZImageError(f"{path}: its {OWN_KEY} text is damaged")
        return own | found
    if PARAMETERS_KEY in text:
        return found | {PARAMETERS_KEY: str(text[PARAMETERS_KEY])}
    if isinstance(comment, bytes) and comment.startswith(UNICODE_COMMENT):
        written = comment.removeprefix(UNICODE_COMMENT).decode("utf-16-be", errors="replace")
        return found | {PARAMETERS_KEY: written}
    raise ZImageError(f"{path} carries no generation parameters")
