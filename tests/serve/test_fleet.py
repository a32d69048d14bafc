"""Several models behind one server: names, what they share, what they need, who is meant."""

import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from fake_engine import FakeEngine
from fake_record import make_record
from live_server import live
from zimage_fp8 import provenance
from zimage_fp8.engine import EngineOptions
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.loading import Parts
from zimage_fp8.model.text import TextEncoder
from zimage_fp8.quantize import quantize
from zimage_fp8.serve import ServeOptions, build_app, fleet
from zimage_fp8.serve.budget import Available, available, check_fits
from zimage_fp8.serve.fleet import (
    Variant,
    check_memory,
    load_all,
    name_variants,
    shares_with,
    split_policies,
)

PATH = "/v1/images/generations"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("models", "policies", "served_name", "names"),
    [
        (["nano"], None, None, ["nano"]),
        (["nano"], "full", None, ["nano"]),
        (["nano"], "full", "mine", ["mine"]),
        (["mine=nano"], None, None, ["mine"]),
        (["nano"], "full,fp8-row,bf16_base", None, ["full", "fp8-row", "bf16_base"]),
        (["nano"], "full[0,3], full[!0-1]", None, ["full[0,3]", "full[!0-1]"]),
        (["a/full", "fast=b/ffn-only"], None, None, ["full", "fast"]),
        (["a/full", "b/ffn-only"], "online_fp8", None, ["full", "ffn-only"]),
    ],
)
def test_names(
    models: list[str], policies: str | None, served_name: str | None, names: list[str]
) -> None:
    variants = name_variants(models, split_policies(policies), served_name)
    assert [variant.name for variant in variants] == names


@pytest.mark.parametrize(
    ("models", "policies", "served_name", "param"),
    [
        (["a", "b"], "full,fp8-row", None, "policy"),
        (["a", "b"], None, "mine", "served_model_name"),
        (["nano"], "full,fp8-row", "mine", "served_model_name"),
        (["a/full", "b/full"], None, None, "model"),
        (["nano"], "full,full", None, "model"),
        (["=nano"], None, None, "model"),
        (["mine="], None, None, "model"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    models: list[str], policies: str | None, served_name: str | None, param: str
) -> None:
    with pytest.raises(UsageError) as refused:
        name_variants(models, split_policies(policies), served_name)
    assert refused.value.param == param


def test_policies_share_what_is_not_the_transformer(tiny_model: Path) -> None:
    variants = name_variants([str(tiny_model)], split_policies("full,bf16_base,fp8-row"), None)
    loaded = load_all(variants, "bfloat16", "cpu", EngineOptions())
    first, *others = loaded.values()
    assert [pipeline.policy for pipeline in loaded.values()] == ["full", "bf16_base", "fp8-row"]
    assert all(other.text is first.text and other.decoder is first.decoder for other in others)
    assert len({id(pipeline.transformer) for pipeline in loaded.values()}) == 3


def test_checkpoints_made_from_one_model_share_its_files(tiny_model: Path, tmp_path: Path) -> None:
    (row,) = quantize(str(tiny_model), ["fp8-row"], tmp_path / "row")
    assert shares_with(tiny_model, row)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert shares_with(tiny_model, other)  # equal bytes will do
    config = other / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert not shares_with(tiny_model, other)
    variants = [Variant("a", str(tiny_model), None), Variant("b", str(other), None)]
    loaded = load_all(variants, "bfloat16", "cpu", EngineOptions())
    assert loaded["a"].text is not loaded["b"].text


def test_what_calibrates_goes_on_to_draw(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text encoder for the calibration and for the pictures of both policies."""
    opened: list[str] = []

    def text(*where: Any) -> TextEncoder:
        opened.append("text encoder")
        return TextEncoder(*where)

    monkeypatch.setattr(fleet, "fast_parts", lambda *_: Parts(text=text))
    variants = [Variant(policy, str(tiny_model), policy) for policy in ("full", "ffn-only")]
    loaded = load_all(variants, "bfloat16", "cpu", EngineOptions())
    assert list(loaded) == ["full", "ffn-only"]
    assert opened == ["text encoder"]


@pytest.mark.parametrize("policy", [None, "online_fp8", "ffn-only"])
def test_the_estimate_is_what_is_loaded(tiny_model: Path, policy: str | None) -> None:
    """Within 3 %: scales are left out, and of the tiny model they are more than of a real one."""
    variant = Variant("x", str(tiny_model), policy)
    sizes = check_memory([variant], "bfloat16", CPU, None)
    transformer = load_all([variant], "bfloat16", "cpu", EngineOptions())["x"].transformer
    held = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    assert sizes["x"] == pytest.approx(held, rel=0.03)


def test_a_stored_checkpoint_counts_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    (row,) = quantize(str(tiny_model), ["fp8-row"], tmp_path / "row")
    variants = [Variant("a", str(tiny_model), None), Variant("b", str(row), None)]
    sizes = check_memory(variants, "bfloat16", CPU, None)
    assert sizes["b"] < 0.8 * sizes["a"]


def test_what_does_not_fit_is_refused_with_numbers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []
    room = Available(1000, "the GPU (cuda)")
    monkeypatch.setattr("zimage_fp8.serve.fleet.available", lambda *_: room)
    monkeypatch.setattr(
        "zimage_fp8.serve.fleet.check_fits",
        lambda parts, room: (asked.append(dict(parts)), check_fits(parts, room)),
    )
    variants = name_variants([str(tiny_model)], split_policies("full,fp8-row"), None)
    with pytest.raises(ZImageError, match=r"the weights need .* GiB \(full .*has 0\.00 free"):
        check_memory(variants, "bfloat16", CPU, None)
    assert list(asked[0]) == ["full", "fp8-row", "text encoder and VAE", "BF16 while calibrating"]


def test_room_is_read_from_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16 kB\nMemAvailable:        9 kB\n")
    monkeypatch.setattr(provenance, "MEMINFO", meminfo)
    assert available(CPU) == Available(9 * 1024, "main memory")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    assert available(torch.device("cuda"), 0.5) == Available(500, "the GPU (cuda)")
    assert available(torch.device("cuda"), 0.9) == Available(700, "the GPU (cuda)")


def test_the_request_chooses() -> None:
    engines = {"full": FakeEngine("full"), "bf16_base": FakeEngine("bf16_base")}
    cards = {"full": {"weights_bytes": 6, "quality": {"median_psnr_db": 30.0}}}
    with (
        live(build_app(engines, ServeOptions(cards=cards))) as server,
        httpx2.Client(base_url=server.url, trust_env=False) as client,
    ):
        listed = client.get("/v1/models").json()["data"]
        answers = {
            name: client.post(PATH, json={"prompt": "x", "model": name}).json()
            for name in ("full", "bf16_base", "gpt-image-1")
        }
        plain = client.post(PATH, json={"prompt": "x"}).json()
        metrics = client.get("/metrics").text
    assert [(card["id"], card["policy"]) for card in listed] == [
        ("full", "full"),
        ("bf16_base", "bf16_base"),
    ]
    assert (listed[0]["weights_bytes"], listed[0]["quality"]["median_psnr_db"]) == (6, 30.0)
    assert "weights_bytes" not in listed[1]
    policies = {name: answer["zimage_fp8"]["policy"] for name, answer in answers.items()}
    assert policies == {"full": "full", "bf16_base": "bf16_base", "gpt-image-1": "full"}
    (warning,) = answers["gpt-image-1"]["warnings"]
    assert warning == "model 'gpt-image-1' is not served here; 'full' drew the picture"
    assert answers["full"]["warnings"] == plain["warnings"] == []
    assert len(engines["full"].requests) == 3
    assert 'zimage_fp8_images_total{model="bf16_base"} 1.0' in metrics


def test_quality_comes_from_a_record(tmp_path: Path) -> None:
    from zimage_fp8.bench.record import write_record
    from zimage_fp8.cli.serve import measured_quality

    record = make_record()
    write_record(record, tmp_path / "record.json")
    found = measured_quality(tmp_path / "record.json")
    compared = [it.policy for it in record.passes[0].variants if it.requests[0].quality]
    assert list(found) == compared
    for card in found.values():
        assert card["against"] == "bf16_base"
        assert card["pictures"]
