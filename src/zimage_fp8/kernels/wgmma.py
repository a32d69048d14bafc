"""Matrix products on Hopper by a kernel of CUDA C++ (`wgmma.cu`): BF16, E4M3 and INT8, any scales,
with the feed-forward's gate inside or without, or with the norm and rotation of attention's heads.

Tiles have 192 rows, three warpgroups of 64, which Triton's powers of two do not offer. The products
of this model then come out even: 2,112 tokens are 11 tiles, 11,520 columns 60 of 192 and 3,840
columns 24 of 160, so 132 multiprocessors take five tiles each, or two, and none waits. Inside a
tile the tensor cores are never idle: 1,154 cycles per 128 bytes of depth, where 192 x 192 x 128
products at 4,096 a cycle take 1,152 (H200). What a tile costs beyond is its epilogue.

Exactness. INT8 sums are exact, so plain results equal the reference bit for bit; E4M3 accumulates
as Hopper does it fast. A gate and its value are not rounded between product and gate.
"""

import ctypes
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import (
    PLAIN,
    Activation,
    Output,
    empty_activation,
)
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.hopper import (
    REGISTERS,
    SHARED_MEMORY,
    launch,
    product,
    register_split,
    tensor_map,
    threads,
)
from zimage_fp8.kernels.language import multiprocessors
from zimage_fp8.kernels.qk_norm_rope import HeadNorms
from zimage_fp8.kernels.rope import PLACE_BITS, PLACES, Rope
from zimage_fp8.kernels.tile import Tile

WGMMA_TILE = Tile(m=192, n=192, warps=16, stages=4, group=11)
HEADS_TILE = replace(WGMMA_TILE, cluster=2)  # half of three heads; the other half lies beside it
HEAD_DIM = 128
K_BYTES = 128
_HEIGHTS = [64 * count for count in REGISTERS]
# Type of sums, constraint of their registers, operand types, flags behind the operands.
WGMMA = {
    torch.bfloat16: ("float", "f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0"),
    torch.float8_e4m3fn: ("float", "f", "k32.f32.e4m3.e4m3", ", 1, 1"),
    torch.int8: ("int", "r", "k32.s32.s8.s8", ""),
}


@dataclass(frozen=True)
class Program:
    """What is compiled: the kernel's constants. dtype is that of both operands."""

    name: ClassVar[str] = "wgmma"

    dtype: torch.dtype
    warpgroups: int
    n: int
    stages: int
    cluster: int = 1
    gated: bool = False
    to_codes: bool = False
    scaled: bool = False
    per_token: bool = False
    per_channel: bool = False
    # With attention's norm and rotation: the blocks of eight channels at which the second and the
    # third axis of the rotation begin.
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        step = 64 if self.gated else 32  # what four lanes write together, twice with a gate
        if self.warpgroups not in REGISTERS or self.n % step or not 0 < self.n <= 256:
            raise ValueError(
                f"a tile of {self.m} x {self.n}: expected {' or '.join(map(str, _HEIGHTS))} rows "
                f"and a multiple of {step} columns up to 256"
            )
        if self.heads and (self.n, self.cluster) != (HEADS_TILE.n, HEADS_TILE.cluster):
            raise ValueError(
                f"a tile of {self.n} columns in clusters of {self.cluster}: heads of {HEAD_DIM} "
                f"channels want {HEADS_TILE.n} in clusters of {HEADS_TILE.cluster}"
            )
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"a tile of {self.m} x {self.n} in {self.stages} stages takes "
                f"{self.shared_memory:,} bytes of {SHARED_MEMORY:,}: take fewer stages"
            )

    @property
    def m(self) -> int:
        return 64 * self.warpgroups

    @property
    def width(self) -> int:
        """Columns that a tile writes."""
        return self.n // 2 if self.gated else self.n

    @property
    def shared_memory(self) -> int:
        """Bytes: alignment, stages with two barriers each, two rows of scales per warpgroup, and
        for heads two sums for each row with a barrier per 16."""
        stage = (self.m + self.n) * K_BYTES + 16
        exchange = 2 * self.m * 4 + self.m // 16 * 8 if self.heads else 0
        return 1024 + self.stages * stage + 2 * self.warpgroups * self.n * 4 + exchange

    @property
    def threads(self) -> int:
        return threads(self.warpgroups)

    def constants(self) -> dict[str, int]:
        return register_split(self.warpgroups) | {
            "WARPGROUPS": self.warpgroups,
            "N": self.n,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "GATED": int(self.gated),
            "TO_CODES": int(self.to_codes),
            "SCALED": int(self.scaled),
            "PER_TOKEN": int(self.per_token),
            "PER_CHANNEL": int(self.per_channel),
            "EXACT_SUMS": int(self.dtype == torch.int8),
            "HEADS": int(self.heads is not None),
            "PLACES": PLACES,
            "PLACE_BITS": PLACE_BITS,
            "FIRST_BLOCK_2": self.heads[0] if self.heads else 0,
            "FIRST_BLOCK_3": self.heads[1] if self.heads else 0,
        }

    def header(self) -> str:
        """`multiply`: its sums are as many registers as the tile has columns, halved."""
        kind, constraint, types, flags = WGMMA[self.dtype]
        sums = (kind, constraint, self.n // 2)
        types = f"n{self.n}{types}"
        first = product("multiply_first", sums, types, flags=flags, adds=False)
        return f"typedef {kind} Sum;" + first + product("multiply", sums, types, flags=flags)


class Heads(ctypes.Structure):
    """`Heads` of head_product.cuh: what norm and rotation read."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "rotations", "positions")),
        ("tokens", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


NO_HEADS = Heads()


def _check_shapes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if x.dtype not in WGMMA or x.dtype != weight.dtype:
        raise ValueError(
            f"wgmma takes BF16, E4M3 or INT8 on both sides, not {x.dtype} and {weight.dtype}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"wgmma writes BF16 or codes, not {dtype}")
    if len(weight) % 16 or x.shape[1] * x.element_size() % 16:
        raise ValueError(f"wgmma takes widths of a multiple of 16, not {tuple(weight.shape)}")


def wgmma(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """x: [tokens, in]; weight: [out, in]. Returns [tokens, out] in `dtype`, BF16. Raises ValueError
    for other types, widths that are no multiple of 16, and tiles that do not fit."""
    _check_shapes(x.values, weight, dtype)
    out = empty_activation(len(x.values), len(weight), PLAIN, x.values.new_empty(0, dtype=dtype))
    _launch(x, weight, weight_scale, out, tile or WGMMA_TILE)
    return out.values


def wgmma_gated(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Output,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Activation:
    """As `gated_matmul`, under the conditions of `wgmma`."""
    _check_shapes(x.values, weight, dtype)
    like = x.values.new_empty(0, dtype=dtype)
    written = out if out.is_static_e4m3 else PLAIN
    result = empty_activation(len(x.values), len(weight) // 2, written, like)
    _launch(x, weight, weight_scale, result, tile or WGMMA_TILE, gated=True)
    return result if written is out else encode(result.values, out)


def wgmma_heads(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    norms: HeadNorms,
    rope: Rope,
    tile: Tile | None = None,
) -> Tensor:
    """As `head_product`, BF16, under the conditions of `wgmma`."""
    _check_shapes(x.values, weight, norms.weight_q.dtype)
    assert norms.by_lane is not None
    assert rope.along is not None
    assert rope.positions is not None
    out = empty_activation(len(x.values), len(weight), PLAIN, norms.weight_q)
    after = Heads(
        norms.by_lane.data_ptr(),
        rope.along.data_ptr(),
        rope.positions.data_ptr(),
        len(rope.positions),
        norms.eps,
    )
    _launch(x, weight, weight_scale, out, tile or HEADS_TILE, heads=rope.axes, after=after)
    return out.values


def program_for(
    weight: Tensor,
    weight_scale: Tensor | None,
    tile: Tile,
    *,
    per_token: bool,
    gated: bool = False,
    to_codes: bool = False,
    heads: tuple[int, int] | None = None,
) -> Program:
    """What a product by `weight` runs. per_token: whether its input has a scale per token."""
    return Program(
        weight.dtype,
        tile.m // 64,
        tile.n,
        tile.stages,
        tile.cluster,
        gated,
        to_codes,
        scaled=weight_scale is not None,
        per_token=per_token,
        per_channel=weight_scale is not None and weight_scale.ndim > 0,
        heads=heads,
    )


def _launch(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Activation,
    tile: Tile,
    *,
    gated: bool = False,
    heads: tuple[int, int] | None = None,
    after: Heads = NO_HEADS,
) -> None:
    (rows, depth), columns = x.values.shape, out.values.shape[1]
    program = program_for(
        weight,
        weight_scale,
        tile,
        per_token=x.scale is not None and x.scale.ndim > 0,
        gated=gated,
        to_codes=out.scale is not None,
        heads=heads,
    )
    left = tensor_map(x.values, [K_BYTES, program.m // program.cluster])
    right = (
        tensor_map(weight.view(2, columns, depth), [K_BYTES, program.width, 2])
        if gated
        else tensor_map(weight, [K_BYTES, program.n])
    )
    clusters = -(-rows // program.m) * -(-columns // (program.width * program.cluster))
    at_once = multiprocessors(x.values.device) // program.cluster
    steps = -(-depth * x.values.element_size() // K_BYTES)
    tensors = (out.values, x.scale, weight_scale, out.scale)
    launch(
        program,
        min(clusters, at_once) * program.cluster,
        [left, right, *tensors, rows, columns, steps, tile.group, after],
        x.values.device,
    )
