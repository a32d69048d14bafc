"""quantize, from a model on disk to checkpoints on disk and back to pictures."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from compare import same_bits
from short_calibration import short_calibration
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import CheckpointError, UsageError, ZImageError
from zimage_fp8.layout import ZImageConfig, fused_name, members_of, tensor_shapes
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.numerics import QMAX, amax
from zimage_fp8.numerics import quantize as quantize_codes
from zimage_fp8.quant.calibrate import read_calibration
from zimage_fp8.quant.policy import STATIC_POLICIES
from zimage_fp8.quantize import (
    CalibrationOptions,
    find_unquantized,
    plan_jobs,
    quantize,
    size_report,
)

REQUEST = ImageRequest("a house by the sea", 64, 64, steps=3, seed=4)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    return short_calibration(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def family(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, options: CalibrationOptions
) -> Path:
    out = tmp_path_factory.mktemp("family") / "checkpoints"
    quantize(str(tiny_model), ["all"], out, calibration=options)
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_writes_seven_complete_pipelines(family: Path) -> None:
    assert sorted(path.name for path in family.iterdir()) == sorted(STATIC_POLICIES)
    for policy in STATIC_POLICIES:
        names = {path.name for path in (family / policy).iterdir()}
        assert names == {
            "model_index.json", "transformer", "text_encoder", "tokenizer", "vae", "scheduler",
            "calibration.json",
        }  # fmt: skip


def test_codes_and_scales_equal_the_formula_bit_for_bit(tiny_model: Path, family: Path) -> None:
    """Recomputed here from the BF16 weights, not by the code under test."""
    calibration = read_calibration(family / "full" / "calibration.json")
    with (
        ShardReader(tiny_model / "transformer") as source,
        ShardReader(family / "full" / "transformer") as stored,
    ):
        layers = [n.removesuffix(".weight_scale") for n in stored.infos if "weight_scale" in n]
        assert len(layers) == 4 * 7
        for layer in layers:
            group = [source.read(f"{m}.weight") for m in members_of(fused_name(layer))]
            scale = torch.stack([w.float().abs().max() for w in group]).max() / 448
            same_bits(stored.read(f"{layer}.weight_scale"), scale)
            codes = (source.read(f"{layer}.weight").float() / scale).clamp(-448, 448)
            same_bits(stored.read(f"{layer}.weight"), codes.to(torch.float8_e4m3fn))
            observed = torch.tensor(max(calibration.amax[layer]))
            same_bits(stored.read(f"{layer}.input_scale"), observed / QMAX["e4m3"])


def test_what_is_kept_is_kept_to_the_bit(tiny_model: Path, family: Path) -> None:
    with (
        ShardReader(tiny_model / "transformer") as source,
        ShardReader(family / "attn-out-only" / "transformer") as stored,
    ):
        kept = [n for n in source.infos if not n.endswith("attention.to_out.0.weight")]
        assert len(kept) == len(source.infos) - 4
        for name in kept:
            same_bits(stored.read(name), source.read(name))
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        assert hashes(family / "full" / part) == hashes(tiny_model / part)


def test_the_same_input_gives_the_same_bytes(
    tiny_model: Path, family: Path, tmp_path: Path, options: CalibrationOptions
) -> None:
    fresh = CalibrationOptions(prompts=options.prompts, forwards=3, size=(64, 64), device="cpu")
    quantize(str(tiny_model), ["ffn-only"], tmp_path / "again", calibration=fresh)
    assert hashes(tmp_path / "again") == hashes(family / "ffn-only")


def picture(pipeline: Pipeline) -> torch.Tensor:
    return torch.from_numpy(pipeline.generate(REQUEST).pixels)


@pytest.mark.parametrize("policy", ["full", "ffn-attn-out", "attn-qkv-only"])
def test_a_checkpoint_draws_what_quantizing_in_memory_draws(
    tiny_model: Path, family: Path, options: CalibrationOptions, policy: str
) -> None:
    assert options.file is not None
    stored = load_pipeline(str(family / policy), device="cpu")
    assert stored.policy == policy
    in_memory = load_pipeline(
        str(tiny_model), policy=policy, calibration=read_calibration(options.file), device="cpu"
    )
    same_bits(picture(stored), picture(in_memory))
    unquantized = load_pipeline(str(tiny_model), device="cpu")
    assert not torch.equal(picture(stored), picture(unquantized))


def test_row_checkpoints_need_no_calibration(tiny_model: Path, tmp_path: Path) -> None:
    (out,) = quantize(str(tiny_model), ["fp8-row"], tmp_path / "row")
    assert not (out / "calibration.json").exists()
    stored = load_pipeline(str(out), device="cpu")
    online = load_pipeline(str(tiny_model), policy="fp8-row", device="cpu")
    same_bits(picture(stored), picture(online))


def test_the_online_policy_runs_without_a_checkpoint(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), policy="online_fp8", device="cpu")
    assert len(pipeline.plan.quantized) == 4 * 7
    assert picture(pipeline).shape == (64, 64, 3)


def test_diffusers_opens_everything_but_the_quantized_weights(family: Path) -> None:
    """The other components stay loadable by anybody; the config says what the transformer is."""
    from diffusers import AutoencoderKL

    assert AutoencoderKL.from_pretrained(family / "full" / "vae") is not None
    config = json.loads((family / "full" / "transformer" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["quant_algo"]) == ("modelopt", "FP8")
    assert quantization["zimage_fp8"]["calibration"]["sigmas"][-2:] == [0.0, 0.0]
    assert "_name_or_path" not in config


def test_a_calibration_file_is_saved_and_reused(family: Path, options: CalibrationOptions) -> None:
    assert options.file is not None
    saved = options.file.read_text()
    assert saved == (family / "full" / "calibration.json").read_text()


def test_progress_reaches_the_end_of_every_stage(tiny_model: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    quantize(
        str(tiny_model),
        ["fp8-row", "fp8-row[0]"],
        tmp_path / "out",
        on_progress=lambda stage, done, total: seen.update({stage: (done, total)}),
    )
    assert set(seen) == {"writing fp8-row", "writing fp8-row[0]"}
    assert all(done == total for done, total in seen.values())


def test_the_dry_run_adds_up_from_headers_alone(tiny_model: Path, family: Path) -> None:
    source = find_unquantized(str(tiny_model))
    (job,) = plan_jobs(source, ["full"], Path("nowhere"))
    report = size_report(source, job.plan)
    with ShardReader(family / "full" / "transformer") as stored:
        assert report.bytes_after == sum(info.num_bytes for info in stored.infos.values())
        scales = sum(name.endswith("_scale") for name in stored.infos)
        assert sum(g.count for g in report.groups) >= scales / 2
    assert {group.format for group in report.groups} == {"E4M3", "BF16"}
    assert all(group.why for group in report.groups)


def test_existing_output_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ZImageError, match="already exists"):
        quantize(str(tiny_model), ["fp8-row"], tmp_path / "out")


def test_a_failure_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zimage_fp8.checkpoint.writer as writer

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_index", full_disk)
    with pytest.raises(ZImageError, match="No space left"):
        quantize(str(tiny_model), ["fp8-row"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        (["online_fp8"], "needs no checkpoint"),
        (["bf16_base"], "quantizes nothing"),
        (["all", "full"], "named twice"),
        (["best"], "unknown policy"),
    ],
)
def test_policies_that_make_no_checkpoint(
    tiny_model: Path, tmp_path: Path, policies: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        quantize(str(tiny_model), policies, tmp_path / "out")


def test_quantizing_twice_is_refused(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        quantize(str(family / "full"), ["full"], tmp_path / "out")


def test_a_quantized_checkpoint_keeps_its_policy(family: Path) -> None:
    with pytest.raises(UsageError, match="already quantized with policy 'full'"):
        load_pipeline(str(family / "full"), policy="ffn-only")
    assert load_pipeline(str(family / "full"), policy="full", device="cpu").policy == "full"


def test_scales_that_a_foreign_writer_did_not_share_load_exactly(
    family: Path, tmp_path: Path
) -> None:
    """ModelOpt writes one weight scale per shard; fusing must not requantize."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(family / "full", tmp_path / "foreign")
    key = "layers.0.attention.to_k"
    for path in (tmp_path / "foreign" / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        if f"{key}.weight" not in tensors:
            continue
        weight = tensors[f"{key}.weight"].float() * tensors[f"{key}.weight_scale"] / 8
        own = amax(weight) / 448
        tensors[f"{key}.weight"] = quantize_codes(weight, own, "e4m3")
        tensors[f"{key}.weight_scale"] = own.reshape(1)  # and of shape [1], as some write it
        save_file(tensors, path)
    block = load_pipeline(str(tmp_path / "foreign"), device="cpu").transformer.layers[0]
    packed = block.attention.to_qkv
    assert packed.weight_scale.shape == (3 * 96,)
    rows = packed.weight_scale.unflatten(0, (3, 96))
    assert (rows[1] < rows[0]).all()
    assert torch.equal(rows[0], rows[2])


def damage_scales(folder: Path) -> None:
    """NaN in one scale, zero in another; the rest of the shard as it was."""
    from safetensors.torch import load_file, save_file

    for path in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in (("to_q.weight_scale", torch.nan), ("w2.input_scale", 0.0)):
            for key in tensors:
                if key.startswith("layers.1.") and key.endswith(name):
                    tensors[key] = torch.tensor(value)
        save_file(tensors, path)


def test_impossible_scales_are_refused_with_a_list(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "full", tmp_path / "damaged")
    damage_scales(tmp_path / "damaged")
    with pytest.raises(CheckpointError) as raised:
        load_pipeline(str(tmp_path / "damaged"), device="cpu")
    assert raised.value.problems == [
        "layers.1.attention.to_q.weight_scale: is not finite",
        "layers.1.feed_forward.w2.input_scale: is 0, a scale must be positive",
    ]


def test_a_renamed_tensor_is_both_missing_and_unexpected(family: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(family / "full", tmp_path / "renamed")
    folder = tmp_path / "renamed" / "transformer"
    old, new = "layers.0.feed_forward.w2.weight", "layers.0.feed_forward.down.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if old in tensors:
            tensors[new] = tensors.pop(old)
            save_file(tensors, path)
    index = next(folder.glob("*.index.json"))
    index.write_text(index.read_text().replace(f'"{old}"', f'"{new}"'))
    with pytest.raises(CheckpointError) as raised:
        load_pipeline(str(tmp_path / "renamed"), device="cpu")
    assert raised.value.problems == [f"{old}: missing", f"{new}: unexpected"]


def test_writing_holds_one_layer_in_memory_not_the_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = peak = 0
    read = ShardReader.read

    def counted(reader: ShardReader, name: str) -> torch.Tensor:
        nonlocal live, peak
        tensor = read(reader, name)
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, release, tensor.nbytes)
        return tensor

    def release(num_bytes: int) -> None:
        nonlocal live
        live -= num_bytes

    monkeypatch.setattr(ShardReader, "read", counted)
    quantize(str(tiny_model), ["fp8-row"], tmp_path / "out")
    with ShardReader(tiny_model / "transformer") as reader:
        largest = max(info.num_bytes for info in reader.infos.values())
    assert 0 < peak <= 2 * largest


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's folder in true shapes: headers as they are, weights a hole in the file."""
    folder = tmp_path_factory.mktemp("full-size") / "model"
    for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    config = {"_class_name": "ZImageTransformer2DModel", **asdict(ZImageConfig())}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for name, shape in tensor_shapes(ZImageConfig()).items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    assert path.stat().st_size > 12e9
    assert path.stat().st_blocks * 512 < 1e6  # nothing of it is on the disk
    return folder


@pytest.mark.parametrize(
    ("policy", "saved_gib"), [("full", 5.603), ("ffn-attn-out", 4.202), ("attn-qkv-only", 1.401)]
)
def test_the_dry_run_of_the_full_size_model(full_size: Path, policy: str, saved_gib: float) -> None:
    (job,) = plan_jobs(find_unquantized(str(full_size)), [policy], Path("out"))
    report = size_report(full_size, job.plan)
    assert round(report.bytes_before / 2**30, 3) == 11.464
    saved = (report.bytes_before - report.bytes_after) / 2**30
    assert saved == pytest.approx(saved_gib, abs=0.001)


def test_a_full_disk_is_noticed_before_any_work(
    full_size: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10**9))
    with pytest.raises(ZImageError, match=r"7 checkpoints need 6\d\.\d GB, .* has 1\.0 GB free"):
        quantize(str(full_size), ["all"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_hub_s_cache_is_found_offline(tiny_model: Path, tmp_path: Path) -> None:
    """The Hub's own layout on disk, and its own code to find the way through it."""
    repo = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(tiny_model, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    command = [sys.executable, "-m", "zimage_fp8", "quantize", "somebody/tiny", "--dry-run"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "attn-out-only: transformer" in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_being_stopped_in_the_middle_leaves_nothing(
    tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A process of its own, stopped by a real signal while it writes."""
    program = (
        "import os, signal, sys, zimage_fp8.checkpoint.writer as writer\n"
        f"writer.write_index = lambda *_: os.kill(os.getpid(), {int(number)}) or signal.pause()\n"
        "sys.argv = ['zimage-fp8', *sys.argv[1:]]\n"
        "from zimage_fp8.cli import main; main()"
    )
    arguments = ["quantize", str(tiny_model), "--policy", "fp8-row", "--out", "out"]
    command = [sys.executable, "-c", program, *arguments]
    stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert list(tmp_path.iterdir()) == []
