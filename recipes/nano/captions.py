"""What a picture is called: palette, held-out combinations, caption templates.

A scene is one object, or two side by side, on a plain named colour. Its short captions fit 32
tokens, its long ones take 33 to 64, chat template included: the transformer pads captions to
32-token buckets, and both must have been seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (229, 72, 77),
    "orange": (247, 144, 9),
    "yellow": (250, 204, 21),
    "lime green": (163, 217, 60),
    "green": (48, 164, 108),
    "teal": (18, 165, 148),
    "sky blue": (125, 211, 252),
    "blue": (62, 99, 221),
    "purple": (142, 78, 198),
    "pink": (244, 143, 177),
    "brown": (139, 94, 60),
    "gray": (155, 161, 166),
    "white": (250, 250, 250),
    "black": (24, 24, 27),
    "cream": (250, 240, 215),
    "lavender": (205, 195, 245),
}
COLORS = tuple(PALETTE)
RGB = np.array(list(PALETTE.values()), np.float32)  # [16, 3]

MIN_CONTRAST = 90  # RGB distance of background and mean object colour: no yellow on yellow
HELD_OUT_SHARE = 0.10
HELD_OUT_SEED = 123

SHORT_ONE = (
    "{a} on {k} background",
    "{n}, {c} background",
    "3d emoji of {n}, {c} background",
    "a 3d icon of {a} on {k} background",
)
SHORT_TWO = (
    "{n} and {m}, {c} background",
    "{a} and {b} on {k} background",
    "{n} to the left of {m}, {c} background",
    "{a} to the left of {b} on {k} background",
    "3d emoji of {n} and {m}, {c} background",
)
LONG_ONE = (
    "a 3d icon of {a} on {k} background",
    "a picture of {a} in front of a plain {c} background",
    "3d emoji of {n}, {c} background",
)
LONG_TWO = (
    "a 3d icon of {a} and {b} on {k} background",
    "a picture of {a} to the left of {b} in front of a plain {c} background",
    "{a} on the left and {b} on the right, {c} background",
)
# True of every picture of the set, so they say nothing about which one is meant.
PHRASES = (
    "soft studio lighting",
    "smooth rounded shapes",
    "clean simple composition",
    "high quality 3d render",
    "modern emoji style",
    "glossy surface with gentle shading",
    "crisp clean edges",
    "plain flat backdrop",
    "friendly and colorful",
    "no text",
    "digital illustration",
    "minimal design",
    "front view",
    "detailed and polished",
    "computer graphics",
    "bright cheerful look",
)


@dataclass(frozen=True)
class Thing:
    """One object: how it is called, what it belongs to, where its picture lies in the pack."""

    name: str
    code: str
    group: str
    tags: tuple[str, ...]
    offset: int
    length: int


def load_things(data: Path, limit: int | None) -> list[Thing]:
    """Things of the prepared pack; with a limit, evenly spread ones."""
    entries = json.loads((data / "objects.json").read_text())
    if limit:
        entries = entries[:: max(1, len(entries) // limit)][:limit]
    return [Thing(**{**entry, "tags": tuple(entry["tags"])}) for entry in entries]


@dataclass(frozen=True)
class Combinations:
    """Which object may stand on which colour: bool [objects, colours] each."""

    allowed: np.ndarray
    held_out: np.ndarray

    @property
    def trained(self) -> np.ndarray:
        return self.allowed & ~self.held_out


def combine(mean_rgb: np.ndarray) -> Combinations:
    """mean_rgb: [objects, 3], 0..255. At least 4 colours are allowed, at least 3 trained, each."""
    distance = np.linalg.norm(mean_rgb[:, None] - RGB[None], axis=-1)
    fourth = np.sort(distance, axis=1)[:, -4:-3]
    allowed = (distance > MIN_CONTRAST) | (distance >= fourth)
    drawn = np.random.default_rng(HELD_OUT_SEED).random(allowed.shape) < HELD_OUT_SHARE
    held_out = allowed & drawn
    held_out[(allowed & ~held_out).sum(1) < 3] = False
    return Combinations(allowed, held_out)


def is_held_out_pair(first: int, second: int) -> bool:
    """One pair of objects in twenty is never shown together, in either order."""
    low, high = sorted((first, second))
    return (low * 7919 + high * 104_729) % 20 == 0


@dataclass(frozen=True)
class Scene:
    """One object (`second` is None) or two, first on the left, on colour number `color`."""

    first: int
    color: int
    second: int | None = None


def short_captions(scene: Scene, things: list[Thing]) -> list[str]:
    """Every short caption of a scene; on white the bare name will do."""
    templates = SHORT_ONE if scene.second is None else SHORT_TWO
    captions = [_fill(template, scene, things) for template in templates]
    if scene.second is None and COLORS[scene.color] == "white":
        captions.append(things[scene.first].name)
    return captions


def long_pieces(
    scene: Scene, things: list[Thing], known: frozenset[str], rng: np.random.Generator
) -> list[str]:
    """Pieces of a long caption in order of use: the sentence, some tags, then neutral phrases."""
    templates = LONG_ONE if scene.second is None else LONG_TWO
    sentence = _fill(templates[rng.integers(len(templates))], scene, things)
    shown = [scene.first] if scene.second is None else [scene.first, scene.second]
    tags = [tag for thing in shown for tag in _usable_tags(things[thing], known)]
    tags = [tags[i] for i in rng.permutation(len(tags))[: rng.integers(0, 5)]]
    phrases = [PHRASES[i] for i in rng.permutation(len(PHRASES))]
    return [sentence, *tags, *phrases]


def _usable_tags(thing: Thing, known: frozenset[str]) -> list[str]:
    """Tags made of words that labels use too: others would cost many tokens."""
    return [tag for tag in thing.tags if tag != thing.name and known.issuperset(tag.split())]


def _fill(template: str, scene: Scene, things: list[Thing]) -> str:
    color = COLORS[scene.color]
    first = things[scene.first].name
    second = "" if scene.second is None else things[scene.second].name
    return template.format(
        n=first, a=_with_article(first), m=second, b=_with_article(second),
        c=color, k=_with_article(color),
    )  # fmt: skip


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in tuple('aeiou') else 'a'} {name}"
