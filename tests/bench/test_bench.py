"""The whole verb on a tiny model: quantize, serve, draw, compare, report."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from skimage.metrics import peak_signal_noise_ratio

from fake_record import make_variant
from zimage_fp8 import bench as verb
from zimage_fp8.bench import bench
from zimage_fp8.bench.quality import pixels
from zimage_fp8.bench.record import read_record
from zimage_fp8.bench.run import refuse_unequal_work
from zimage_fp8.card import write_cards
from zimage_fp8.errors import UsageError, ZImageError


@pytest.mark.slow
def test_two_variants_from_model_to_card(tiny_model: Path, tmp_path: Path) -> None:
    report = bench(
        str(tiny_model),
        out=tmp_path,
        policies=["full"],
        prompts=["a", "b"],
        size=(64, 48),
        steps=2,
        runs=3,
        device="cpu",
    )
    record = read_record(tmp_path / "record.json")
    assert [variant.policy for variant in record.variants] == ["bf16_base", "full"]
    assert record.memory_method == "process_rss"
    assert "Peak RSS" in report.read_text()
    base, full = record.variants
    for variant in record.variants:
        assert [(r.prompt, r.seed, r.nfe) for r in variant.requests] == [
            (0, 1235, 2), (1, 1236, 2), (0, 1235, 2),
        ]  # fmt: skip
        for request in variant.requests:
            png = (tmp_path / request.picture).read_bytes()
            assert hashlib.sha256(png).hexdigest() == request.sha256
        assert variant.requests[0].picture != variant.requests[2].picture
        assert variant.load_s > 0
        assert len(variant.warmup_latencies_s) == 1
    assert full.server["policy"] == "full"
    for written in (tmp_path / "record.json", report):
        for folder in (tmp_path, tiny_model, Path(sys.prefix)):
            assert str(folder) not in written.read_text()
    for ours, original in zip(full.requests, base.requests, strict=True):
        pair = [pixels((tmp_path / r.picture).read_bytes()) for r in (original, ours)]
        assert ours.quality
        assert ours.quality.psnr_db == peak_signal_noise_ratio(*pair, data_range=255)
    (card,) = write_cards(tmp_path / "checkpoints", tmp_path / "record.json", namespace="me")
    assert "8 prompts × 9 forwards" in card.read_text()


def test_different_numbers_of_forwards_are_not_compared() -> None:
    base, full = (make_variant(policy, "m", on_gpu=False) for policy in ("bf16_base", "full"))
    refuse_unequal_work([base, full])
    doubled = [request.model_copy(update={"nfe": 16}) for request in full.requests]
    with pytest.raises(ZImageError, match=r"bf16_base \[8\], full \[16\]"):
        refuse_unequal_work([base, full.model_copy(update={"requests": doubled})])


@pytest.mark.parametrize(
    "wrong",
    [
        {"policies": ["nope"]},
        {"policies": ["full[0-99]"]},
        {"dtype": "int4"},
        {"steps": 1000},
        {"seeds": [-1, 0, 1]},
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    wrong: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        bench(str(tiny_model), out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda module: None if module == "skimage" else 1)
    with pytest.raises(ZImageError, match="not installed: skimage") as missing:
        bench("nano", out=tmp_path / "out")
    assert missing.value.hint == "pip install 'zimage-fp8[bench]'"
    assert not (tmp_path / "out").exists()
