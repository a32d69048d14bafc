"""Which matrix product runs for a shape: measured once per kind of GPU, kept as data.

`gemm.json` is written by `benchmarks/kernels.py`. A GPU or a shape that is not in it runs the
default of `kernels.matmul`; what was chosen and why is in `Pipeline.describe`.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor, nn

from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.matmul import Tile, default_implementation, matmul
from zimage_fp8.quant.linear import QuantLinear


@dataclass(frozen=True)
class Choice:
    """One measured winner. rows is the M it was measured at."""

    capability: tuple[int, int]
    kind: str  # see `kind_of`
    rows: int
    columns: int
    depth: int
    implementation: str
    tile: Tile | None


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
        found = choose(self.weight.device, self.kind, rows, *self.weight.shape)
        implementation = found.implementation if found else "auto"
        if rows not in self.chosen:
            self.chosen[rows] = (
                implementation if found else default_implementation(x, self.weight_scale)
            )
        tile = found.tile if found else None
        return matmul(x, self.weight, self.weight_scale, self.dtype, implementation, tile)


def kind_of(reads: Output, weight_scale: Tensor | None) -> str:
    """`bf16`, or format and scales: `e4m3-scalar`, `e4m3-vector`, `int8-vector`."""
    if reads.spec is None:
        return "bf16"
    is_scalar = reads.spec.is_static and weight_scale is not None and not weight_scale.ndim
    return f"{reads.spec.format}-{'scalar' if is_scalar else 'vector'}"


@lru_cache(maxsize=4096)
def choose(device: torch.device, kind: str, rows: int, columns: int, depth: int) -> Choice | None:
    """The winner measured nearest to `rows`, or None where nothing near was measured."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    fitting = [
        choice
        for choice in measured()
        if (choice.capability, choice.kind) == (capability, kind)
        and (choice.columns, choice.depth) == (columns, depth)
        and rows / 2 <= choice.rows <= 2 * rows
    ]
    return min(fitting, key=lambda choice: abs(choice.rows - rows), default=None)


@lru_cache(maxsize=1)
def measured() -> tuple[Choice, ...]:
    file = resources.files("zimage_fp8.engine") / "gemm.json"
    return tuple(
        Choice(
            capability=(raw["capability"][0], raw["capability"][1]),
            kind=raw["kind"],
            rows=raw["rows"],
            columns=raw["columns"],
            depth=raw["depth"],
            implementation=raw["implementation"],
            tile=Tile(**raw["tile"]) if raw["tile"] else None,
        )
        for raw in json.loads(file.read_text())["choices"]
    )
