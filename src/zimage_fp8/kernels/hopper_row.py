"""A token's row in 8 bits as the next product reads it, on its own or behind the residual between
two products, on Hopper by a kernel of CUDA C++ (`row.cu`).

One warp, or a few, own a row, so that nothing waits for another row, and all rows of 2,112 are on
their way at once. The rotation's levels of four are exchanges between lanes.

Exactness. Codes of the same fp32 values, rotated ones too, are the reference's bit for bit; norms
are as in `norm.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import FORMATS, Activation, Output, empty_activation
from zimage_fp8.kernels.hopper import hopper_refusal, launch
from zimage_fp8.numerics import AMAX_FLOOR, QMAX, Format

CHUNK = 256  # channels, eight in each lane; also the largest group of a rotation
MAX_CHUNKS = 16  # of a warp: 64 registers a lane
WARPS = 4  # of a block; 2 and 8 were no faster
MAX_WARPS = 16  # that hold one row


@dataclass(frozen=True)
class RowProgram:
    """dim: channels of a row. per_token: whether a row has a scale of its own. residual: whether a
    residual and a norm come first."""

    name: ClassVar[str] = "row"
    dim: int
    format: Format
    per_token: bool
    rotate: bool
    residual: bool

    @property
    def parts(self) -> int:
        """Warps that hold a row."""
        chunks = self.dim // CHUNK
        fewest = -(-chunks // MAX_CHUNKS)
        return next(parts for parts in range(fewest, chunks + 1) if chunks % parts == 0)

    @property
    def warps(self) -> int:
        return WARPS if self.parts == 1 else self.parts

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_memory(self) -> int:
        """Bytes: as many as the block's rows in BF16."""
        return 2 * self.dim * self.warps // self.parts

    def constants(self) -> dict[str, int | float]:
        return {
            "DIM": self.dim,
            "PARTS": self.parts,
            "WARPS": self.warps,
            "FORMAT": FORMATS[self.format],
            "PER_TOKEN": int(self.per_token),
            "ROTATE": int(self.rotate),
            "RESIDUAL": int(self.residual),
            "QMAX": QMAX[self.format],
            "AMAX_FLOOR": AMAX_FLOOR,
        }

    def header(self) -> str:
        return ""


def program_for(
    out: Output, dim: int, dtype: torch.dtype, device: torch.device, *, residual: bool = False
) -> RowProgram | None:
    """What writes rows of `dim` channels, or None where this kernel does not: for BF16, which it
    writes no faster than Triton's (loops took 0.2 % longer), for other widths, on other devices."""
    spec = out.spec
    if spec is None or dtype != torch.bfloat16 or dim % CHUNK or hopper_refusal(device):
        return None
    program = RowProgram(dim, spec.format, not spec.is_static, spec.rotate, residual)
    return program if program.parts <= (1 if residual else MAX_WARPS) else None


def encode_hopper(x: Tensor, out: Output, program: RowProgram) -> Activation:
    """As `encode` of a contiguous x."""
    rows, width = x.shape
    result = empty_activation(rows, width, out, x)
    tensors = (x, None, None, None, None, result.values, result.scale)
    _launch(program, tensors, rows, [1, 0, 0, 0.0], x.device)
    return result


def residual_norm_hopper(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    vector: Tensor,
    eps: float,
    out: Output,
    program: RowProgram,
) -> tuple[Tensor, Activation]:
    """As `norm.residual_norm`."""
    batch, tokens, dim = x.shape
    x = x.contiguous()
    total = torch.empty_like(x)
    result = empty_activation(batch * tokens, dim, out, x)
    strides = [0 if len(shared) == 1 else shared.stride(0) for shared in (gate, vector)]
    tensors = (h, x, total, gate, vector, result.values, result.scale)
    _launch(program, tensors, batch * tokens, [tokens, *strides, eps], x.device)
    return total, result


def _launch(
    program: RowProgram,
    tensors: tuple[Tensor | None, ...],
    rows: int,
    rest: list[int | float],
    device: torch.device,
) -> None:
    blocks = -(-rows * program.parts // program.warps)
    launch(program, blocks, [*tensors, rows, *rest], device)
