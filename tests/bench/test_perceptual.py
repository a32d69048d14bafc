"""LPIPS and CLIP: their sentences when they are not there, their numbers when they are."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_fp8.bench import perceptual
from zimage_fp8.bench.perceptual import Judge, find_metrics
from zimage_fp8.bench.record import Quality
from zimage_fp8.errors import UsageError, ZImageError

BASE = Quality(psnr_db=20.0, ssim=0.8)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    paths = (tmp_path / "a.png", tmp_path / "b.png")
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    return paths


def test_metrics_by_name() -> None:
    assert find_metrics(["clip", "lpips"]) == ("lpips", "clip")
    with pytest.raises(UsageError, match="metric 'fid': expected lpips or clip"):
        find_metrics(["fid"])


def test_lpips_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZImageError, match="needs the package lpips"):
        Judge(("lpips",))


def test_clip_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "CLIP", "nobody/has-this-model")
    with pytest.raises(ZImageError, match="weights of nobody/has-this-model") as missing:
        Judge(("clip",))
    assert missing.value.hint == "hf download nobody/has-this-model"


class FakeLpips(ModuleType):
    """The package with a distance that anybody can compute: the mean squared difference."""

    def __init__(self) -> None:
        super().__init__("lpips")
        self.__spec__ = importlib.machinery.ModuleSpec("lpips", None)

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert x.shape == (1, 3, 40, 48)
            assert -1 <= x.min() < x.max() <= 1
            return (x - y).square().mean()


def test_lpips_gets_pictures_in_its_range(
    pictures: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", FakeLpips())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ZImageError, match="AlexNet weights"):
        Judge(("lpips",))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / perceptual.ALEXNET).write_bytes(b"weights")
    judge = Judge(("lpips",))
    first, second = pictures
    assert judge.add(BASE, first, first, "x").lpips == 0
    found = judge.add(BASE, first, second, "x")
    arrays = [np.asarray(Image.open(path), np.float64) / 127.5 - 1 for path in pictures]
    assert found.lpips == pytest.approx(np.mean((arrays[0] - arrays[1]) ** 2), rel=1e-5)
    assert (found.psnr_db, found.clip_image) == (20.0, None)


def save_tiny_clip(folder: Path) -> None:
    """A CLIP of random weights whose tokenizer knows the letters a to c."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [*"abc", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    part = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**part, "vocab_size": len(letters), "eos_token_id": 7},
        vision_config={**part, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def test_clip_compares_pictures_and_prompts(
    pictures: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_clip(tmp_path / "clip")
    monkeypatch.setattr(perceptual, "CLIP", str(tmp_path / "clip"))
    judge = Judge(("clip",))
    first, second = pictures
    same = judge.add(BASE, first, first, "a b")
    assert same.clip_image == pytest.approx(1.0, abs=1e-5)
    assert same.clip_text == 0.0
    forth, back = judge.add(BASE, first, second, "a b"), judge.add(BASE, second, first, "a b")
    assert forth.clip_image == back.clip_image
    assert forth.clip_image is not None
    assert forth.clip_image < 1
    assert forth.clip_text == pytest.approx(-back.clip_text)
