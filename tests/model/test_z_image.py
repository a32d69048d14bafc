"""Our transformer against diffusers', same weights, same latents, fp32."""

from pathlib import Path

import pytest
import torch

from compare import relative_error
from zimage_fp8.errors import CheckpointError
from zimage_fp8.layout import read_config
from zimage_fp8.model.source import NANO_FOLDER
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.model.z_image import (
    ZImageTransformer,
    pad_captions,
    patchify,
    unpatchify,
)

# fp32 sums of another order; measured 4.8e-7 on nano, the largest of these.
TOLERANCE = 1e-6


def ours(folder: Path) -> ZImageTransformer:
    loaded = load_transformer(
        folder / "transformer",
        policy=None,
        calibration=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return loaded.model


def theirs(folder: Path) -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module", params=["nano", "tiny"])
def pair(request: pytest.FixtureRequest, tiny_model: Path) -> tuple[ZImageTransformer, object]:
    folder = NANO_FOLDER if request.param == "nano" else tiny_model
    return ours(folder), theirs(folder)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (32, 32, (20, 20)),  # 256 patches, one bucket, equal lengths
        (16, 40, (31, 32)),  # not square; up to the border
        (40, 16, (33, 64)),  # the second bucket, from its first token to its last
        (6, 10, (5, 9)),  # 15 patches: the image itself needs padding tokens
    ],
)
def test_equals_diffusers(
    pair: tuple[ZImageTransformer, torch.nn.Module],
    height: int,
    width: int,
    tokens: tuple[int, int],
) -> None:
    model, reference = pair
    generator = torch.Generator().manual_seed(height * width)
    dim = model.config.cap_feat_dim
    latent = torch.randn(2, 16, height, width, generator=generator)
    captions = [torch.randn(n, dim, generator=generator) for n in tokens]
    t = torch.tensor([0.0, 0.7])
    with torch.inference_mode():
        out = model(latent, t, model.refine_caption(*pad_captions(captions)))
        frames = [one.unsqueeze(1) for one in latent]
        expected = torch.stack(reference(frames, t, captions, return_dict=False)[0]).squeeze(2)
    assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"dim": 48, "n_layers": 1, "n_refiner_layers": 2, "n_heads": 3, "axes_dims": [4, 6, 6]},
        {"dim": 144, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "axes_dims": [24, 32, 16]},
        {"dim": 288, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 9, "axes_dims": [8, 12, 12]},
    ],
    ids=["narrow", "few heads", "wider than the time"],
)
def test_random_configs_equal_diffusers(tmp_path: Path, config: dict[str, object]) -> None:
    from diffusers import ZImageTransformer2DModel

    from tiny import disturb_constants

    torch.manual_seed(0)
    reference = ZImageTransformer2DModel(
        **config, n_kv_heads=config["n_heads"], cap_feat_dim=24, axes_lens=[256, 32, 32]
    ).eval()
    disturb_constants(reference)
    reference.save_pretrained(tmp_path / "transformer")
    model = ours(tmp_path)
    latent, t, captions = torch.randn(1, 16, 10, 14), torch.tensor([0.3]), [torch.randn(40, 24)]
    with torch.inference_mode():
        out = model(latent, t, model.refine_caption(*pad_captions(captions)))
        (expected,) = reference([latent[0].unsqueeze(1)], t, captions, return_dict=False)[0]
    assert relative_error(out[0], expected.squeeze(1)) <= TOLERANCE


def test_a_step_of_training_after_drawing_a_picture(tiny_model: Path) -> None:
    """Tables remembered under inference mode must not break a later backward."""
    model = ours(tiny_model)
    caption, is_pad = torch.randn(1, 32, 32), torch.zeros(1, 32, dtype=torch.bool)
    latent, t = torch.randn(1, 16, 22, 6), torch.tensor([0.3])
    with torch.inference_mode():
        model(latent, t, model.refine_caption(caption, is_pad))
    model.requires_grad_(True)
    model(latent, t, model.refine_caption(caption, is_pad)).square().mean().backward()
    assert model.layers[0].attention.to_qkv.weight.grad.abs().sum() > 0


def test_captions_of_different_buckets_do_not_share_a_batch() -> None:
    with pytest.raises(ValueError, match=r"\[32, 64\]"):
        pad_captions([torch.zeros(32, 4), torch.zeros(33, 4)])


def test_padding_marks_only_what_was_added() -> None:
    batch, is_pad = pad_captions([torch.ones(30, 4), torch.ones(32, 4)])
    assert batch.shape == (2, 32, 4)
    assert is_pad.sum(1).tolist() == [2, 0]
    assert (batch[0, 30:] == 0).all()


def test_patchify_is_undone_by_unpatchify() -> None:
    latent = torch.arange(2 * 16 * 6 * 4.0).reshape(2, 16, 6, 4)
    assert torch.equal(unpatchify(patchify(latent), 6, 4), latent)


def test_loading_reports_everything_that_is_wrong_at_once(tiny_model: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "transformer"
    shutil.copytree(tiny_model / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": 3, "cap_feat_dim": 64}))
    assert read_config(folder)[0].n_layers == 3
    with pytest.raises(CheckpointError) as raised:
        ours(tmp_path)
    problems = raised.value.problems
    assert "layers.2.attention.to_q.weight: missing" in problems
    assert "cap_embedder.0.weight: shape [32], expected [64]" in problems
