"""Time what turns pixels into a PNG and a PNG into base64, our encoder and what else there is.

    python benchmarks/picture.py --out benchmarks/results/picture.json

Milliseconds of CPU time of all threads, which a busy machine stretches less than wall
time; best of 15 rounds in which all take turns. Ours deflates in several threads where there are
several cores, and takes that much less wall time. Every file is decoded by Pillow and compared with
the pixels first. The pictures: one that nano draws, blown up and with noise of two levels like a
sensor's; a smooth gradient with noise of one level; nano's, blown up and clean. Encoders of other
packages are measured where they are installed: pip install zlib-ng deflate fpng.
"""

import argparse
import base64
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from PIL import Image

from gpu import envelope
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.picture import encode_pixels, png_around, up_filtered

SIZES = ((1024, 512), (1024, 1024))
RUNS = 15
PROMPT = "a red apple on a blue background"

Encode = Callable[[np.ndarray], bytes]


def pillow(**options: int) -> Encode:
    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", **options)
        return buffer.getvalue()

    return encode


def filtered(deflate: Callable[[np.ndarray], bytes]) -> Encode:
    """Our writer with another deflate in it."""
    return lambda pixels: png_around(pixels, {}, deflate(up_filtered(pixels)))


def by_strategy(library: Any, strategy: int) -> Callable[[np.ndarray], bytes]:
    def deflate(rows: np.ndarray) -> bytes:
        stream = library.compressobj(1, library.DEFLATED, 15, 9, strategy)
        return bytes(stream.compress(rows) + stream.flush())

    return deflate


def encoders() -> dict[str, Encode]:
    found: dict[str, Encode] = {
        "zimage-fp8": lambda pixels: encode_pixels(pixels, "png"),
        "ISA-L level 0": filtered(lambda rows: isal_zlib.compress(rows, 0)),
        "ISA-L level 2": filtered(lambda rows: isal_zlib.compress(rows, 2)),
        "zlib, Huffman codes only": filtered(by_strategy(zlib, zlib.Z_HUFFMAN_ONLY)),
        "Pillow, default": pillow(),
        "Pillow, level 1": pillow(compress_level=1),
        "Pillow, level 1, run lengths": pillow(compress_level=1, compress_type=3),
    }
    if find_spec("zlib_ng"):
        library = import_module("zlib_ng.zlib_ng")
        found["zlib-ng level 1"] = filtered(lambda rows: library.compress(rows, 1))
        found["zlib-ng, Huffman codes only"] = filtered(by_strategy(library, zlib.Z_HUFFMAN_ONLY))
    if find_spec("deflate"):
        libdeflate = import_module("deflate")
        found["libdeflate level 1"] = filtered(lambda rows: libdeflate.zlib_compress(rows, 1))
    if find_spec("fpng"):
        fpng = import_module("fpng")
        found["fpng"] = fpng.from_ndarray
    return found


def pictures(width: int, height: int, drawn: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    side = max(width, height)
    clean = np.asarray(
        Image.fromarray(drawn).resize((side, side), Image.Resampling.BICUBIC), np.float64
    )[(side - height) // 2 :][:height, :width]
    y, x = np.mgrid[:height, :width]
    waves = (np.sin(x / 211 + y / 307), np.cos(y / 173 - x / 401), np.sin((x + y) / 257))
    gradient = 127 + 90 * np.stack(waves, axis=-1)
    found = {
        "nano's, noise of 2 levels": clean + rng.normal(0, 2, clean.shape),
        "gradient, noise of 1 level": gradient + rng.normal(0, 1, clean.shape),
        "nano's, clean": clean,
    }
    return {name: it.round().clip(0, 255).astype(np.uint8) for name, it in found.items()}


def rows(width: int, height: int, drawn: np.ndarray) -> list[dict[str, Any]]:
    """Encoders take turns, round after round: a busy moment of the machine hits all of them."""
    made = []
    for content, pixels in pictures(width, height, drawn).items():
        files = {encoder: encode(pixels) for encoder, encode in encoders().items()}
        for encoder, file in files.items():
            with Image.open(io.BytesIO(file)) as opened:
                if not np.array_equal(np.asarray(opened), pixels):
                    raise SystemExit(f"{encoder}: the file decodes to other pixels")
        best: dict[str, tuple[float, float, float]] = {}
        for _ in range(RUNS):
            for encoder, encode in encoders().items():
                times = timed(encode, pixels, files[encoder])
                best[encoder] = tuple(map(min, times, best.get(encoder, times)))
        for encoder, (copy_cpu_ms, png_cpu_ms, base64_cpu_ms) in best.items():
            row = {"size": f"{width}x{height}", "content": content, "encoder": encoder}
            row |= {
                "copy_cpu_ms": copy_cpu_ms,
                "png_cpu_ms": png_cpu_ms,
                "base64_cpu_ms": base64_cpu_ms,
            }
            row |= {"file_bytes": len(files[encoder])}
            made.append(row)
            print(
                f"{row['size']:10} {content:28} {encoder:30} {png_cpu_ms:7.2f} ms + base64 "
                f"{base64_cpu_ms:.2f} ms {len(files[encoder]) / 1e6:6.2f} MB",
                flush=True,
            )
    return made


def timed(encode: Encode, pixels: np.ndarray, file: bytes) -> tuple[float, float, float]:
    """CPU milliseconds of copying the pixels, of encoding them, and of the file's base64."""
    moments = [time.process_time()]
    for step in (pixels.copy, lambda: encode(pixels), lambda: base64.b64encode(file)):
        step()
        moments.append(time.process_time())
    copied, encoded, based = (1e3 * (b - a) for a, b in itertools.pairwise(moments))
    return copied, encoded, based


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    drawn = load_pipeline("nano", device="cpu").generate(ImageRequest(PROMPT, 256, 256)).pixels
    record = envelope()
    optional = {"zlib_ng": "zlib-ng", "deflate": "deflate", "fpng": "fpng"}
    packages = ["numpy", "pillow", "isal", *(p for m, p in optional.items() if find_spec(m))]
    record["versions"] |= {package: version(package) for package in packages}
    record["runs"] = RUNS
    record["rows"] = [row for size in SIZES for row in rows(*size, drawn)]
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
