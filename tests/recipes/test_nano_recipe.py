"""The recipe of nano at toy size: what it promises about data, training and the exported folder."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from compare import relative_error, same_bits
from recipes.nano import autoencoder, captions, denoiser, export, retrieval, weights
from recipes.nano.captions import Scene, Thing, combine, is_held_out_pair
from recipes.nano.denoiser import Denoiser, build_text_encoder, encode_text, flow_loss, sample
from recipes.nano.masters import Masters
from recipes.nano.rows import RowWriter
from recipes.nano.scenes import (
    ONE_JITTER,
    ONE_LONGEST,
    TWO_JITTER,
    TWO_LONGEST,
    TWO_OFFSET,
    Cutouts,
    Placement,
)
from recipes.nano.schedule import Schedule, lr_factor
from recipes.nano.shape import LONG, SHORT, TINY
from recipes.nano.team import Team
from recipes.nano.tokenizer import PAD, Captioner
from recipes.nano.training import bucket_of
from recipes.nano.workspace import Workspace
from tiny import disturb_constants
from zimage_fp8.model.source import NANO_FOLDER
from zimage_fp8.model.weights import load_transformer

CPU = torch.device("cpu")
VOCABULARY = 2944  # the shipped tokenizer's, rounded up

# The labels of most tokens, and some of the shortest, with colours from one end to the other.
NAMES = {
    "face with open eyes and hand over mouth": (255, 200, 60),
    "hand with index finger and thumb crossed": (250, 190, 70),
    "smiling cat with heart-eyes": (240, 170, 30),
    "speak-no-evil monkey": (120, 80, 50),
    "globe showing asia-australia": (60, 140, 220),
    "fork and knife with plate": (200, 200, 205),
    "jack-o-lantern": (245, 130, 20),
    "front-facing baby chick": (250, 210, 60),
    "octopus": (220, 60, 110),
    "umbrella": (110, 60, 180),
    "penguin": (40, 40, 48),
    "teapot": (230, 230, 235),
}
TAGS = ("animal", "food", "hand", "eye", "face", "a word that labels never use")


def thing(name: str) -> Thing:
    return Thing(name, code="", group="", tags=TAGS, offset=0, length=0)


@pytest.fixture(scope="module")
def things() -> list[Thing]:
    return [thing(name) for name in NAMES]


@pytest.fixture(scope="module")
def captioner(things: list[Thing]) -> Captioner:
    return Captioner(NANO_FOLDER / "tokenizer", things)


@pytest.fixture(scope="module")
def mean_rgb() -> np.ndarray:
    return np.array(list(NAMES.values()), np.float64)


# Captions


def all_scenes() -> list[Scene]:
    """Every object alone and beside the wordiest one, on colours of one word and of two."""
    return [
        Scene(first, color, second)
        for color in (captions.COLORS.index("red"), captions.COLORS.index("lime green"))
        for first in range(len(NAMES))
        for second in (None, 0)
    ]


def test_captions_stay_in_their_buckets(captioner: Captioner) -> None:
    """By `encode`, which raises past a bucket's end; a long caption passes the shorter bucket's."""
    rng = np.random.default_rng(0)
    scenes = all_scenes()
    captioner.encode([text for scene in scenes for text in captioner.short(scene, rng, 3)], SHORT)
    long = captioner.encode([captioner.long(scene, rng) for scene in scenes], LONG)
    assert ((long != PAD).sum(1) > SHORT).all()


def test_every_label_fits_every_template_of_one_object(
    captioner: Captioner, things: list[Thing]
) -> None:
    color = captions.COLORS.index("lime green")
    texts = [
        text
        for first in range(len(things))
        for text in captions.short_captions(Scene(first, color), things)
    ]
    assert len(texts) == len(things) * len(captions.SHORT_ONE)
    captioner.encode(texts, SHORT)


def test_words_of_labels_and_templates_are_single_tokens(captioner: Captioner) -> None:
    assert captioner.vocab_size == VOCABULARY
    num_tokens = {word: captioner.num_words(word) for word in captioner.known}
    assert {word: n for word, n in num_tokens.items() if n != 1} == {}


def test_the_left_object_is_named_first(things: list[Thing]) -> None:
    for text in captions.short_captions(Scene(10, 0, 11), things):
        assert text.index("penguin") < text.index("teapot"), text


def test_training_rows_hold_nothing_that_is_held_out(
    captioner: Captioner, mean_rgb: np.ndarray
) -> None:
    combinations = combine(mean_rgb)
    assert combinations.held_out.any()
    rows = RowWriter(captioner, combinations.trained).write(400, seed=(0,))
    first, second, color = rows.scenes.T
    pairs = rows.scenes[rows.num_one :]
    assert (second[: rows.num_one] == -1).all()
    assert not combinations.held_out[first, color].any()
    assert not combinations.held_out[pairs[:, 1], pairs[:, 2]].any()
    assert not any(is_held_out_pair(int(left), int(right)) for left, right, _ in pairs)
    assert any(is_held_out_pair(a, b) for a in range(len(NAMES)) for b in range(a))


def test_rows_depend_on_nothing_but_their_seed(captioner: Captioner, mean_rgb: np.ndarray) -> None:
    writer = RowWriter(captioner, combine(mean_rgb).trained)
    one, same, other = (writer.write(20, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    for field in ("scenes", "short", "long"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
        assert not np.array_equal(getattr(one, field), getattr(other, field))


def test_every_object_keeps_enough_colours(mean_rgb: np.ndarray) -> None:
    combinations = combine(mean_rgb)
    assert combinations.allowed.sum(1).min() >= 4
    assert combinations.trained.sum(1).min() >= 3


def test_two_of_nine_batches_have_long_captions() -> None:
    assert [bucket_of(step) for step in range(900)].count(LONG) == 200


# Schedule


@pytest.mark.parametrize("set_up_s", [0.0, 14.3, 95.4])
def test_resumed_runs_end_at_exactly_one(set_up_s: float) -> None:
    spent = done = 0.0
    for run_s in (245.0, 545.0, 330.0):
        schedule = Schedule(time.monotonic() - set_up_s, run_s, 1120.0, spent, done)
        schedule.begin()
        assert schedule.progress(schedule.trained_from) == done
        over = run_s + 0.7  # the last step ends late
        assert schedule.is_over(over)
        state = schedule.state_dict(over)
        assert state["done"] > done
        spent, done = state["spent_s"], state["done"]
    assert done == 1


def test_a_run_that_only_sets_up_makes_no_progress() -> None:
    schedule = Schedule(time.monotonic() - 60, 50.0, 1000.0, 200.0, 0.25)
    schedule.begin()
    assert schedule.state_dict(60.0) == {"spent_s": 260.0, "done": 0.25}


def test_the_learning_rate_warms_up_in_steps() -> None:
    assert [lr_factor(0.0, step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_learning_rate_falls_as_a_cosine_to_two_percent() -> None:
    factors = [lr_factor(i / 100, 1000, 500) for i in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert [factors[i] for i in (0, 50, 100)] == pytest.approx([1.0, 0.51, 0.02])


# Masters

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95)}
DECAY = 0.1
NEVER, ALWAYS = 1e9, 0.1  # norms to clip at


def small_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(20, 7, bias=False)
    )


def small_loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return model(torch.randn(6, 3, 4, 4, generator=generator).to(dtype)).float().pow(2).mean()


def masters_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Masters:
    return Masters(model.named_parameters(), dtype, **ADAMW, weight_decay=DECAY, ema=0.9)


def train(model: nn.Module, masters: Masters, steps: range, max_norm: float = NEVER) -> None:
    for step in steps:
        small_loss(model, step).backward()
        masters.step(1 / (1 + step), Team(), max_norm)


@pytest.mark.parametrize("max_norm", [NEVER, ALWAYS])
def test_flat_buffers_step_like_separate_parameters(max_norm: float) -> None:
    """Gradients and norms are fp32 sums of another order: measured 1.4e-7 after four steps."""
    flat, plain = small_model(0), small_model(0)
    train(flat, masters_of(flat), range(4), max_norm)

    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        **ADAMW,
    )
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = ADAMW["lr"] / (1 + step)
        optimizer.zero_grad()
        small_loss(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        optimizer.step()

    for parameter, expected in zip(flat.parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.detach(), expected.detach()) <= 3e-7


def test_bf16_parameters_are_the_masters_rounded() -> None:
    model = small_model(0)
    masters = masters_of(model, torch.bfloat16)
    train(model, masters, range(3))
    for group in masters.groups:
        same_bits(group.compute, group.master.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_young_average_forgets_the_initial_weights() -> None:
    """Its first decay is a tenth, whatever the final one."""
    model = small_model(0)
    masters = masters_of(model)
    before = masters.groups[0].master.detach().clone()
    train(model, masters, range(1))
    after = masters.groups[0].master.detach()
    same_bits(masters.groups[0].average, before.lerp(after, 1 - 0.1))


def test_training_goes_on_from_saved_state_as_if_never_stopped(tmp_path: Path) -> None:
    whole = small_model(0)
    masters = masters_of(whole)
    train(whole, masters, range(3))
    weights.save_state(masters.state_dict(), tmp_path / "train.pt")
    train(whole, masters, range(3, 6))
    masters.use_average()

    resumed = small_model(1)
    masters = masters_of(resumed)
    masters.load_state_dict(torch.load(tmp_path / "train.pt"))
    train(resumed, masters, range(3, 6))
    masters.use_average()
    for parameter, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        same_bits(parameter, expected)


def test_state_of_another_model_is_refused() -> None:
    state = masters_of(small_model(0)).state_dict()
    with pytest.raises(ValueError, match="another shape"):
        masters_of(nn.Linear(2, 2)).load_state_dict(state)


def test_a_team_of_one_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    team, gradient = Team(), torch.tensor([3.0, -1.0])
    team.average([gradient])
    assert (team.size, team.rank, team.agree(0.1)) == (1, 0, 0.1)
    assert gradient.tolist() == [3.0, -1.0]
    team.leave()


# Scenes: a pack of a wide, a tall and a square object, each of one colour

PACK = {
    "hamburger": ((40, 20), (220, 40, 40)),
    "teapot": ((20, 40), (40, 60, 220)),
    "penguin": ((30, 30), (20, 200, 40)),
}
RED, BLUE = 0, 1


def picture(size: tuple[int, int], rgb: tuple[int, int, int]) -> bytes:
    """A rectangle off the middle of a transparent canvas, as PNG."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*rgb, 255), (5, 9, 5 + size[0], 9 + size[1]))
    file = BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    entries, blob = [], b""
    for name, (size, rgb) in PACK.items():
        drawn = picture(size, rgb)
        place = {"offset": len(blob), "length": len(drawn)}
        entries.append({"name": name, "code": "", "group": "all", "tags": ["food"]} | place)
        blob += drawn
    (folder / "pictures.bin").write_bytes(blob)
    (folder / "objects.json").write_text(json.dumps(entries))
    (folder / "tokenizer.json").write_bytes((NANO_FOLDER / "tokenizer/tokenizer.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def cutouts(data: Path) -> Cutouts:
    return Cutouts(data, captions.load_things(data, None), CPU)


def box(visible: Tensor) -> tuple[float, float, int, int]:
    """Middle (from the picture's) and size of what is True: dx, dy, width, height."""
    rows, columns = visible.any(1).nonzero().flatten(), visible.any(0).nonzero().flatten()
    left, right = int(columns[0]), int(columns[-1]) + 1
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return (left + right) / 2 - 128, (top + bottom) / 2 - 128, right - left, bottom - top


def looks_like(image: Tensor, name: str) -> Tensor:
    """Pixels of an image in -1..1 within 40 levels of an object's colour: bool [256, 256]."""
    rgb = torch.tensor(PACK[name][1])[:, None, None]
    return ((image + 1) * 127.5 - rgb).abs().amax(0) < 40


def test_an_object_lies_where_it_is_placed(cutouts: Cutouts) -> None:
    at = Placement.at(200, 20, -12, 1, CPU)
    placed = cutouts.place(torch.tensor([RED]), at, small=False)[0]
    dx, dy, width, height = box(placed[3] > 0.5)
    assert (dx, dy) == pytest.approx((20, -12), abs=1)
    assert (width, height) == pytest.approx((200, 100), abs=2)
    assert (placed[:3] <= placed[3:]).all(), "premultiplied colours exceed their coverage"


def test_the_mean_colour_is_that_of_visible_pixels(cutouts: Cutouts) -> None:
    expected = np.array([rgb for _, rgb in PACK.values()])
    assert np.abs(cutouts.mean_rgb() - expected).max() < 1


def test_one_object_stands_near_the_middle_of_a_plain_colour(cutouts: Cutouts) -> None:
    torch.manual_seed(0)
    color = captions.COLORS.index("white")
    for image in cutouts.one(torch.full((8,), RED), torch.full((8,), color)):
        dx, dy, width, height = box(looks_like(image, "hamburger"))
        assert max(abs(dx), abs(dy)) <= ONE_JITTER + 1
        assert ONE_LONGEST[0] - 2 <= max(width, height) <= ONE_LONGEST[1] + 2
        background = ((image[:, 0, 0] + 1) * 127.5).tolist()
        assert background == pytest.approx(captions.PALETTE["white"], abs=0.01)


def test_of_two_objects_the_first_stands_left(cutouts: Cutouts) -> None:
    torch.manual_seed(0)
    first, second = torch.full((8,), RED), torch.full((8,), BLUE)
    for image in cutouts.two(first, second, torch.full((8,), captions.COLORS.index("cream"))):
        for name, middle in (("hamburger", -TWO_OFFSET), ("teapot", TWO_OFFSET)):
            dx, dy, width, height = box(looks_like(image, name))
            assert abs(dx - middle) <= TWO_JITTER + 1
            assert abs(dy) <= TWO_JITTER + 1
            assert TWO_LONGEST[0] - 2 <= max(width, height) <= TWO_LONGEST[1] + 2


def test_rows_are_drawn_singles_first(cutouts: Cutouts) -> None:
    scenes = torch.tensor([[RED, -1, 12], [BLUE, RED, 12]])
    single, pair = cutouts.draw(scenes, num_one=1)
    assert not looks_like(single, "teapot").any()
    assert box(looks_like(pair, "teapot"))[0] < 0 < box(looks_like(pair, "hamburger"))[0]


def test_retrieval_tells_objects_and_backgrounds(cutouts: Cutouts) -> None:
    left, right = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    colors = torch.tensor([12, 15, 14])
    torch.manual_seed(0)
    images = cutouts.two(left, right, colors)
    for objects, search in ((left, retrieval.LEFT), (right, retrieval.RIGHT)):
        distance = retrieval.distances(images, colors, search, cutouts)
        assert retrieval.ranks(distance, objects).tolist() == [0, 0, 0]
    assert torch.equal(retrieval.nearest_colors(images, cutouts.palette), colors)


# Weights in pieces


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_return_what_was_saved(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.randn(20, 15) for i in range(5)}
    state["permuted"] = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    files = weights.save_pieces(state, tmp_path, "part", {"steps": 3})
    assert len(files) == 5  # 600 bytes each, the small last one beside another
    loaded, facts = weights.load_pieces(tmp_path, "part")
    assert facts == {"steps": 3}
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        same_bits(loaded[name], tensor.to(torch.bfloat16))


@pytest.mark.usefixtures("small_pieces")
def test_saving_again_leaves_no_old_piece(tmp_path: Path) -> None:
    weights.save_pieces({f"{i}": torch.ones(400) for i in range(3)}, tmp_path, "part", {})
    weights.save_pieces({"only": torch.ones(2)}, tmp_path, "part", {})
    assert weights.load_pieces(tmp_path, "part")[0].keys() == {"only"}


@pytest.mark.usefixtures("small_pieces")
def test_a_missing_piece_is_an_error(tmp_path: Path) -> None:
    files = weights.save_pieces({f"{i}": torch.ones(400) for i in range(3)}, tmp_path, "part", {})
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="2 pieces"):
        weights.load_pieces(tmp_path, "part")


# Denoiser


def disturbed(build: Callable[[], nn.Module]) -> nn.Module:
    """Random, with nothing left at zero or one: every parameter shows."""
    torch.manual_seed(0)
    model = build()
    disturb_constants(model)
    return model


def test_encode_text_is_the_last_hidden_state_but_one() -> None:
    """Of transformers' own forward. Measured equal; the margin is for other orders of sums."""
    shape = replace(TINY, text_dim=128)  # two heads, one of keys and values
    model = disturbed(lambda: build_text_encoder(shape, 100)).eval()
    ids = torch.randint(1, 100, (2, SHORT))
    ids[0, 20:] = PAD
    with torch.no_grad():
        ours = encode_text(model, ids)
        theirs = model(ids, attention_mask=(ids != PAD).long(), output_hidden_states=True)
    expected = theirs.hidden_states[-2]
    for row, tokens in ((0, 20), (1, SHORT)):
        assert relative_error(ours[row, :tokens], expected[row, :tokens]) <= 3e-7


def test_all_that_is_trained_gets_a_gradient_even_after_sampling() -> None:
    """Sampling fills memories, such as of rotary tables, that training then reads."""
    model = disturbed(lambda: Denoiser(TINY, 100))
    latent, ids = torch.randn(2, 16, 32, 32), torch.randint(1, 100, (2, SHORT))
    ids[:, 20:] = PAD
    sample(model, ids, latent, steps=2)
    flow_loss(model, latent, ids).backward()
    trained = dict(model.trained_parameters())
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained.keys()
    assert all(p.grad.abs().max() > 0 for p in trained.values())


def test_a_new_denoiser_predicts_zero() -> None:
    """Its blocks start as the identity and its final layer at zero."""
    model = Denoiser(TINY, 100)
    with torch.no_grad():
        out = model(torch.randn(1, 16, 32, 32), torch.tensor([0.5]), torch.ones(1, SHORT).long())
    assert (out == 0).all()


# Export


@pytest.fixture(scope="module")
def exported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, Path]:
    """A random tiny model saved in pieces, and the folder exported from them.

    `export` itself compares pictures with diffusers' pipeline and raises when they differ.
    """
    work = Workspace(tmp_path_factory.mktemp("work"), data)
    model = disturbed(lambda: Denoiser(TINY, VOCABULARY)).eval()
    weights.save_pieces(model.state_dict(), work.weights, denoiser.STEM, {"steps": 0})
    vae = disturbed(lambda: autoencoder.build_autoencoder(TINY))
    facts = {"scaling_factor": 0.8, "shift_factor": 0.1}
    weights.save_pieces(vae.state_dict(), work.weights, autoencoder.STEM, facts)
    export.export(work, replace(TINY, num_objects=None), work.weights, work.model)
    weights.set_dtype(weights.set_dtype(model, torch.bfloat16), torch.float32)
    return model, work.model


def test_the_package_loads_what_was_exported(exported: tuple[Denoiser, Path]) -> None:
    model, folder = exported
    loaded = load_transformer(
        folder / "transformer", policy=None, calibration=None, dtype=torch.float32, device=CPU
    )
    latent, t = torch.randn(2, 16, 32, 32), torch.tensor([0.2, 0.9])
    ids = torch.randint(1, VOCABULARY, (2, SHORT))
    with torch.no_grad():
        caption = model.caption(ids)
        same_bits(loaded.model(latent, t, caption), model.transformer(latent, t, caption))


def test_exported_weights_are_readable_by_everyone(exported: tuple[Denoiser, Path]) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in exported[1].rglob("*.safetensors")}
    assert modes
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("name", export.COMPANIONS)
def test_notice_and_prompts_travel_with_the_weights(
    exported: tuple[Denoiser, Path], name: str
) -> None:
    """The recipe is their source: what it exports is what the package ships."""
    assert (exported[1] / name).read_bytes() == (NANO_FOLDER / name).read_bytes()


def test_an_export_has_the_shipped_files(exported: tuple[Denoiser, Path]) -> None:
    """Shards apart, of which a tiny model needs one."""

    def names(folder: Path) -> set[str]:
        files = (file for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)) for file in files if "-of-" not in file.name}

    weights_file = "transformer/diffusion_pytorch_model.safetensors"
    shipped = names(NANO_FOLDER) - {f"{weights_file}.index.json"}
    assert names(exported[1]) - {weights_file} == shipped
