"""What the search decides about at once: one kind of layer in one stretch of blocks."""

from dataclasses import dataclass

from zimage_fp8.layout import KINDS, ZImageConfig, block_names

THIRDS = 3  # stretches of `layers`: early, middle and late blocks differ most

# Globs over the linears on disk behind a kind.
PATTERNS = {
    "qkv": "attention.to_[qkv]",
    "out": "attention.to_out.0",
    "w13": "feed_forward.w[13]",
    "w2": "feed_forward.w2",
}


@dataclass(frozen=True)
class Stretch:
    """`kind` of `blocks`, such as w2 of layers.0 to layers.9; `modules` are named as loaded."""

    name: str
    blocks: tuple[str, ...]
    kind: str

    @property
    def modules(self) -> tuple[str, ...]:
        suffix = next(suffix for suffix, kind in KINDS.items() if kind == self.kind)
        return tuple(f"{block}.{suffix}" for block in self.blocks)


def stretches(config: ZImageConfig) -> list[Stretch]:
    """Both refiners, and the layers in thirds; each by kind."""
    blocks = block_names(config)
    layers = [block for block in blocks if block.startswith("layers.")]
    groups = {
        stack: [block for block in blocks if block.startswith(f"{stack}.")]
        for stack in ("noise_refiner", "context_refiner")
    }
    for third in range(THIRDS):
        first, end = (len(layers) * at // THIRDS for at in (third, third + 1))
        groups[f"layers.{first}-{end - 1}"] = layers[first:end]
    return [
        Stretch(f"{name} {kind}", tuple(members), kind)
        for name, members in groups.items()
        for kind in KINDS.values()
        if members
    ]
