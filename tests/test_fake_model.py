"""The generator of random full-size models: what it writes loads, runs and says what it is."""

import json
from pathlib import Path

import pytest
import torch

import fake_model
from compare import same_bits
from fake_model import GAIN, SCALES, TEXT_FULL, WARNING, random_tensor, text_shapes
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import UsageError
from zimage_fp8.layout import ZImageConfig, tensor_shapes
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest

WEIGHTED = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fake") / "random-tiny"
    fake_model.write_fake_model(out, "tiny")
    return out


def test_loads_and_draws_a_finite_picture(folder: Path) -> None:
    pipeline = load_pipeline(str(folder), device="cpu")
    image = pipeline.generate(ImageRequest("a red apple", 128, 64, steps=8))
    assert image.nfe == 8
    assert image.pixels.std() > 10  # noise, neither black nor grey


def test_activations_stay_near_one_through_eight_forwards(folder: Path) -> None:
    """The widths differ from the full model's, the gain of every layer does not."""
    pipeline = load_pipeline(str(folder), device="cpu")
    largest: dict[str, float] = {}

    def record(name: str) -> object:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            rms = output.float().pow(2).mean().sqrt().item()
            largest[name] = max(largest.get(name, 0.0), rms)

        return hook

    for name, module in pipeline.transformer.named_modules():
        if not list(module.children()) or name.startswith("layers."):
            module.register_forward_hook(record(name))  # type: ignore[arg-type]
    pipeline.generate(ImageRequest("a red apple", 64, 64, steps=8))
    assert max(largest.values()) < 20
    blocks = [rms for name, rms in largest.items() if name.count(".") == 1]
    assert min(blocks) > 0.1


def test_the_full_model_has_the_originals_sizes() -> None:
    transformer = sum(map(_numel, tensor_shapes(ZImageConfig()).values()))
    assert transformer == 6_154_908_736
    assert sum(map(_numel, text_shapes(TEXT_FULL).values())) == 4_022_468_096
    _, vae, _ = fake_model._weights(SCALES["full"])["vae"]
    assert sum(map(_numel, vae.values())) == 83_819_683


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_every_file_says_that_it_is_random(folder: Path) -> None:
    assert WARNING in (folder / "README.md").read_text()
    for config in ("model_index.json", *(f"{p}/config.json" for p in WEIGHTED)):
        assert json.loads((folder / config).read_text())["_name_or_path"] == WARNING
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 2


def test_one_seed_is_one_model(folder: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "random-again", tmp_path / "random-other"
    fake_model.write_fake_model(again, "tiny", parts=["transformer"])
    fake_model.write_fake_model(other, "tiny", parts=["transformer"], seed=1)
    assert not (again / "vae").exists()
    for file in (folder / "transformer").iterdir():
        same = file.read_bytes() == (again / "transformer" / file.name).read_bytes()
        assert same
    with ShardReader(folder / "transformer") as ours, ShardReader(other / "transformer") as theirs:
        assert ours.fingerprint() != theirs.fingerprint()


def test_weights_biases_and_norms_have_their_own_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_tensor("a.weight", (512, 3840), generator).float()
    assert weight.std().item() == pytest.approx(GAIN / 3840**0.5, rel=0.01)
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(random_tensor("a.bias", (4096,), generator).float().mean()) < 0.01
    norm = random_tensor("norm.weight", (4096,), generator).float()
    assert norm.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [("model", None, "must contain 'random'"), ("random", ["unet"], "unet")],
)
def test_bad_requests_are_refused(
    tmp_path: Path, name: str, parts: list[str] | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        fake_model.write_fake_model(tmp_path / name, "tiny", parts=parts)
    (tmp_path / "random-there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        fake_model.write_fake_model(tmp_path / "random-there", "tiny")


@pytest.mark.gpu
def test_cuda_draws_the_same_model_twice(tmp_path: Path) -> None:
    folders = [tmp_path / "random-a", tmp_path / "random-b"]
    for out in folders:
        fake_model.write_fake_model(out, "tiny", parts=["transformer"], device=torch.device("cuda"))
    with (
        ShardReader(folders[0] / "transformer") as one,
        ShardReader(folders[1] / "transformer") as two,
    ):
        for name in one.infos:
            same_bits(two.read(name), one.read(name))
            assert one.read(name).isfinite().all()
