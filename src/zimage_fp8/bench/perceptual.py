"""LPIPS and CLIP, for who has their weights: nothing is downloaded to measure quality.

LPIPS is the AlexNet variant at the picture's own resolution (package `lpips`, with torchvision's
AlexNet weights in torch's cache). CLIP is openai/clip-vit-base-patch32 through transformers, from
the Hub's cache. Both run on the CPU in float32, so that a record does not depend on the GPU.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from zimage_fp8.bench.record import Quality
from zimage_fp8.errors import UsageError, ZImageError

Name = Literal["lpips", "clip"]
NAMES: tuple[Name, ...] = ("lpips", "clip")

CLIP = "openai/clip-vit-base-patch32"
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, where lpips looks for it


def find_metrics(names: Sequence[str]) -> tuple[Name, ...]:
    """The known ones among `names`. Raises UsageError for another."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"metric {name!r}: expected {' or '.join(NAMES)}", param="metric")
    return tuple(name for name in NAMES if name in names)


class Judge:
    """Adds the metrics that were asked for. Raises ZImageError when one is not to be had."""

    def __init__(self, names: tuple[Name, ...]) -> None:
        self._lpips: Any = _load_lpips() if "lpips" in names else None
        self._clip: Any = None
        self._processor: Any = None
        if "clip" in names:
            self._clip, self._processor = _load_clip()
        self._embed_picture = cache(self._picture_embedding)
        self._embed_text = cache(self._text_embedding)

    def add(self, quality: Quality, picture: Path, reference: Path, prompt: str) -> Quality:
        """`quality` with what this judge measures of the two files."""
        found: dict[str, float] = {}
        if self._lpips is not None:
            found["lpips"] = self._distance(picture, reference)
        if self._clip is not None:
            ours, theirs = self._embed_picture(picture), self._embed_picture(reference)
            text = self._embed_text(prompt)
            found["clip_image"] = float(ours @ theirs)
            found["clip_text"] = float(ours @ text - theirs @ text)
        return quality.model_copy(update=found)

    @torch.inference_mode()
    def _distance(self, picture: Path, reference: Path) -> float:
        return float(self._lpips(_in_one(picture), _in_one(reference)))

    @torch.inference_mode()
    def _picture_embedding(self, path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            inputs = self._processor(images=image.convert("RGB"), return_tensors="pt")
        return _unit(self._clip.get_image_features(**inputs))

    @torch.inference_mode()
    def _text_embedding(self, prompt: str) -> torch.Tensor:
        inputs = self._processor(text=prompt, return_tensors="pt", truncation=True)
        return _unit(self._clip.get_text_features(**inputs))


def _unit(features: Any) -> torch.Tensor:
    """[512], of length 1. transformers 5 answers with an output object, earlier ones a tensor."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)[0]


def _in_one(path: Path) -> torch.Tensor:
    """[1, 3, H, W] in -1 to 1, as LPIPS takes pictures."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"), np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def _load_lpips() -> Any:
    if importlib.util.find_spec("lpips") is None:
        raise ZImageError("LPIPS needs the package lpips", hint="pip install lpips")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        raise ZImageError(
            f"LPIPS needs torchvision's AlexNet weights, which are not at {weights}",
            hint="python -c 'import lpips; lpips.LPIPS(net=\"alex\")' fetches them",
        )
    import lpips  # an extra of its own, loaded only when asked for

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _load_clip() -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor  # seconds to import

    load: Callable[..., Any]
    parts = []
    for load in (CLIPModel.from_pretrained, CLIPProcessor.from_pretrained):
        try:
            parts.append(load(CLIP, local_files_only=True))
        except OSError:
            raise ZImageError(
                f"CLIP needs the weights of {CLIP}, which are not in the Hub's cache",
                hint=f"hf download {CLIP}",
            ) from None
    return parts[0].eval(), parts[1]
