"""Damaged model folders and files: one sentence that names the file, never a stack trace."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_fp8.checkpoint.verify import verify
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.generate import check_early
from zimage_fp8.inspect import inspect
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.quant.calibrate import read_calibration
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.quantize import CalibrationOptions, quantize

Damage = Callable[[Path], object]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def config(**change: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def first_shard(folder: Path, part: str) -> Path:
    return sorted((folder / part).glob("*.safetensors"))[0]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "dim is a word": (config(dim="wide"), "dim is 'wide'"),
    "dim is null": (config(dim=None), "dim is None"),
    "no heads": (config(n_heads=0, n_kv_heads=0), "zero or negative"),
    "axes are a number": (config(axes_dims=5), "axes_dims is 5"),
    "axes do not add up": (config(axes_dims=[8, 8, 8]), "must add up"),
    "two axes": (config(axes_lens=[8, 8]), "three entries"),
    "config is a list": (text("transformer/config.json", "[1]"), "expected an object"),
    "model index is a list": (text("model_index.json", "[1]"), "holds a list, expected an object"),
    "shard index names a path": (
        text("transformer/x.safetensors.index.json", '{"weight_map": {"a": "../b"}}'),
        "index files",
    ),
    "scheduler is a list": (text("scheduler/scheduler_config.json", "[1]"), "scheduler"),
    "shift is a word": (
        text(
            "scheduler/scheduler_config.json",
            '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "x"}',
        ),
        "shift is 'x', expected a number",
    ),
    "VAE config is broken": (text("vae/config.json", "{"), "vae/config.json cannot be read"),
    "VAE weights are empty": (
        lambda f: first_shard(f, "vae").write_bytes(b""), "vae: 1 problem",
    ),
    "text encoder is empty": (
        lambda f: first_shard(f, "text_encoder").write_bytes(b""), "text encoder cannot be loaded",
    ),
    "tokenizer is broken": (text("tokenizer/tokenizer.json", "{"), "tokenizer.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_model_is_one_sentence(model: Path, case: str) -> None:
    damage, said = DAMAGES[case]
    damage(model)
    with pytest.raises(ZImageError, match=said):
        load_pipeline(str(model), device="cpu")


@pytest.mark.parametrize("content", ["[1]", "{", "5", '"x"'])
def test_a_picture_with_damaged_facts(tmp_path: Path, content: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    facts.add_itxt("zimage_fp8", content)
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png", pnginfo=facts)
    with pytest.raises(ZImageError, match="damaged"):
        inspect(tmp_path / "p.png")


def test_folders_where_files_are_expected(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(ZImageError, match=r"d\.toml"):
        find_policy(str(tmp_path / "d.toml"))
    with pytest.raises(ZImageError, match="calibration file"):
        read_calibration(tmp_path)


def static_options(folder: Path) -> CalibrationOptions:
    (folder / "prompts.txt").write_text("a house\n")
    return CalibrationOptions(
        file=folder / "calibration.json",
        prompts=folder / "prompts.txt",
        forwards=2,
        size=(32, 32),
        device="cpu",
    )


def test_a_checkpoint_never_writes_into_its_source(model: Path, tmp_path: Path) -> None:
    """Files that are edited by hand are copies; the calibration in the source is not brought."""
    quantize(str(model), ["full"], tmp_path / "one", calibration=static_options(model))
    kept = (model / "calibration.json").read_bytes()
    (model / "calibration.json").write_text("{}")
    other = CalibrationOptions(forwards=3, size=(48, 32), device="cpu")
    quantize(str(model), ["full"], tmp_path / "two", calibration=other)
    assert (tmp_path / "one" / "calibration.json").read_bytes() == kept
    assert (model / "calibration.json").read_text() == "{}"
    for name in ("vae/config.json", "model_index.json"):
        assert not os.path.samefile(model / name, tmp_path / "one" / name)
    weights = first_shard(model, "vae").relative_to(model)
    assert os.path.samefile(model / weights, tmp_path / "one" / weights)


def test_checkpoints_inside_the_model_s_folder_do_not_nest(model: Path) -> None:
    quantize(str(model), ["fp8-row", "fp8-row[0]", "fp8-row[1]"], model / "q")
    for policy in ("fp8-row", "fp8-row[0]", "fp8-row[1]"):
        assert not (model / "q" / policy / "q").exists()


def test_components_behind_symbolic_links_are_brought(model: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for path in model.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    quantize(str(tmp_path / "linked"), ["fp8-row"], tmp_path / "out")
    assert load_pipeline(str(tmp_path / "out"), device="cpu").policy == "fp8-row"


@pytest.mark.parametrize("leaf", ["weight_scale", "input_scale"])
def test_inverted_scales_are_found_without_the_source(
    model: Path, tmp_path: Path, leaf: str
) -> None:
    from safetensors.torch import load_file, save_file

    quantize(str(model), ["full"], tmp_path / "out", calibration=static_options(tmp_path))
    for path in (tmp_path / "out" / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: 1 / t if n.endswith(leaf) else t for n, t in tensors.items()}, path)
    found = verify(tmp_path / "out")
    assert {f.where.rpartition(".")[2] for f in found.findings if f.level == "error"} == {leaf}
    assert sum(f.level == "error" for f in found.findings) == 28


@pytest.mark.parametrize("value", ["NaN", "-1.0", "Infinity"])
def test_a_calibration_with_impossible_maxima_is_refused(
    model: Path, tmp_path: Path, value: str
) -> None:
    options = static_options(tmp_path)
    assert options.file is not None
    quantize(str(model), ["full"], tmp_path / "out", calibration=options)
    raw = json.loads(options.file.read_text())
    raw["amax"]["layers.0.attention.to_q"][1] = float(value)
    options.file.write_text(json.dumps(raw))
    with pytest.raises(ZImageError, match=r"layers\.0\.attention\.to_q"):
        read_calibration(options.file)


def test_nan_in_the_source_makes_no_checkpoint(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "layers.0.attention.to_q.weight"
    for path in (model / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3, 3] = float("nan")
            save_file(tensors, path)
    with pytest.raises(ZImageError, match=f"{name} of the source holds NaN"):
        quantize(str(model), ["fp8-row"], tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "options",
    [
        CalibrationOptions(size=(32, 32)),
        CalibrationOptions(forwards=3),
        CalibrationOptions(file=Path("c.json")),
    ],
)
def test_calibration_options_without_a_static_policy_are_refused(
    model: Path, tmp_path: Path, options: CalibrationOptions
) -> None:
    with pytest.raises(UsageError, match="nothing is calibrated"):
        quantize(str(model), ["fp8-row"], tmp_path / "out", calibration=options)


def test_calibration_options_beside_an_existing_calibration_are_refused(
    model: Path, tmp_path: Path
) -> None:
    options = static_options(tmp_path)
    quantize(str(model), ["full"], tmp_path / "out", calibration=options)
    with pytest.raises(UsageError, match="is reused"):
        quantize(str(model), ["full"], tmp_path / "again", calibration=options)
    assert options.file is not None
    reused = CalibrationOptions(file=options.file)
    quantize(str(model), ["full"], tmp_path / "again", calibration=reused)
    with pytest.raises(UsageError, match="has no effect"):
        load_pipeline(
            str(tmp_path / "out"), calibration=read_calibration(options.file), device="cpu"
        )


def test_the_last_seed_is_checked_before_the_first_picture(tmp_path: Path) -> None:
    request = ImageRequest("a house", 64, 64, seed=2**63 - 1)
    check_early(request, tmp_path / "a.png", 1)
    with pytest.raises(UsageError, match="seed"):
        check_early(request, tmp_path / "a.png", 2)
