"""Does the shipped model draw what it was never shown together?

Two sets of scenes, each with short and with long captions: held-out (object, colour) combinations,
and pairs of objects that training never showed together. All are sampled from the BF16 weights as
shipped. The ceiling is the same retrieval on the autoencoder's reconstructions of real pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.nano import captions, denoiser, retrieval, weights
from recipes.nano.autoencoder import Codec, psnr_db
from recipes.nano.captions import Combinations, Scene, Thing, is_held_out_pair
from recipes.nano.denoiser import Denoiser, sample
from recipes.nano.scenes import Cutouts
from recipes.nano.shape import LATENT_CHANNELS, LATENT_SIZE, LONG, SHIFT, SHORT, STEPS, Shape
from recipes.nano.sheets import save_sheet
from recipes.nano.tokenizer import Captioner
from recipes.nano.workspace import Workspace
from zimage_fp8 import provenance

PROMPT_SEED, NOISE_SEED, PICTURE_SEED = 7, 1, 11
BATCH = 128
TARGETS = {"top1": 0.95, "top5": 0.99, "background": 0.99, "vae_psnr_db": 32.0, "both_top5": 0.70}


@dataclass
class Subject:
    """The model under evaluation and what it is measured with."""

    model: Denoiser
    codec: Codec
    cutouts: Cutouts
    captioner: Captioner
    things: list[Thing]
    combinations: Combinations
    device: torch.device


def load_subject(
    work: Workspace, shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Subject, dict]:
    things = captions.load_things(work.data, shape.num_objects)
    cutouts = Cutouts(work.data, things, device)
    captioner = Captioner(work.data, things)
    model, facts = load_denoiser(shape, captioner.vocab_size, folder, device, dtype)
    codec = Codec(folder, shape, device, dtype)
    combinations = captions.combine(cutouts.mean_rgb())
    subject = Subject(model, codec, cutouts, captioner, things, combinations, device)
    return subject, {"vae": codec.facts, "denoiser": facts}


def load_denoiser(
    shape: Shape, vocab_size: int, folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Denoiser, dict]:
    """The averaged weights, BF16 on disk, computing in `dtype`."""
    state, facts = weights.load_pieces(folder, denoiser.STEM)
    model = Denoiser(shape, vocab_size)
    model.load_state_dict(state)
    weights.set_dtype(model, dtype).to(device)
    return model.eval().requires_grad_(False), facts


def evaluate(
    work: Workspace,
    shape: Shape,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    command: str,
) -> None:
    """Write nano-evaluation.json, which names the `command` it is from, and three sheets."""
    subject, training = load_subject(work, shape, folder, device, dtype)
    rng = np.random.default_rng(PROMPT_SEED)
    singles = held_out_scenes(subject.combinations, shape.num_evaluated, rng)
    pairs = held_out_pairs(subject.combinations, shape.num_pairs_evaluated, rng)
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "command": command,
        "seeds": {"prompts": PROMPT_SEED, "noise": NOISE_SEED, "pictures": PICTURE_SEED},
        "sampler": {"steps": STEPS, "shift": SHIFT, "guidance": 0.0},
        "shape": shape.__dict__,
        "training": training,
        "targets": TARGETS,
        "objects": len(subject.things),
    }
    report["vae"], originals, shown = _autoencoder(subject, shape.num_reconstructed)
    work.log(f"vae {report['vae']}")
    sheets = [
        save_sheet(
            torch.stack([originals[:16], shown[:16]], 1).flatten(0, 1),
            work.root / "sheet-vae.png",
            8,
        )
    ]
    for bucket, name in ((SHORT, "short"), (LONG, "long")):
        prompts = _prompts(subject, singles, bucket)
        images = draw(subject, prompts, bucket)
        report[f"single_{name}"] = _score_singles(subject, singles, images)
        work.log(f"single, {name} captions: {_brief(report[f'single_{name}'])}")
        if bucket == SHORT:
            file = work.root / "sheet-one.png"
            sheets.append(save_sheet(images[:64], file, 8, prompts[:64]))
        pair_prompts = _prompts(subject, pairs, bucket)
        pair_images = draw(subject, pair_prompts, bucket)
        report[f"pairs_{name}"] = _score_pairs(subject, pairs, pair_images)
        work.log(f"pairs, {name} captions: {_brief(report[f'pairs_{name}'])}")
        if bucket == SHORT:
            file = work.root / "sheet-two.png"
            sheets.append(save_sheet(pair_images[:16], file, 4, pair_prompts[:16]))
    report["seconds"] = round(work.age_s(), 1)
    file = work.root / "nano-evaluation.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    work.deliver([file, *sheets])


def held_out_scenes(
    combinations: Combinations, count: int, rng: np.random.Generator
) -> list[Scene]:
    found = np.argwhere(combinations.held_out)
    return [Scene(int(i), int(c)) for i, c in found[rng.permutation(len(found))[:count]]]


def held_out_pairs(combinations: Combinations, count: int, rng: np.random.Generator) -> list[Scene]:
    """Pairs never trained together, on colours both were trained with."""
    trained, scenes = combinations.trained, []
    while len(scenes) < count:
        first, second = (int(i) for i in rng.integers(0, len(trained), 2))
        colors = np.flatnonzero(trained[first] & trained[second])
        if first != second and len(colors) and is_held_out_pair(first, second):
            scenes.append(Scene(first, int(rng.choice(colors)), second))
    return scenes


def _prompts(subject: Subject, scenes: list[Scene], bucket: int) -> list[str]:
    rng = np.random.default_rng(PROMPT_SEED)
    captioner = subject.captioner
    if bucket == LONG:
        return [captioner.long(scene, rng) for scene in scenes]
    texts = [captioner.short(scene, rng)[0] for scene in scenes]
    # a bare name names no colour, so it cannot be judged by one
    bare = {thing.name for thing in subject.things}
    return [
        f"{text}, {captions.COLORS[scene.color]} background" if text in bare else text
        for text, scene in zip(texts, scenes, strict=True)
    ]


def draw(subject: Subject, prompts: list[str], bucket: int) -> Tensor:
    """Pictures in -1..1 from noise that depends on nothing but its seed."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    side = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    noise = torch.randn(len(prompts), *side, generator=generator).to(subject.device)
    ids = torch.from_numpy(subject.captioner.encode(prompts, bucket)).long().to(subject.device)
    latents = [
        sample(subject.model, some_ids, some_noise)
        for some_ids, some_noise in zip(ids.split(BATCH), noise.split(BATCH), strict=True)
    ]
    return subject.codec.decode(torch.cat(latents))


def _autoencoder(subject: Subject, count: int) -> tuple[dict, Tensor, Tensor]:
    """Fidelity on fresh pictures, in the working dtype and in FP32, and the retrieval ceiling."""
    rng = np.random.default_rng(PICTURE_SEED)
    scenes = held_out_scenes(subject.combinations, count, rng)
    torch.manual_seed(PICTURE_SEED)
    objects, colors = _numbers(scenes, subject.device)
    images = subject.cutouts.one(objects, colors)
    shown = subject.codec.reconstruct(images)
    pairs = held_out_pairs(subject.combinations, count, rng)
    left, pair_colors = _numbers(pairs, subject.device)
    right = torch.tensor([scene.second for scene in pairs], device=subject.device)
    pair_images = subject.cutouts.two(left, right, pair_colors)
    scores = {
        "count": len(images),
        f"psnr_db_{str(subject.codec.dtype).removeprefix('torch.')}": _mean(psnr_db(shown, images)),
        "psnr_db_pairs": _mean(psnr_db(subject.codec.reconstruct(pair_images), pair_images)),
        "ceiling": _score_singles(subject, scenes, shown),
    }
    if subject.codec.dtype != torch.float32:
        weights.set_dtype(subject.codec.vae, torch.float32)
        subject.codec.dtype, kept = torch.float32, subject.codec.dtype
        scores["psnr_db_float32"] = _mean(psnr_db(subject.codec.reconstruct(images), images))
        weights.set_dtype(subject.codec.vae, kept)
        subject.codec.dtype = kept
    return scores, images, shown


def _score_singles(subject: Subject, scenes: list[Scene], images: Tensor) -> dict:
    objects, colors = _numbers(scenes, subject.device)
    distance = retrieval.distances(images, colors, retrieval.WHOLE, subject.cutouts)
    rank, nearest = retrieval.ranks(distance, objects), distance.argmin(1)
    is_right = retrieval.nearest_colors(images, subject.cutouts.palette) == colors
    by_group: dict[str, list[bool]] = {}
    for scene, r in zip(scenes, rank.tolist(), strict=True):
        by_group.setdefault(subject.things[scene.first].group, []).append(r == 0)
    misses = [
        [subject.things[scene.first].name, subject.things[near].name]
        for scene, near, r in zip(scenes, nearest.tolist(), rank.tolist(), strict=True)
        if r > 0
    ]
    return {
        "count": len(scenes),
        "top1": _mean(rank == 0),
        "top5": _mean(rank < 5),
        "background": _mean(is_right),
        "top1_by_group": {k: round(sum(v) / len(v), 4) for k, v in sorted(by_group.items())},
        "misses": misses,
    }


def _score_pairs(subject: Subject, scenes: list[Scene], images: Tensor) -> dict:
    left, colors = _numbers(scenes, subject.device)
    right = torch.tensor([scene.second for scene in scenes], device=subject.device)
    found = {}
    for side, objects, search in (
        ("left", left, retrieval.LEFT),
        ("right", right, retrieval.RIGHT),
    ):
        distance = retrieval.distances(images, colors, search, subject.cutouts)
        found[side] = retrieval.ranks(distance, objects)
    is_right = retrieval.nearest_colors(images, subject.cutouts.palette) == colors
    return {
        "count": len(scenes),
        "left_top5": _mean(found["left"] < 5),
        "right_top5": _mean(found["right"] < 5),
        "both_top1": _mean((found["left"] == 0) & (found["right"] == 0)),
        "both_top5": _mean((found["left"] < 5) & (found["right"] < 5)),
        "background": _mean(is_right),
    }


def _numbers(scenes: list[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    first = torch.tensor([scene.first for scene in scenes], device=device)
    return first, torch.tensor([scene.color for scene in scenes], device=device)


def _mean(values: Tensor) -> float:
    return round(values.float().mean().item(), 4)


def _brief(scores: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in scores.items() if isinstance(v, float))
