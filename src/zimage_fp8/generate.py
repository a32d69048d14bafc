"""VERB generate: a prompt in, PNG files out."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from zimage_fp8.engine.profile import Profile, profile
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest, check_values
from zimage_fp8.picture import encode_png

OnStep = Callable[[int, int, int], None]  # (picture, steps done, steps in all)


def generate(
    pipeline: Pipeline,
    request: ImageRequest,
    out: Path,
    *,
    count: int = 1,
    embed_metadata: bool = True,
    on_step: OnStep | None = None,
) -> list[Path]:
    """Draw `count` pictures with seeds seed, seed+1, … and write them.

    One picture goes to `out`; several to out-0.png, out-1.png, …. Raises UsageError for a request
    that cannot be drawn and ZImageError when a file cannot be written.
    """
    check_early(request, out, count)
    pipeline.validate(request)
    files = []
    for index in range(count):
        one = replace(request, seed=request.seed + index)
        image = pipeline.generate(one, _for_picture(on_step, index))
        path = out if count == 1 else out.with_stem(f"{out.stem}-{index}")
        _write(path, encode_png(image, pipeline.describe(), embed_metadata=embed_metadata))
        files.append(path)
    return files


def check_early(request: ImageRequest, out: Path, count: int) -> None:
    """Everything that can be refused before a model is loaded."""
    check_values(request)
    if not 1 <= count <= 100:
        raise UsageError(f"n is {count}, expected 1 to 100", param="n")
    check_values(replace(request, seed=request.seed + count - 1))
    if request.negative_prompt and not request.guidance:
        raise UsageError(
            "a negative prompt does nothing at guidance 0",
            param="negative_prompt",
            hint="add --guidance 1 (twice the work), or leave it out",
        )
    check_path(out, ".png", "output")


def check_path(path: Path, suffix: str, param: str) -> None:
    """Raise for a file that could not be written, before any work is done for it."""
    if path.suffix.lower() != suffix:
        raise UsageError(f"{param} {path} must end in {suffix}", param=param)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ZImageError(f"cannot write {path}: {path.parent} is not a writable folder")


def profile_to(path: Path, pipeline: Pipeline, request: ImageRequest) -> Profile:
    """Measure where the picture's time goes and write that as JSON. Raises as `generate` does."""
    found = profile(pipeline, request, lambda image: encode_png(image, pipeline.describe()))
    _write(path, (json.dumps(asdict(found), indent=1) + "\n").encode())
    return found


def _for_picture(on_step: OnStep | None, index: int) -> Callable[[int, int], None] | None:
    if on_step is None:
        return None
    return lambda done, total: on_step(index, done, total)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ZImageError(f"cannot write {path}: {error.strerror}") from None
