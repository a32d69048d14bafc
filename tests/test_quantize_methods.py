"""quantize with rotation, folded channel scales, rounding by statistics and headroom, on disk."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from compare import same_bits
from short_calibration import short_calibration
from zimage_fp8.checkpoint.shards import ShardReader, raw_bytes
from zimage_fp8.checkpoint.verify import verify
from zimage_fp8.errors import UsageError
from zimage_fp8.inspect import inspect
from zimage_fp8.layout import fused_name
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.outliers import plant_outliers
from zimage_fp8.quant.calibrate import read_calibration
from zimage_fp8.quant.method import Method
from zimage_fp8.quantize import CalibrationOptions, quantize

REQUEST = ImageRequest("a house by the sea", 64, 64, steps=3, seed=4)
ALL = Method(fold=True, rounding="gptq", headroom=2)
MIXED = """
name = "mixed"
summary = "Three formats in one checkpoint."

[[rule]]
layers = "layers.0.feed_forward.w[123]"
spec = "e4m3-static"
why = "static"

[[rule]]
layers = "layers.1.*"
spec = "int8-rot"
why = "rotated"

[[rule]]
layers = "noise_refiner.0.*"
spec = "e4m3-row"
why = "per row"
"""


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With outliers, so that there is something to fold."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    plant_outliers(tiny_model, folder, 64)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    return short_calibration(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def made(
    model: Path, options: CalibrationOptions, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    (folder / "mixed.toml").write_text(MIXED)
    wanted = {
        "rot": ("int8-rot", Method()),
        "rot-gptq": ("int8-rot", Method(rounding="gptq")),
        "full": ("full", Method()),
        "full-all": ("full", ALL),
        "mixed": (str(folder / "mixed.toml"), Method()),
    }
    for name, (policy, method) in wanted.items():
        assert options.file is not None
        reused = CalibrationOptions(file=options.file, device="cpu")
        given = replace(reused, device=None) if options.file.exists() else options
        quantize(str(model), [policy], folder / name, calibration=given, method=method)
    return {name: folder / name for name in wanted}


def picture(pipeline: Pipeline) -> torch.Tensor:
    return torch.from_numpy(pipeline.generate(REQUEST).pixels)


NAMES = ("rot", "rot-gptq", "full", "full-all", "mixed")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_sound_against_its_source(
    made: dict[str, Path], model: Path, name: str
) -> None:
    assert verify(made[name], model).findings == ()


def test_a_rotated_checkpoint_draws_what_quantizing_in_memory_draws(
    made: dict[str, Path], model: Path, options: CalibrationOptions
) -> None:
    assert options.file is not None
    stored = load_pipeline(str(made["rot"]), device="cpu")
    in_memory = load_pipeline(
        str(model), policy="int8-rot", calibration=read_calibration(options.file), device="cpu"
    )
    same_bits(picture(stored), picture(in_memory))


def test_online_int8_rot_folds_nothing(made: dict[str, Path], model: Path) -> None:
    online = load_pipeline(str(model), policy="online_int8-rot", device="cpu")
    with ShardReader(model / "transformer") as reader:
        norm = reader.read("layers.0.attention_norm1.weight")
    same_bits(online.transformer.get_parameter("layers.0.attention_norm1.weight"), norm)
    assert not torch.equal(picture(online), picture(load_pipeline(str(made["rot"]), device="cpu")))
    with pytest.raises(UsageError, match="needs no checkpoint"):
        quantize(str(model), ["online_int8-rot"], made["rot"].with_name("never"))


def test_a_mixed_checkpoint_holds_each_layer_in_its_own_format(made: dict[str, Path]) -> None:
    with ShardReader(made["mixed"] / "transformer") as reader:
        kinds = {
            name: reader.infos[f"{name}.weight"].dtype
            for name in (
                "layers.0.feed_forward.w1",
                "layers.1.feed_forward.w1",
                "noise_refiner.0.attention.to_q",
                "layers.0.attention.to_q",
            )
        }
        assert list(kinds.values()) == ["F8_E4M3", "I8", "F8_E4M3", "BF16"]
        assert "layers.0.feed_forward.w1.input_scale" in reader.infos
        assert "noise_refiner.0.attention.to_q.input_scale" not in reader.infos
    facts = inspect(made["mixed"])
    assert facts["quant_method"] == "zimage-fp8"
    assert facts["quant_algo"] == ["e4m3-row", "e4m3-static", "int8-rot"]
    assert picture(load_pipeline(str(made["mixed"]), device="cpu")).shape == (64, 64, 3)


def test_diffusers_refuses_what_it_would_misread(made: dict[str, Path]) -> None:
    from diffusers import ZImageTransformer2DModel

    with pytest.raises(ValueError, match="zimage-fp8"):
        ZImageTransformer2DModel.from_pretrained(made["rot"] / "transformer")


def test_folded_static_checkpoints_stay_plain_modelopt(made: dict[str, Path], model: Path) -> None:
    """Same tensors, same config but for our own facts; only the numbers differ."""
    with (
        ShardReader(made["full"] / "transformer") as plain,
        ShardReader(made["full-all"] / "transformer") as chosen,
        ShardReader(model / "transformer") as source,
    ):
        assert chosen.infos == plain.infos
        norm = "layers.0.attention_norm1.weight"
        ratio = source.read(norm).float() / chosen.read(norm).float()
        assert torch.equal(ratio, ratio.log2().round().exp2())
        assert ratio.max() / ratio.min() >= 4
        same_bits(plain.read(norm), source.read(norm))
    configs = [
        json.loads((made[name] / "transformer" / "config.json").read_text())["quantization_config"]
        for name in ("full", "full-all")
    ]
    facts = [config.pop("zimage_fp8") for config in configs]
    assert configs[0] == configs[1]
    assert [fact["method"] for fact in facts] == [asdict(Method()), asdict(ALL)]


def test_headroom_doubles_what_an_input_scale_reaches(
    made: dict[str, Path], model: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    reused = CalibrationOptions(file=options.file)
    quantize(str(model), ["full"], tmp_path / "q", calibration=reused, method=Method(headroom=2))
    with (
        ShardReader(made["full"] / "transformer") as plain,
        ShardReader(tmp_path / "q" / "transformer") as roomy,
    ):
        for name in plain.infos:
            factor = 2 if name.endswith(".input_scale") else 1
            if factor == 2:
                same_bits(roomy.read(name), plain.read(name) * factor)
            else:
                assert raw_bytes(roomy.read(name)) == raw_bytes(plain.read(name)), name


def test_rounding_changes_codes_and_nothing_else(made: dict[str, Path]) -> None:
    with (
        ShardReader(made["rot"] / "transformer") as nearest,
        ShardReader(made["rot-gptq"] / "transformer") as rounded,
    ):
        assert rounded.infos == nearest.infos
        for name in nearest.infos:
            is_same = raw_bytes(nearest.read(name)) == raw_bytes(rounded.read(name))
            assert is_same == (nearest.infos[name].dtype != "I8"), name


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("full-all", "layers.0.attention.to_q.input_scale", "is not 2·amax/448"),
        ("full-all", "layers.0.feed_forward.w2.weight", "more than rounding explains"),
        ("full-all", "layers.0.ffn_norm1.weight", "kept in BF16 but differs"),
        ("rot", "layers.0.feed_forward.w2.weight", "codes differ"),
        ("rot", "layers.0.attention_norm1.weight", "kept in BF16 but differs"),
    ],
)
def test_damage_is_found_against_the_source(
    made: dict[str, Path], model: Path, tmp_path: Path, name: str, tensor: str, said: str
) -> None:
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(made[name], copy)
    damage(copy / "transformer", tensor)
    found = [finding.message for finding in verify(copy, model).findings]
    assert any(said in message for message in found), found


def damage(folder: Path, tensor: str) -> None:
    """Flip a bit in a quarter of a tensor's bytes, in the file."""
    import struct

    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        if tensor in header:
            start, end = header[tensor]["data_offsets"]
            step = 4 if end - start > 4 else 1
            for index in range(8 + size + start, 8 + size + end, step):
                data[index] ^= 0x20
            path.write_bytes(data)
            return
    raise AssertionError(f"{tensor} is in no file")


@pytest.mark.parametrize(
    ("policy", "method", "said"),
    [
        ("full", Method(headroom=0.5), "headroom is 0.5"),
        ("fp8-row", Method(headroom=2), "no effect on 'fp8-row'"),
        ("full", Method(rounding="up"), "rounding 'up'"),  # type: ignore[arg-type]
    ],
)
def test_a_method_that_does_nothing_is_refused(
    model: Path, tmp_path: Path, policy: str, method: Method, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        quantize(str(model), [policy], tmp_path / "q", method=method)


def test_members_of_a_group_are_rounded_together(made: dict[str, Path]) -> None:
    with ShardReader(made["full-all"] / "transformer") as reader:
        for layer in ("layers.0.attention.to_q", "layers.0.feed_forward.w3"):
            module = fused_name(layer)
            first = module.replace("to_qkv", "to_q").replace("w13", "w1")
            for leaf in ("weight_scale", "input_scale"):
                same_bits(reader.read(f"{layer}.{leaf}"), reader.read(f"{first}.{leaf}"))
