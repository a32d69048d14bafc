"""Attention on Hopper in BF16 (`hopper_attention.cu`), written as the next layer reads it.

After FlashAttention-3, with two differences: sums are scaled only when the largest score has grown
by a factor of 2^8, and the result can be codes, so that it is never in memory in BF16.

Exactness. Probabilities are rounded to BF16 before they meet the values, and exponentials are the
hardware's approximation (2 ulp), as in FlashAttention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zimage_fp8.kernels.activation import PLAIN, Activation, Output, empty_activation
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.hopper import (
    launch,
    product,
    register_split,
    tensor_map,
    threads,
)
from zimage_fp8.kernels.language import multiprocessors

HEAD_DIM = 128
ROW_BYTES = 128  # of what is copied at once: half a head


@dataclass(frozen=True)
class AttentionProgram:
    """to_codes: whether the result is written as E4M3 codes under a static scale. warpgroups: of 64
    queries each. keys: of a stage."""

    name: ClassVar[str] = "hopper_attention"
    to_codes: bool = False
    warpgroups: int = 2
    keys: int = 176
    stages: int = 2

    @property
    def queries(self) -> int:
        return 64 * self.warpgroups

    @property
    def shared_memory(self) -> int:
        """Bytes: alignment, queries, stages of keys and values, barriers."""
        return 1024 + 2 * ROW_BYTES * (self.queries + 2 * self.stages * self.keys) + 256

    @property
    def threads(self) -> int:
        return threads(self.warpgroups)

    def constants(self) -> dict[str, int]:
        return register_split(self.warpgroups) | {
            "WARPGROUPS": self.warpgroups,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "TO_CODES": int(self.to_codes),
        }

    def header(self) -> str:
        types = "k16.f32.bf16.bf16"
        scores = ("float", "f", self.keys // 2)
        mixed = ("float", "f", HEAD_DIM // 2)
        return product("score", scores, f"n{self.keys}{types}", flags=", 1, 1, 0, 0") + product(
            "mix", mixed, f"n{HEAD_DIM}{types}", flags=", 1, 1, 1", a="registers"
        )


# Tiles of 128 queries and 176 keys as in FlashAttention-3, which 2,112 tokens are 12 of; and of
# 192 and 80, faster where they leave fewer multiprocessors idle.
SHAPES = ((2, 176, 2), (3, 80, 3))


def program_for(
    heads: int, tokens: int, multiprocessors: int, *, to_codes: bool
) -> AttentionProgram:
    """The shape that computes least beyond what is asked: in rounds of a tile per multiprocessor,
    4,160 tokens of 30 heads are 8 of 128 queries (7.5 full) or 5 of 192 (all full)."""
    programs = [AttentionProgram(to_codes, *shape) for shape in SHAPES]

    def computed(program: AttentionProgram) -> int:
        rounds = -(-heads * -(-tokens // program.queries) // multiprocessors)
        return rounds * program.queries * -(-tokens // program.keys) * program.keys

    return min(programs, key=computed)


def programs(out: Output) -> Iterator[AttentionProgram]:
    """What has to be compiled for pictures of any size."""
    for shape in SHAPES:
        yield AttentionProgram(out.is_static_e4m3, *shape)


def hopper_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Output = PLAIN, program: AttentionProgram | None = None
) -> Activation:
    """q, k, v: BF16 [batch, tokens, heads, 128], the heads of a token side by side. Returns
    [batch · tokens, heads · 128], written as `out` asks for."""
    batch, tokens, heads, head_dim = q.shape
    to_codes = out.is_static_e4m3
    result = empty_activation(batch * tokens, heads * head_dim, out if to_codes else PLAIN, v)
    at_once = multiprocessors(v.device)
    program = program or program_for(batch * heads, tokens, at_once, to_codes=to_codes)
    box_q, box_kv = [ROW_BYTES, program.queries, 1], [ROW_BYTES, program.keys, 1]
    launch(
        program,
        min(batch * heads * -(-tokens // program.queries), at_once),
        [
            tensor_map(q.flatten(2), box_q),
            tensor_map(k.flatten(2), box_kv),
            tensor_map(v.flatten(2), box_kv),
            result.values,
            result.scale,
            batch,
            heads,
            tokens,
        ],
        v.device,
    )
    return result if to_codes else encode(result.values, out)
