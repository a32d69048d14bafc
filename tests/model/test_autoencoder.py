"""Our autoencoder against diffusers', the same weights and the same bits; what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from compare import same_bits
from zimage_fp8.errors import CheckpointError, ModelError
from zimage_fp8.model.autoencoder import load_autoencoder
from zimage_fp8.model.source import find_model

CPU = torch.device("cpu")


@pytest.fixture(params=["nano", "with quant convolutions, without attention"])
def vae(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "nano":
        return find_model("nano") / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_both_halves_compute_diffusers_bits(vae: Path, dtype: torch.dtype) -> None:
    theirs = AutoencoderKL.from_pretrained(vae, torch_dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, theirs.config.latent_channels, 9, 6, generator=generator).to(dtype)
    picture = torch.rand(1, 3, 72, 48, generator=generator).mul(2).sub(1).to(dtype)
    decoder = load_autoencoder(vae, "decoder", dtype, CPU)
    encoder = load_autoencoder(vae, "encoder", dtype, CPU)
    same_bits(decoder.decode(z), theirs.decode(z, return_dict=False)[0])
    same_bits(encoder.encode(picture), theirs.encode(picture, return_dict=False)[0].mode())


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    shutil.copytree(find_model("nano") / "vae", tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("*.safetensors"))
    state = load_file(file)
    del state["encoder.conv_in.weight"]
    state["decoder.conv_in.bias"] = torch.zeros(3)
    state["decoder.conv_out.bias"] = torch.zeros(3, dtype=torch.int8)
    state["decoder.extra"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(tmp_path, "decoder", torch.float32, CPU)
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named == {
        *("encoder.conv_in.weight", "decoder.conv_in.bias", "decoder.conv_out.bias"),
        "decoder.extra",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
        ("act_fn", "relu"),
        ("latents_mean", [0.0]),
        ("scaling_factor", None),
    ],
)
def test_another_kind_of_autoencoder_is_refused_by_its_key(
    tmp_path: Path, key: str, value: object
) -> None:
    raw = json.loads((find_model("nano") / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ModelError, match=key):
        load_autoencoder(tmp_path, "decoder", torch.float32, CPU)
