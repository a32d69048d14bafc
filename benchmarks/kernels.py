"""Time every GEMM implementation and every fused kernel against its reference and the ceiling.

    python benchmarks/kernels.py --out kernels.json [--choices src/zimage_fp8/engine/gemm.json]
    python benchmarks/kernels.py --kinds                          no products
    python benchmarks/kernels.py --kinds e4m3-scalar --layers w2 --no-fused    some of them
    TRITON_INTERPRET=1 python benchmarks/kernels.py --scale tiny --kinds    a dry run

Shapes are the full-size transformer's and decoder's. Operands are random, finite, and rotated among
sets that do not fit into the L2 cache together. A kernel whose comparison with the reference fails
is printed as wrong and gets no speed. `--choices` writes the fastest implementation of every shape
as the data that the engine reads.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fake_model import SCALES
from gpu import DEVICE, Envelope, elapsed_ms, envelope
from zimage_fp8.engine.gemm import CUBLAS_TILE, GATED, HEADS, SEPARATE, Linear
from zimage_fp8.engine.graphs import bound_workspaces
from zimage_fp8.kernels.activation import (
    PLAIN,
    Activation,
    Output,
    encode_reference,
)
from zimage_fp8.kernels.attention import AUTO, BACKENDS, Target, attention
from zimage_fp8.kernels.encode import encode, encode_triton
from zimage_fp8.kernels.gated_matmul import (
    GATED_IMPLEMENTATIONS,
    gated_matmul,
    gated_matmul_reference,
)
from zimage_fp8.kernels.group_norm import (
    Normalization,
    group_moments_reference,
    group_moments_triton,
    normalize_window_reference,
    normalize_window_triton,
)
from zimage_fp8.kernels.head_product import head_product, head_product_reference
from zimage_fp8.kernels.hopper import hopper_refusal
from zimage_fp8.kernels.matmul import has_tma, matmul, refusal
from zimage_fp8.kernels.norm import (
    norm_reference,
    norm_triton,
    residual_norm,
    residual_norm_reference,
    residual_norm_triton,
)
from zimage_fp8.kernels.pixel_attention import (
    pixel_attention_reference,
    pixel_attention_triton,
)
from zimage_fp8.kernels.qk_norm_rope import (
    HeadNorms,
    Heads,
    qk_norm_rope,
    qk_norm_rope_reference,
    qk_norm_rope_triton,
)
from zimage_fp8.kernels.rope import Rope, rope_table
from zimage_fp8.kernels.swiglu import gated_reference, gated_triton
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import HEADS_TILE, WGMMA_TILE
from zimage_fp8.layout import ZImageConfig, product_shapes
from zimage_fp8.numerics import (
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROT,
    QuantSpec,
    amax,
    quantize,
    scale_of,
)
from zimage_fp8.quant.linear import QuantLinear

ROWS = {  # 1024x512 and 1024x1024 with a caption of 64 tokens
    "full": (2112, 4160),
    "tiny": (40, 72),
}
# The decoder's: (channels, height, width) of late layers, and (pixels, channels) of its attention
# at 1024x512 and 1024x1024.
PICTURES = {"full": ((256, 512, 512), (128, 512, 1024)), "tiny": ((32, 8, 8),)}
ATTENDED = {"full": ((8192, 512), (16384, 512)), "tiny": ((96, 32),)}
GATED_LAYER = "w13, gate"
HEADS_LAYER = "to_qkv, heads"
LAYERS = ("to_qkv", "to_out", "w13", "w2", GATED_LAYER, HEADS_LAYER)
KINDS = ("bf16", "e4m3-scalar", "e4m3-vector", "int8-vector")
SETS = 4
# Triton's interpreter multiplies BF16 as integers.
ATTENTION_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
MAX_FUSED_ERROR = 2e-3  # a BF16 rounding here and there; codes a step apart are rarer than 1e-4

TILES = (
    Tile(),
    Tile(stages=4, parts=2),
    Tile(group=17),
    Tile(stages=4, parts=2, group=17),
    Tile(stages=4, parts=2, group=4),
    Tile(n=128, warps=4, per_sm=2),
    Tile(n=128, warps=4, stages=3, parts=2, per_sm=2),
    Tile(n=128, warps=4, stages=3, parts=2, per_sm=2, group=17),
    Tile(m=64, n=256, warps=4, stages=2, per_sm=2, parts=2),
    Tile(m=256, n=128, stages=4, parts=2),
    Tile(k=256, stages=2, parts=2),
)
POINTER_TILES = (Tile(n=128, warps=4),)
# 2,112 rows are 17 tiles of 128, 4,160 are 33: walked in one group, or in two.
GATED_TILES = (
    Tile(n=128, stages=4, group=17),
    Tile(n=128, stages=3, group=17),
    Tile(n=128, stages=4, group=8),
    Tile(n=64, warps=4, stages=3, per_sm=2, group=17),
    Tile(n=64, warps=4, stages=3, per_sm=2, group=8),
    # 33 x 80 tiles are ten for each of 264 programs, without a rest.
    Tile(m=64, n=128, warps=4, stages=2, per_sm=2, group=33),
)
# Five and two tiles for each of 132 multiprocessors at 2,112 rows, ten and four at 4,160. Without a
# cluster they were slower by 1 to 5 % at every shape.
SQUARE = replace(WGMMA_TILE, cluster=2)
WIDE = replace(WGMMA_TILE, m=128, n=256, warps=12, group=17)  # two rounds for w2 up to 2,176 rows
WGMMA_TILES = (SQUARE, replace(SQUARE, n=160, stages=5), WIDE, replace(WIDE, cluster=2))
HEADS_TILES = (HEADS_TILE, replace(HEADS_TILE, m=128, warps=12, stages=5, group=17))
FINALISTS = 3
# What runs on this GPU; elsewhere Triton's interpreter runs Triton's.
run_residual_norm = residual_norm if DEVICE.type == "cuda" else residual_norm_triton
run_encode = encode if DEVICE.type == "cuda" else encode_triton


@dataclass(frozen=True)
class Candidate:
    implementation: str
    tile: Tile | None = None


def candidates(kind: str, rows: int) -> list[Candidate]:
    wgmma = [Candidate("wgmma", tile) for tile in in_groups(WGMMA_TILES, rows)]
    if kind == "bf16":
        return [Candidate("cublas"), *wgmma]
    triton = [
        *(Candidate("triton-tma", tile) for tile in TILES),
        *(Candidate("triton", tile) for tile in POINTER_TILES),
    ]
    cublas = {
        "e4m3-scalar": [Candidate("cublas"), Candidate("cublas-slow")],
        "e4m3-vector": [Candidate("cublas-row")],
        "int8-vector": [],
    }
    return [*cublas[kind], *triton, *wgmma]


def in_groups(tiles: Iterable[Tile], rows: int) -> list[Tile]:
    """Every tile walked in its group of rows, and in one twice as high where that is another walk:
    the weights are read half as often, and more of the rows must stay in the L2 cache."""
    walks = (replace(tile, group=factor * tile.group) for tile in tiles for factor in (1, 2))
    by_walk: dict[Tile, Tile] = {}
    for tile in walks:
        by_walk.setdefault(as_walked(tile, rows), tile)
    return list(by_walk.values())


def as_walked(tile: Tile, rows: int) -> Tile:
    """With as many rows of tiles in a group as there are: more are the same walk."""
    return replace(tile, group=min(tile.group, -(-rows // tile.m)))


Operands = tuple[Activation, Tensor, Tensor | None]


def operands(kind: str, rows: int, columns: int, depth: int, count: int) -> list[Operands]:
    """`count` independent sets of operands on the GPU."""
    made: list[Operands] = []
    for _ in range(count):
        x = torch.randn(rows, depth, device=DEVICE)
        weight = torch.randn(columns, depth, device=DEVICE)
        if kind == "bf16":
            made.append((Activation(x.bfloat16()), weight.bfloat16(), None))
            continue
        format, _, scales = kind.partition("-")
        vectors = scales == "vector"
        x_scale = scale_of(amax(x, per_row=vectors), format)
        w_scale = scale_of(amax(weight, per_row=vectors), format)
        codes = quantize(weight, w_scale, format)
        made.append((Activation(quantize(x, x_scale, format), x_scale), codes, w_scale.squeeze(-1)))
    return made


def median_us(run: Callable[[int], object], *, sets: int = SETS, budget_ms: float = 25) -> float:
    """Median microseconds of `run(set)`, as CUDA graphs of one launch per set, replayed."""
    if DEVICE.type == "cpu":
        return elapsed_ms(lambda: [run(index) for index in range(sets)]) * 1000 / sets
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(sets):
            run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            run(index)
    graph.replay()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget_ms:
        times.append(elapsed_ms(graph.replay))
        if len(times) >= 200:
            break
    return sorted(times)[len(times) // 2] * 1000 / sets


def sustained_us(runs: Sequence[Callable[[int], object]], *, turns: int = 2) -> list[float]:
    """Microseconds of each run at the clock that back-to-back work settles at, the least of turns
    of a quarter of a second each, of which the second half counts. Every second turn goes
    backwards: behind a hungrier one the same kernel was up to 7 % slower than in another place."""
    graphs = []
    for run in runs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(SETS):
                run(index)
        graphs.append(graph)
    least = [float("inf")] * len(runs)
    order = list(enumerate(graphs))
    for turn in range(turns):
        for which, graph in order[:: -1 if turn % 2 else 1]:
            once = elapsed_ms(graph.replay)
            half = max(1, round(125 / once))
            elapsed_ms(lambda graph=graph, half=half: [graph.replay() for _ in range(half)])
            ms = elapsed_ms(lambda graph=graph, half=half: [graph.replay() for _ in range(half)])
            least[which] = min(least[which], ms / half * 1000 / SETS)
    return least


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def gemm_rows(kinds: Sequence[str], scale: str, layers: Sequence[str]) -> list[dict[str, object]]:
    shapes = product_shapes(SCALES[scale].transformer)
    results = []
    for kind in kinds:
        for name, (columns, depth) in shapes.items():
            for rows in ROWS[scale] if name in layers else ():
                results += gemm_shape(kind, name, rows, columns, depth)
    return results


def gated_rows(kinds: Sequence[str], scale: str) -> list[dict[str, object]]:
    """w13 with its gate: one kernel of both against the engine's product, then `gated`."""
    shape = product_shapes(SCALES[scale].transformer)["w13"]
    return [
        row for kind in kinds for rows in ROWS[scale] for row in gated_shape(kind, rows, *shape)
    ]


def gemm_shape(
    kind: str, name: str, rows: int, columns: int, depth: int
) -> list[dict[str, object]]:
    sets = operands(kind, rows, columns, depth, SETS)
    x, weight, scale = sets[0]
    exact = x.values[:128].double() @ weight.double().T
    if x.scale is not None and scale is not None:
        exact = exact * (x.scale[:128] if x.scale.ndim else x.scale) * scale

    def runner(candidate: Candidate) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            x, weight, scale = sets[index]
            return matmul(
                x, weight, scale, torch.bfloat16, candidate.implementation, candidate.tile
            )

        return run

    runs = {
        candidate: runner(candidate)
        for candidate in candidates(kind, rows)
        if not refusal(candidate.implementation, x, scale)
    }
    return race(name, kind, (rows, columns, depth), runs, exact, 5e-3)


def gated_shape(kind: str, rows: int, columns: int, depth: int) -> list[dict[str, object]]:
    spec = SPEC_OF_KIND[kind]
    sets = operands(kind, rows, columns, depth, SETS)
    x, weight, scale = sets[0]
    first = Activation(x.values[:128], x.scale[:128] if _is_vector(x.scale) else x.scale)
    wide = gated_matmul_reference(first, weight, scale, PLAIN, torch.float32).values
    is_static = spec is not None and spec.is_static
    static = scale_of(amax(wide, per_row=False), spec.format) if spec and is_static else None
    out = Output(spec, static)
    exact = _values(encode_reference(wide, out, torch.float32))
    linears = [Linear(_layer(spec, *operand), torch.bfloat16) for operand in sets]

    def apart(index: int) -> Activation:
        return gated_triton(linears[index](sets[index][0]), out)

    def runner(candidate: Candidate) -> Callable[[int], Activation]:
        def run(index: int) -> Activation:
            return gated_matmul(
                *sets[index], out, torch.bfloat16, candidate.implementation, candidate.tile
            )

        return run

    runs: dict[Candidate, Callable[[int], object]] = {Candidate(SEPARATE): apart}
    runs |= {candidate: runner(candidate) for candidate in gated_candidates(kind, rows)}
    # Codes of values that differ by a rounding are neighbours here and there.
    return race(GATED_LAYER, kind + GATED, (rows, columns, depth), runs, exact, 3e-2)


def heads_rows(kinds: Sequence[str], scale: str) -> list[dict[str, object]]:
    """to_qkv with norm and rotation of its heads: one kernel against the engine's product, then
    `qk_norm_rope`."""
    config = SCALES[scale].transformer
    return [
        row for kind in kinds for rows in ROWS[scale] for row in heads_shape(kind, rows, config)
    ]


def heads_shape(kind: str, rows: int, config: ZImageConfig) -> list[dict[str, object]]:
    columns, depth = product_shapes(config)["to_qkv"]
    sets = operands(kind, rows, columns, depth, SETS)
    linears = [Linear(_layer(SPEC_OF_KIND[kind], *operand), torch.bfloat16) for operand in sets]
    weights = (1 + 0.1 * torch.randn(2, config.head_dim, device=DEVICE)).to(torch.bfloat16)
    norms = HeadNorms(*weights, 1e-5)
    place = torch.arange(rows)  # as in a picture of 32 rows
    positions = torch.stack([torch.full_like(place, 65), place % 32, place // 32], dim=1)
    ropes = [
        Rope.of(positions[:count], config.axes_dims, config.rope_theta, DEVICE)
        for count in (rows, 128)
    ]
    x, weight, scale = sets[0]
    first = Activation(x.values[:128], x.scale[:128] if _is_vector(x.scale) else x.scale)
    exact = head_product_reference(first, weight, scale, norms, ropes[1]).double()

    def apart(index: int) -> Heads:
        return qk_norm_rope(linears[index](sets[index][0])[None], norms, ropes[0].table)

    def runner(tile: Tile) -> Callable[[int], Tensor]:
        return lambda index: head_product(*sets[index], norms, ropes[0], tile)

    runs: dict[Candidate, Callable[[int], object]] = {Candidate(SEPARATE): apart}
    if not hopper_refusal(DEVICE):
        tiles = in_groups(HEADS_TILES, rows)
        runs |= {Candidate("wgmma-heads", tile): runner(tile) for tile in tiles}
    return race(HEADS_LAYER, kind + HEADS, (rows, columns, depth), runs, exact, 1e-2)


def _layer(
    spec: QuantSpec | None, x: Activation, weight: Tensor, scale: Tensor | None
) -> torch.nn.Module:
    if spec is not None and scale is not None:
        return QuantLinear(spec, weight, scale, x.scale if spec.is_static else None)
    with torch.device("meta"):
        linear = torch.nn.Linear(*weight.T.shape, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _is_vector(scale: Tensor | None) -> bool:
    return scale is not None and scale.ndim > 0


def gated_candidates(kind: str, rows: int) -> list[Candidate]:
    """With the same bytes per step for two bytes a value as for one."""
    shorter = (replace(tile, k=64) if kind == "bf16" else tile for tile in GATED_TILES)
    triton = [Candidate("triton-gated", tile) for tile in shorter] if has_tma(DEVICE) else []
    tiles = [tile for tile in WGMMA_TILES if not tile.n % 64]
    wgmma = [Candidate("wgmma-gated", tile) for tile in in_groups(tiles, rows)]
    return [*triton, *([] if hopper_refusal(DEVICE) else wgmma)]


# What both w13 and w2 are quantized to.
SPEC_OF_KIND: dict[str, QuantSpec | None] = {
    "bf16": None,
    "e4m3-scalar": E4M3_STATIC,
    "e4m3-vector": E4M3_ROW,
    "int8-vector": INT8_ROT,
}


def race(
    name: str,
    kind: str,
    shape: tuple[int, int, int],
    runs: Mapping[Candidate, Callable[[int], object]],
    exact: Tensor,
    most_error: float,
) -> list[dict[str, object]]:
    """Every candidate's error and time. The fastest ones run again in turns, each for a quarter of
    a second: a GPU at its power limit favours who moves less, which a burst does not show."""
    rows, columns, depth = shape
    flops = 2 * rows * columns * depth
    results: list[dict[str, object]] = []
    right: dict[int, Callable[[int], object]] = {}
    for candidate, run in runs.items():
        row: dict[str, object] = {
            "layer": name,
            "kind": kind,
            "rows": rows,
            "columns": columns,
            "depth": depth,
            "implementation": candidate.implementation,
            "tile": asdict(candidate.tile) if candidate.tile else None,
        }
        try:
            error = relative_error(_first_values(run(0), len(exact)), exact)
            row["relative_error"] = error
            if error > most_error:
                row["wrong"] = True
            else:
                us = median_us(run)
                row |= {"us": us, "tflops": flops / us / 1e6}
                right[len(results)] = run
        except Exception as reason:  # noqa: BLE001  a tile may not fit the GPU's shared memory
            row["refused"] = str(reason).strip().partition("\n")[0][:200]
        results.append(row)
    # Triton's tiles crowd cuBLAS out, which moves less and gains when power is short.
    by_us = sorted(right, key=lambda index: results[index]["us"])  # type: ignore[arg-type, return-value]
    cublas = [i for i in by_us if str(results[i]["implementation"]).startswith("cublas")]
    # The best of every height, since `with_other_heights` compares these.
    tallest = {_height(results[index]): index for index in reversed(by_us)}.values()
    finalists = [*dict.fromkeys([*by_us[:FINALISTS], *cublas, *tallest])]
    if len(finalists) > 1 and DEVICE.type == "cuda":
        for index, us in zip(finalists, sustained_us([right[i] for i in finalists]), strict=True):
            results[index]["sustained_us"] = us
    for row in results:
        print(_race_line(row), flush=True)
    return results


def _first_values(result: object, count: int) -> Tensor:
    """The first rows of what a candidate computed, dequantized."""
    if isinstance(result, Activation):
        scale = result.scale
        first = result.values[:count]
        return _values(Activation(first, scale[:count] if _is_vector(scale) else scale))
    if isinstance(result, tuple):  # q, k and v of one picture
        return torch.cat([heads[0, :count].flatten(1) for heads in result], dim=1)
    assert isinstance(result, Tensor)
    return result[:count]


def _race_line(row: dict[str, object]) -> str:
    tile = Tile(**row["tile"]) if row["tile"] else None  # type: ignore[arg-type]
    line = f"{row['layer']:9} {row['kind']:18} {row['rows']:5} {row['implementation']:12} "
    line += f"{_tile_text(tile):28} "
    if "us" in row:
        line += f"{row['us']:7.1f} us {row['tflops']:6.0f} TFLOP/s "
    if "sustained_us" in row:
        line += f"sustained {row['sustained_us']:7.1f} us "
    line += str(row.get("refused", ""))[:60] + ("WRONG " if "wrong" in row else "")
    return line + f"error {row.get('relative_error', float('nan')):.1e}"


def _tile_text(tile: Tile | None) -> str:
    if tile is None:
        return ""
    shape = f"{tile.m}x{tile.n}x{tile.k}"
    parts = f"w{tile.warps} s{tile.stages} p{tile.parts} g{tile.group} x{tile.per_sm}"
    return f"{shape} {parts} c{tile.cluster}"


def best_choices(results: list[dict[str, object]]) -> list[dict[str, object]]:
    """The fastest right implementation of every (kind, shape, rows), sustained where several were
    timed so."""
    best: dict[tuple[object, ...], dict[str, object]] = {}
    for row in results:
        key = _shape_key(row)
        if "us" in row and (key not in best or _speed(row) < _speed(best[key])):
            best[key] = row
    return [_choice(row) for row in best.values()]


def with_other_heights(
    results: list[dict[str, object]], winners: list[dict[str, object]]
) -> list[dict[str, object]]:
    """Behind every winner the best whose tiles have another height, which may fit other rows."""
    choices = []
    for winner in winners:
        height = _height(winner)
        others = [
            row
            for row in results
            if _shape_key(row) == _shape_key(winner) and "us" in row and _height(row) != height
        ]
        choices += [winner, *best_choices(others)]
    return choices


def _shape_key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[part] for part in ("kind", "columns", "depth", "rows"))


def _height(row: dict[str, object]) -> int:
    return row["tile"]["m"] if row["tile"] else CUBLAS_TILE.m  # type: ignore[index]


def _choice(row: dict[str, object]) -> dict[str, object]:
    is_cuda = DEVICE.type == "cuda"
    parts = ("kind", "rows", "columns", "depth", "implementation", "tile")
    return {
        "gpu": torch.cuda.get_device_name() if is_cuda else None,
        "capability": list(torch.cuda.get_device_capability()) if is_cuda else None,
        **{part: row[part] for part in parts},
        "us": row.get("sustained_us", row["us"]),
    }


def _speed(row: dict[str, object]) -> tuple[float, float]:
    """What orders candidates: sustained ones first."""
    return row.get("sustained_us", float("inf")), row["us"]  # type: ignore[return-value]


def merge_choices(path: Path, choices: list[dict[str, object]]) -> None:
    """Replace what was measured anew; other kinds, shapes and GPUs stay."""
    parts = ("gpu", "kind", "columns", "depth", "rows")

    def key(row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row[part]) for part in parts)

    anew = {key(row) for row in choices}
    kept = [row for row in json.loads(path.read_text())["choices"] if key(row) not in anew]
    rows = sorted([*kept, *choices], key=key)  # stable: a winner stays in front
    path.write_text(json.dumps({"choices": rows}, indent=1) + "\n")


def merge_ceiling(path: Path, record: Envelope) -> None:
    """The best product of every format and the copy bandwidth of this GPU; other GPUs stay."""
    best: dict[str, float] = {}
    for row in record["gemm"]:
        format = row["kind"].partition("-")[0]
        best[format] = max(best.get(format, 0.0), row.get("tflops", 0.0))
    table = json.loads(path.read_text())
    table[record["gpu"]["name"]] = {
        "tflops": best,
        "gb_per_s": record["fused"][0]["gb_per_s"],
        "created": record["created"],
        "commit": record["commit"],
    }
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


SPECS: dict[str, QuantSpec | None] = {
    "bf16": None,
    "e4m3-static": E4M3_STATIC,
    "e4m3-row": E4M3_ROW,
    "int8-rot": INT8_ROT,
}


@dataclass(frozen=True)
class Limit:
    """What a kernel does at least, and how fast this GPU does that.

    amount: bytes that must move, or operations. rate: its name, `gb_per_s` or `tflops`. best: a
    device copy's, or a large BF16 product's. share: the name of the quotient.
    """

    amount: float
    rate: str
    best: float
    share: str

    @classmethod
    def copy(cls, num_bytes: float, gb_per_s: float) -> "Limit":
        return cls(num_bytes, "gb_per_s", gb_per_s, "share_of_copy")

    @classmethod
    def product(cls, flops: float, tflops: float) -> "Limit":
        return cls(flops, "tflops", tflops, "share_of_product")

    def reached(self, us: float) -> dict[str, float]:
        rate = self.amount / us / (1e3 if self.rate == "gb_per_s" else 1e6)
        return {self.rate: rate, self.share: rate / self.best}


def fused_rows(scale: str) -> list[dict[str, object]]:
    """Every fused kernel in every output format: time and achieved bandwidth."""
    config = SCALES[scale].transformer
    dim, ffn, head_dim = config.dim, config.ffn_dim, config.head_dim
    copy_gbs = copy_bandwidth(2**28 if scale == "full" else 2**16)
    product = product_tflops(8192 if scale == "full" else 64)
    results: list[dict[str, object]] = [{"kernel": "device copy", "gb_per_s": copy_gbs}]
    print(f"device copy {copy_gbs:.0f} GB/s")
    for rows in ROWS[scale]:
        x = [torch.randn(1, rows, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(SETS)]
        h = [torch.randn(rows, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(SETS)]
        w13 = [torch.randn(rows, 2 * ffn, device=DEVICE, dtype=torch.bfloat16) for _ in range(SETS)]
        wide = [both[:, :ffn].contiguous() for both in w13]
        qkv = [torch.randn(1, rows, 3 * dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        vectors = torch.randn(1, 2, dim, device=DEVICE)
        gate, vector = vectors[:, 0], vectors[:, 1]
        weight = torch.ones(head_dim, device=DEVICE, dtype=torch.bfloat16)
        positions = torch.arange(rows)[:, None].expand(-1, 3)
        table = rope_table(positions, config.axes_dims, config.rope_theta).to(DEVICE)
        for name, spec in SPECS.items():
            static = torch.tensor(0.01, device=DEVICE) if spec and spec.is_static else None
            out = Output(spec, static)
            out_bytes = 2 if spec is None else 1
            jobs: list[tuple[str, Callable[[int], object], Callable[[int], object], int]] = [
                (
                    "norm",
                    lambda i, out=out: norm_triton(x[i], vector, 1e-5, out),
                    lambda i, out=out: norm_reference(x[i], vector, 1e-5, out),
                    rows * dim * (2 + out_bytes),
                ),
                (
                    "residual_norm",
                    lambda i, out=out: run_residual_norm(x[i], h[i], gate, vector, 1e-5, out),
                    lambda i, out=out: residual_norm_reference(x[i], h[i], gate, vector, 1e-5, out),
                    rows * dim * (6 + out_bytes),
                ),
                (
                    "gated",
                    lambda i, out=out: gated_triton(w13[i], out),
                    lambda i, out=out: gated_reference(w13[i], out),
                    rows * ffn * (4 + out_bytes),
                ),
            ]
            for kernel, inputs in (("encode", h), ("encode, wide", wide)):
                if spec is not None:
                    jobs.append(
                        (
                            kernel,
                            lambda i, of=inputs, out=out: run_encode(of[i], out),
                            lambda i, of=inputs, out=out: encode_reference(
                                of[i].float(), out, torch.bfloat16
                            ),
                            inputs[0].numel() * 3,
                        )
                    )
            for kernel, run, reference, num_bytes in jobs:
                limit = Limit.copy(num_bytes, copy_gbs)
                results.append(fused_row(kernel, name, rows, run, reference, limit, SETS))
        # In place on q and k, or from all three to codes of their own.
        codes = torch.full((3, 1, dim // head_dim), 0.02, device=DEVICE)
        for name, scale_of_heads, bytes_each in (("bf16", None, 8), ("e4m3", codes, 9)):
            rest = (HeadNorms(weight, weight, 1e-5), table, scale_of_heads)
            results.append(
                fused_row(
                    "qk_norm_rope",
                    name,
                    rows,
                    lambda i, rest=rest: qk_norm_rope_triton(qkv[i], *rest),
                    lambda i, rest=rest: qk_norm_rope_reference(qkv[i], *rest),
                    Limit.copy(rows * dim * bytes_each, copy_gbs),
                    3,
                )
            )
        results += attention_rows([x.unflatten(-1, (3, -1, head_dim)) for x in qkv], product)
    return [*results, *decoder_rows(scale, copy_gbs)]


def attention_rows(qkv: list[Tensor], best: float) -> list[dict[str, object]]:
    """Every exact backend that runs here, against PyTorch's choice. qkv: packed heads."""
    _, rows, _, heads, head_dim = qkv[0].shape
    target = Target(DEVICE, torch.bfloat16, head_dim)
    flops = 4 * rows**2 * heads * head_dim
    return [
        fused_row(
            "attention",
            name,
            rows,
            lambda i, run=BACKENDS[name].run: run(*qkv[i].unbind(2)),
            lambda i: attention(*qkv[i].unbind(2)),
            Limit.product(flops, best),
            len(qkv),
            most_error=5e-3,  # both round probabilities: each is 2.3e-3 from the exact result
        )
        for name in AUTO
        if BACKENDS[name].refusal(target) is None
    ]


def decoder_rows(scale: str, copy_gbs: float) -> list[dict[str, object]]:
    """The decoder's kernels; their rows are pixels."""
    results = []
    for channels, height, width in PICTURES[scale]:
        shape, pixels = (1, channels, height, width), height * width
        pictures = [
            torch.randn(shape, device=DEVICE)
            .to(torch.bfloat16)
            .contiguous(memory_format=torch.channels_last)
            for _ in range(SETS)
        ]
        weight, bias = torch.randn(2, channels, device=DEVICE).unbind()
        by = Normalization(group_moments_reference(pictures[:1], 32, 1e-6), weight, bias, True)
        jobs = (
            (
                "group_moments",
                "fp32",
                lambda i, of=pictures: group_moments_triton([of[i]], 32, 1e-6),
                lambda i, of=pictures: group_moments_reference([of[i]], 32, 1e-6),
                2,
            ),
            (
                "normalize_window",
                "bf16",
                lambda i, of=pictures, by=by: normalize_window_triton(of[i], None, None, by),
                lambda i, of=pictures, by=by: normalize_window_reference(of[i], None, None, by),
                4,
            ),
        )
        for kernel, output, run, reference, bytes_each in jobs:
            limit = Limit.copy(pixels * channels * bytes_each, copy_gbs)
            results.append(fused_row(kernel, output, pixels, run, reference, limit, SETS))
    best = product_tflops(8192 if scale == "full" else 64)
    for pixels, channels in ATTENDED[scale]:
        q, x = (
            [torch.randn(pixels, channels, device=DEVICE).to(ATTENTION_DTYPE) for _ in range(SETS)]
            for _ in range(2)
        )
        results.append(
            fused_row(
                "pixel_attention",
                "bf16",
                pixels,
                lambda i, q=q, x=x: pixel_attention_triton(q[i], x[i]),
                lambda i, q=q, x=x: pixel_attention_reference(q[i], x[i]),
                Limit.product(4 * pixels**2 * channels, best),
                SETS,
            )
        )
    return results


def fused_row(
    kernel: str,
    output: str,
    rows: int,
    run: Callable[[int], object],
    reference: Callable[[int], object],
    limit: Limit,
    sets: int,
    most_error: float = MAX_FUSED_ERROR,
) -> dict[str, object]:
    # In place kernels change their input: the reference goes first, on another set.
    expected = _values(reference(1))
    error = relative_error(_values(run(1)), expected)
    if error > most_error:
        print(f"{kernel:16} {output:12} {rows:6} WRONG: relative error {error:.1e}")
        return {"kernel": kernel, "output": output, "rows": rows, "wrong": True, "error": error}
    us = median_us(run, sets=sets)
    reference_us = median_us(reference, sets=sets, budget_ms=10)
    reached = limit.reached(us)
    print(
        f"{kernel:16} {output:12} {rows:6} {us:7.1f} us {reached[limit.rate]:6.0f} {limit.rate} "
        f"({limit.share} {reached[limit.share]:4.0%}), reference {reference_us:7.1f} us",
        flush=True,
    )
    return {
        "kernel": kernel,
        "output": output,
        "rows": rows,
        "relative_error": error,
        "us": us,
        **reached,
        "reference_us": reference_us,
    }


def _values(result: object) -> Tensor:
    """What a kernel wrote, dequantized: the last of several results."""
    if isinstance(result, tuple):
        last = result[-1]
        heads = result[:2]  # q and k; codes of 8 bits are not joined everywhere
        result = last if isinstance(last, Activation) else torch.cat([x.float() for x in heads])
    if isinstance(result, Activation):
        values = result.values.float()
        return values if result.scale is None else values * result.scale
    assert isinstance(result, Tensor)
    return result.float().clone()


def copy_bandwidth(count: int) -> float:
    """Bytes read plus bytes written per second of a copy of `count` floats, in GB/s."""
    source = torch.randn(count, device=DEVICE)
    target = torch.empty_like(source)
    us = median_us(lambda _: target.copy_(source), sets=1)
    return 2 * source.nbytes / us / 1e3


def product_tflops(side: int) -> float:
    """Operations per second of a square BF16 product, in TFLOP/s."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    us = median_us(lambda _: torch.mm(a, b), sets=1)
    return 2 * side**3 / us / 1e6


def compile_ahead(processes: int, kinds: Sequence[str]) -> None:
    """Fill Triton's cache, `wgmma`'s too, from several processes: the timing run does not wait."""
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, "--compile", f"{index}/{processes}", "--kinds", *kinds]
        )
        for index in range(processes)
    ]
    for job in jobs:
        job.wait()


def compile_share(index: int, count: int, kinds: Sequence[str]) -> None:
    work = [(kind, c) for kind in kinds for c in candidates(kind) if c.tile]
    work += [(kind, candidate) for kind in kinds for candidate in gated_candidates(kind)]
    for kind, candidate in work[index::count]:
        x, weight, scale = operands(kind, 256, 512, 512, 1)[0]
        try:
            if candidate.implementation in GATED_IMPLEMENTATIONS:
                spec = SPEC_OF_KIND[kind]
                out = Output(spec, x.scale if spec and spec.is_static else None)
                how = (candidate.implementation, candidate.tile)
                gated_matmul(x, weight, scale, out, torch.bfloat16, *how)
                continue
            matmul(x, weight, scale, torch.bfloat16, candidate.implementation, candidate.tile)
        except Exception:  # noqa: BLE001  the timing run reports it
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--choices", type=Path, help="write the engine's GEMM table there")
    parser.add_argument("--ceilings", type=Path, help="write what a profile compares with there")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--no-fused", action="store_true")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--scale", choices=ROWS, default="full", help="tiny: a dry run")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    everything = (set(KINDS), set(LAYERS))
    is_partial = (set(arguments.kinds), set(arguments.layers)) != everything
    if arguments.ceilings and (arguments.no_fused or is_partial):
        parser.error("--ceilings needs every kind and layer, and the fused kernels")
    if arguments.compile:
        index, _, count = arguments.compile.partition("/")
        compile_share(int(index), int(count), arguments.kinds)
        return
    if arguments.scale == "full" and DEVICE.type == "cpu":
        parser.error("full size needs a GPU; --scale tiny proves the script without one")
    if arguments.kinds and arguments.layers != [HEADS_LAYER] and DEVICE.type == "cuda":
        compile_ahead(min(12, os.cpu_count() or 1), arguments.kinds)
    bound_workspaces(DEVICE)  # as in the engine
    record: Envelope = envelope()
    record["gemm"] = gemm_rows(arguments.kinds, arguments.scale, arguments.layers)
    if GATED_LAYER in arguments.layers:
        record["gemm"] += gated_rows(arguments.kinds, arguments.scale)
    if HEADS_LAYER in arguments.layers:
        record["gemm"] += heads_rows(arguments.kinds, arguments.scale)
    if arguments.out:  # what is measured survives an early end
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    choices = best_choices(record["gemm"])  # type: ignore[arg-type]
    for choice in choices:
        print(choice["kind"], choice["rows"], choice["columns"], choice["implementation"],
              _tile_text(Tile(**choice["tile"]) if choice["tile"] else None))  # type: ignore[arg-type]  # fmt: skip
    if not arguments.no_fused:
        record["fused"] = fused_rows(arguments.scale)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.choices:
        merge_choices(arguments.choices, with_other_heights(record["gemm"], choices))  # type: ignore[arg-type]
    if arguments.ceilings:
        merge_ceiling(arguments.ceilings, record)


if __name__ == "__main__":
    main()
