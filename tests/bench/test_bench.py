"""The whole verb on a tiny model: quantize, serve, draw, compare, report."""

import sys
from pathlib import Path
from typing import Any

import pytest
from skimage.metrics import peak_signal_noise_ratio

from zimage_fp8 import bench as verb
from zimage_fp8.bench import bench
from zimage_fp8.bench.quality import pixel_digest, pixels
from zimage_fp8.bench.record import read_record
from zimage_fp8.card import write_cards
from zimage_fp8.errors import UsageError, ZImageError


@pytest.mark.slow
def test_two_variants_from_model_to_card(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = bench(
        str(tiny_model),
        out=out,
        profile="nano",
        policies=["full"],
        prompts=["a", "b"],
        size=(64, 48),
        steps=2,
        runs=3,
        device="cpu",
    )
    record = read_record(out / "record.json")
    assert [variant.policy for variant in record.variants] == ["bf16_base", "full"]
    assert record.memory_method == "process_rss"
    assert "Peak RSS" in report.read_text()
    base, full = record.variants
    for variant in record.variants:
        assert [(r.prompt, r.seed, r.nfe) for r in variant.requests] == [
            (0, 1235, 2), (1, 1236, 2), (0, 1235, 2),
        ]  # fmt: skip
        for request in variant.requests:
            png = (out / request.picture).read_bytes()
            assert pixel_digest(png) == request.sha256
        assert variant.requests[0].picture == variant.requests[2].picture  # the same bytes
        assert [request.is_timed for request in variant.requests] == [True] * 3
        # The third request is the first one again, whose prompt our server remembers.
        assert [flag.kind for flag in variant.flags] == ["remembered_prompts"]
        assert variant.flags[0].text.startswith("In 1 of 3 timed requests")
        assert variant.load_s > 0
        assert len(variant.warmup_latencies_s) == 1
    assert full.server["policy"] == "full"
    assert record.profile.name == "nano (changed)"
    for written in (out / "record.json", report):
        for folder in (tmp_path, tiny_model, Path(sys.prefix)):
            assert str(folder) not in written.read_text()
    for ours, original in zip(full.requests, base.requests, strict=True):
        pair = [pixels((out / r.picture).read_bytes()) for r in (original, ours)]
        assert ours.quality
        assert ours.quality.psnr_db == peak_signal_noise_ratio(*pair, data_range=255)
    (card,) = write_cards(out / "checkpoints", out / "record.json", namespace="me")
    assert "8 prompts × 9 forwards" in card.readme.read_text()


@pytest.mark.gpu
def test_a_gpu_is_measured_in_turns(tmp_path: Path) -> None:
    """Memory, energy and clocks of nano's servers, which are alive together on one GPU."""
    profile = tmp_path / "gpu.toml"
    profile.write_text(
        'name = "gpu"\nsummary = "x"\nsizes = ["256x256"]\ntimed = 6\nwarmup = 3\n'
        'warm_tolerance = 0.2\nmax_warmup = 12\norder = "interleaved"\nfloors = ["rerun"]\n'
        "probe_guidance = true\n[load]\nrequests = 4\nconcurrency = [2]\nrates = [0.5]\n"
        '[prompts]\nall = ["a penguin on a yellow background", "a red apple"]\n'
    )
    out = tmp_path / "out"
    bench("nano", out=out, profile=str(profile), policies=["online_fp8"], device="cuda")
    record = read_record(out / "record.json")
    (one,) = record.passes
    assert one.failures == []
    assert one.order == "interleaved"
    assert record.memory_method in ("nvml_process", "nvml_device_growth", "torch_reserved")
    for variant in one.variants:
        assert variant.server["device"] != "cpu"
        assert variant.peak_memory_bytes["torch_reserved"] > 2**20
        assert variant.probe
        assert "unasked_guidance" not in [flag.kind for flag in variant.flags]
        assert len(variant.timed) == 6
        assert variant.gpu is None or variant.gpu.num_samples > 0
    assert record.machine.gpus[0].name
    assert not any(flag.kind == "memory_not_returned" for v in one.variants for flag in v.flags)


@pytest.mark.parametrize(
    "wrong",
    [
        {"policies": ["nope"]},
        {"policies": ["full[0-99]"]},
        {"dtype": "int4"},
        {"steps": 1000},
        {"seeds": [-1, 0, 1]},
        {"profile": "nope"},
        {"device": "cuda:99"},
        {"device": "gpu"},
        {"size": (32768, 16)},
        {"engine": "nope"},
        {"launch": "serve {model}"},
        {"metrics": ["beauty"]},
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
