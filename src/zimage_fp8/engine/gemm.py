"""Which matrix product runs for a shape: measured once per kind of GPU, kept as data.

`gemm.json` is written by `benchmarks/kernels.py`. A GPU or a shape that is not in it runs the
default of `kernels.matmul`; what was chosen and why is in `Pipeline.describe`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor, nn

from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.gated_matmul import gated_matmul
from zimage_fp8.kernels.head_product import head_product, unfit
from zimage_fp8.kernels.hopper import hopper_refusal
from zimage_fp8.kernels.language import multiprocessors
from zimage_fp8.kernels.matmul import default_implementation, matmul
from zimage_fp8.kernels.qk_norm_rope import HeadNorms, Heads, qk_norm_rope, split_heads
from zimage_fp8.kernels.rope import Rope
from zimage_fp8.kernels.swiglu import gated
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import Program, program_for
from zimage_fp8.quant.linear import QuantLinear

# A product with what follows it, its gate or the norm and rotation of its heads, is measured as the
# product's kind with a suffix, and won by one kernel of both or by the two one after the other.
GATED = "-gated"
HEADS = "-heads"
SEPARATE = "separate"

# A later choice of the same rows must be expected to be this much faster, and the winner to lose as
# much on these rows: measured twice, products differ by up to 3 %.
MARGIN = 0.97
CUBLAS_TILE = Tile(m=128, n=256)  # what it takes for most of these shapes


@dataclass(frozen=True)
class Choice:
    """A measured winner, or the best with tiles of another height. gpu: PyTorch's name of it. rows
    is the M it was measured at."""

    gpu: str
    capability: tuple[int, int]
    kind: str  # see `kind_of`
    rows: int
    columns: int
    depth: int
    implementation: str
    tile: Tile | None
    us: float

    def expected_us(self, rows: int, multiprocessors: int) -> float:
        """What it takes for other rows: as much longer as it needs more rounds, in each of which
        every multiprocessor computes a tile, or two where two programs share it. The tiles of a
        cluster lie side by side and are computed together."""
        tile = self.tile or CUBLAS_TILE
        width = tile.n * 2 if self.implementation == "triton-gated" else tile.n
        width *= tile.cluster
        at_once = multiprocessors // tile.cluster * tile.per_sm

        def rounds(rows: int) -> int:
            return -(-(-(-rows // tile.m) * -(-self.columns // width)) // at_once)

        return self.us * rounds(rows) / rounds(self.rows)


class Linear:
    """A linear layer as the engine runs it: what it reads, and the product that was chosen."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(module, (nn.Linear, QuantLinear))
        self.dtype = dtype
        self.weight: Tensor = module.weight
        self.weight_scale: Tensor | None = None
        self.reads = Output()
        if isinstance(module, QuantLinear):
            self.weight_scale = module.weight_scale
            self.reads = Output(module.spec, module.input_scale)
        self.kind = kind_of(self.reads, self.weight_scale)
        self.chosen: dict[int, str] = {}  # rows -> implementation, for the record

    def __call__(self, x: Activation) -> Tensor:
        """x: [tokens, in] as `reads` says. Returns [tokens, out] in `dtype`."""
        rows = len(x.values)
        found = self._choose(self.kind, rows)
        implementation = found.implementation if found else "auto"
        if rows not in self.chosen:
            self.chosen[rows] = (
                implementation if found else default_implementation(x, self.weight_scale)
            )
        tile = found.tile if found else None
        return matmul(x, self.weight, self.weight_scale, self.dtype, implementation, tile)

    def gated(self, x: Activation, out: Output) -> Activation:
        """SwiGLU of the product, [tokens, out / 2] as `out` asks for: in one kernel where that was
        measured to be faster than two."""
        rows = len(x.values)
        found = self.gates_at_once(rows)
        if found is None:
            return gated(self(x), out)
        self.chosen[rows] = found.implementation
        return gated_matmul(
            x, self.weight, self.weight_scale, out, self.dtype, found.implementation, found.tile
        )

    def gates_at_once(self, rows: int) -> Choice | None:
        """The kernel of both product and gate, where it is the faster way."""
        found = self._choose(self.kind + GATED, rows)
        return None if found is None or found.implementation == SEPARATE else found

    def heads(self, x: Activation, norms: HeadNorms, rope: Rope) -> Heads:
        """The product as q, k and v, each [batch, tokens, heads, head_dim], q and k normed and
        rotated: in one kernel where that was measured to be faster than two."""
        rows, tokens = len(x.values), len(rope.table)
        found = self.turns_at_once(rows)
        if found is None or unfit(self.weight, norms, rope):
            return qk_norm_rope(self(x).reshape(-1, tokens, len(self.weight)), norms, rope.table)
        self.chosen[rows] = found.implementation
        qkv = head_product(x, self.weight, self.weight_scale, norms, rope, found.tile)
        return split_heads(qkv.reshape(-1, tokens, len(self.weight)), len(norms.weight_q))

    def turns_at_once(self, rows: int) -> Choice | None:
        """The kernel of product, norm and rotation, where it is the faster way."""
        found = self._choose(self.kind + HEADS, rows)
        return None if found is None or found.implementation == SEPARATE else found

    def programs(
        self, gate: Output | None = None, axes: tuple[int, int] | None = None
    ) -> Iterator[Program]:
        """What may have to be compiled for it, other than by Triton: for a picture of any size,
        0.7 s each. gate: what the feed-forward's gate writes, where this product has one; axes: of
        the rotation of its heads, where it has some (`Rope.axes`)."""
        choices = [*self._fitting(self.kind + (GATED if gate else ""))]
        if axes:
            choices += self._fitting(self.kind + HEADS)
        for choice in choices:
            if choice.implementation.startswith("wgmma") and choice.tile is not None:
                yield program_for(
                    self.weight,
                    self.weight_scale,
                    choice.tile,
                    per_token=self.reads.spec is not None and self.reads.static_scale is None,
                    gated=gate is not None,
                    to_codes=gate is not None and gate.is_static_e4m3,
                    heads=axes if choice.kind.endswith(HEADS) else None,
                )

    def _choose(self, kind: str, rows: int) -> Choice | None:
        """Results were measured in BF16; wider ones do not fit into the tiles that won."""
        if self.dtype != torch.bfloat16:
            return None
        return choose(self.weight.device, kind, rows, *self.weight.shape)

    def describe(self) -> str:
        """The implementations that ran; before the first picture, those that were measured best."""
        names = set(self.chosen.values()) or self._measured_best()
        return f"{self.kind} by {' or '.join(sorted(names)) or 'default'}"

    def _measured_best(self) -> set[str]:
        gates, heads, products = (
            {choice.implementation for choice in self._winners(self.kind + suffix)}
            for suffix in (GATED, HEADS, "")
        )
        at_once = gates | heads
        return (at_once - {SEPARATE}) | (products if not at_once or SEPARATE in at_once else set())

    def _winners(self, kind: str) -> Iterable[Choice]:
        first: dict[int, Choice] = {}
        for choice in self._fitting(kind):
            first.setdefault(choice.rows, choice)
        return first.values()

    def _fitting(self, kind: str) -> Iterable[Choice]:
        if self.dtype != torch.bfloat16:
            return ()
        return fitting(self.weight.device, kind, *self.weight.shape)


def kind_of(reads: Output, weight_scale: Tensor | None) -> str:
    """`bf16`, or format and scales: `e4m3-scalar`, `e4m3-vector`, `int8-vector`."""
    if reads.spec is None:
        return "bf16"
    is_scalar = reads.spec.is_static and weight_scale is not None and not weight_scale.ndim
    return f"{reads.spec.format}-{'scalar' if is_scalar else 'vector'}"


@lru_cache(maxsize=4096)
def choose(device: torch.device, kind: str, rows: int, columns: int, depth: int) -> Choice | None:
    """The winner measured nearest to `rows`, or None where nothing near was measured. Where its
    tiles fit these rows badly, 12 of 192 where 17 of 128 would do, the other one measured there."""
    near = [
        choice
        for choice in fitting(device, kind, columns, depth)
        if rows / 2 <= choice.rows <= 2 * rows
    ]
    if not near:
        return None
    nearest = min(near, key=lambda choice: abs(choice.rows - rows)).rows
    winner, *others = [choice for choice in near if choice.rows == nearest]
    count = multiprocessors(device)
    expected_us, in_proportion = winner.expected_us(rows, count), winner.us * rows / nearest
    if MARGIN * expected_us <= in_proportion:
        return winner  # it fits these rows as well as those
    other = min(others, key=lambda choice: choice.expected_us(rows, count), default=winner)
    is_faster = other.expected_us(rows, count) < MARGIN * expected_us
    return other if is_faster else winner


def fitting(device: torch.device, kind: str, columns: int, depth: int) -> list[Choice]:
    """What was measured for a kind and shape at any number of rows, winners first: on a GPU of
    this name, or else on the first in the table of its compute capability."""
    if device.type != "cuda":
        return []
    wanted = (torch.cuda.get_device_capability(device), kind, columns, depth)
    found: dict[str, list[Choice]] = {}
    for choice in measured():
        if choice.implementation.startswith("wgmma") and hopper_refusal(device):
            continue  # `doctor` says why
        if (choice.capability, choice.kind, choice.columns, choice.depth) == wanted:
            found.setdefault(choice.gpu, []).append(choice)
    name = torch.cuda.get_device_name(device)
    return found.get(name) or next(iter(found.values()), [])


@lru_cache(maxsize=1)
def measured() -> tuple[Choice, ...]:
    file = resources.files("zimage_fp8.engine") / "gemm.json"
    return tuple(
        Choice(
            gpu=raw["gpu"],
            capability=(raw["capability"][0], raw["capability"][1]),
            kind=raw["kind"],
            rows=raw["rows"],
            columns=raw["columns"],
            depth=raw["depth"],
            implementation=raw["implementation"],
            tile=Tile(**raw["tile"]) if raw["tile"] else None,
            us=raw["us"],
        )
        for raw in json.loads(file.read_text())["choices"]
    )
