"""Which matrix product runs: the shipped measurements, and how a shape finds its row."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from compare import relative_error
from zimage_fp8.engine import gemm
from zimage_fp8.engine.gemm import (
    CUBLAS_TILE,
    GATED,
    HEADS,
    SEPARATE,
    Choice,
    Linear,
    choose,
    fitting,
    kind_of,
    measured,
)
from zimage_fp8.kernels import hopper
from zimage_fp8.kernels.activation import Activation, Output, encode_reference
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.gated_matmul import GATED_IMPLEMENTATIONS
from zimage_fp8.kernels.matmul import IMPLEMENTATIONS, matmul
from zimage_fp8.kernels.qk_norm_rope import HeadNorms
from zimage_fp8.kernels.rope import Rope
from zimage_fp8.kernels.swiglu import gated
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import HEADS_TILE, Program
from zimage_fp8.layout import ZImageConfig, product_shapes
from zimage_fp8.numerics import E4M3_ROW, E4M3_STATIC, INT8_ROW, QuantSpec
from zimage_fp8.quant.linear import QuantLinear, quantize_weight, weight_amax, weight_scales

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
SCALAR, VECTOR = torch.ones([]), torch.ones(8)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements on three GPUs, of which this is the first, in place of the shipped ones."""
    rows = (
        Choice("H", (9, 0), "e4m3-scalar", 1000, 64, 32, "cublas", None, 10.0),
        Choice("H", (9, 0), "e4m3-scalar", 4000, 64, 32, "triton-tma", Tile(n=128), 40.0),
        Choice("H2", (9, 0), "e4m3-scalar", 1000, 64, 32, "cublas-row", None, 10.0),
        Choice("A", (8, 9), "e4m3-scalar", 1000, 64, 32, "triton", Tile(n=64), 20.0),
    )
    monkeypatch.setattr(gemm, "measured", lambda: rows)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H")
    monkeypatch.setattr(gemm, "multiprocessors", lambda _: 132)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (500, "cublas"),
        (1000, "cublas"),
        (1900, "cublas"),
        (2400, "triton-tma"),
        (2600, "triton-tma"),
        (8000, "triton-tma"),
        (499, None),  # less than half of what was measured
        (8001, None),
    ],
)
def test_the_nearest_rows_decide(rows: int, found: str | None) -> None:
    choice = choose(CUDA, "e4m3-scalar", rows, 64, 32)
    assert (choice.implementation if choice else None) == found


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("kind", "columns", "depth"),
    [("e4m3-vector", 64, 32), ("e4m3-scalar", 65, 32), ("e4m3-scalar", 64, 33)],
)
def test_what_was_not_measured_has_no_choice(kind: str, columns: int, depth: int) -> None:
    assert choose(CUDA, kind, 1000, columns, depth) is None


@pytest.mark.usefixtures("table")
def test_a_gpu_reads_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    found = choose(CUDA, "e4m3-scalar", 1000, 64, 32)
    assert found is not None
    assert (found.implementation, found.tile) == ("triton", Tile(n=64))
    choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 1))
    assert choose(CUDA, "e4m3-scalar", 1000, 64, 32) is None


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("name", "rows", "found"),
    [
        ("H2", 1000, "cublas-row"),  # its own, though another one's come first
        ("H2", 4000, None),  # not the other's: what was measured there is no better a guess
        ("H3", 4000, "triton-tma"),  # never measured: the first of its capability
    ],
)
def test_a_gpu_reads_the_rows_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int, found: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    choice = choose(CUDA, "e4m3-scalar", rows, 64, 32)
    assert (choice.implementation if choice else None) == found


# Of 3,840 columns, 2,112 rows are 264 tiles of 192 x 160: two for each multiprocessor. 2,144 are
# 288, three for some of them, where 255 tiles of 128 x 256 are two.
TALL = Choice("H", (9, 0), "int8-vector", 2112, 3840, 64, "wgmma", Tile(m=192, n=160), 100.0)
LOW = Choice("H", (9, 0), "int8-vector", 2112, 3840, 64, "triton-tma", Tile(m=128, n=256), 110.0)


@pytest.mark.parametrize(
    ("choice", "rows", "us"),
    [
        (TALL, 2112, 100.0),
        (TALL, 2080, 100.0),
        (TALL, 2144, 150.0),
        (TALL, 1056, 50.0 * 2),  # 144 tiles: a second round for twelve of them
        (LOW, 2144, 110.0),
        (LOW, 4352, 220.0),
        (replace(LOW, tile=Tile(m=128, n=128, per_sm=2)), 2144, 110.0),  # 510 of 264 at a time
        (replace(LOW, implementation="triton-gated", tile=Tile(n=128), columns=7680), 2200, 137.5),
        (replace(LOW, implementation="cublas", tile=None), 2200, 165.0),  # 270 tiles
    ],
)
def test_time_comes_in_rounds(choice: Choice, rows: int, us: float) -> None:
    assert choice.expected_us(rows, 132) == pytest.approx(us)


# A cluster of two on 132 multiprocessors has 66 places. 3,840 columns are 15 tiles of 256, but 8
# pairs: of 136 at 2,112 rows, a third round for four. 24 tiles of 160 are 12 pairs, 132 in two.
@pytest.mark.parametrize(
    ("tile", "rows", "alone", "paired"),
    [
        (Tile(m=128, n=256), 2112, 2, 3),
        (Tile(m=128, n=256), 2048, 2, 2),
        (Tile(m=128, n=256), 4160, 4, 4),  # 33 x 8 pairs are four rounds without a rest
        (Tile(m=192, n=160), 2112, 2, 2),
        (Tile(m=192, n=160), 2144, 3, 3),
    ],
)
def test_a_cluster_takes_its_places_at_once(tile: Tile, rows: int, alone: int, paired: int) -> None:
    """Measured at 128 rows, where either needs one round, it takes as long as it has rounds."""
    choice = Choice("H", (9, 0), "int8-vector", 128, 3840, 64, "wgmma", tile, 1.0)
    assert choice.expected_us(rows, 132) == alone
    pairs = replace(choice, tile=replace(tile, cluster=2))
    assert pairs.expected_us(rows, 132) == paired


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("rows", "low_us", "found"),
    [
        (2112, 110.0, TALL),
        (2144, 110.0, LOW),
        (2144, 147.0, TALL),  # 3 % faster: no more than two measurements differ
        (2112, 97.0, TALL),
        (2112, 90.0, TALL),  # a loop that was measured may have put it in front
    ],
)
def test_tiles_that_do_not_fit_give_way(
    monkeypatch: pytest.MonkeyPatch, rows: int, low_us: float, found: Choice
) -> None:
    monkeypatch.setattr(gemm, "measured", lambda: (TALL, replace(LOW, us=low_us)))
    monkeypatch.setattr(gemm, "hopper_refusal", lambda _: None)
    choice = choose(CUDA, "int8-vector", rows, 3840, 64)
    assert choice is not None
    assert choice.implementation == found.implementation


@pytest.mark.usefixtures("table")
def test_tiles_that_fit_stay_where_others_would_fit_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 rows for 4,160: the winner's 22 tiles in ten rounds, where the other's guess is eleven
    for twelve. That was wrong by 7 %, since cuBLAS had other tiles."""
    shape = {"rows": 4160, "columns": 11520, "depth": 3840}
    tall = replace(TALL, **shape, tile=Tile(m=192, n=192), us=100.0)
    other = replace(tall, implementation="cublas", tile=None, us=103.0)
    assert other.expected_us(4096, 132) < 0.97 * tall.expected_us(4096, 132)
    monkeypatch.setattr(gemm, "measured", lambda: (tall, other))
    monkeypatch.setattr(gemm, "hopper_refusal", lambda _: None)
    assert choose(CUDA, "int8-vector", 4096, 11520, 3840) == tall


@pytest.mark.usefixtures("table")
def test_what_cannot_run_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "measured", lambda: (TALL, LOW))
    monkeypatch.setattr(gemm, "hopper_refusal", lambda _: "it needs NVRTC")
    choice = choose(CUDA, "int8-vector", 2112, 3840, 64)
    assert choice == LOW


def test_the_cpu_runs_the_reference() -> None:
    assert choose(CPU, "e4m3-scalar", 2112, 11520, 3840) is None


@pytest.mark.parametrize(
    "choice",
    measured(),
    ids=lambda it: f"{it.gpu.split()[1]}-{it.kind}-{it.rows}-{it.columns}-{it.implementation}",
)
def test_every_shipped_choice_can_run(choice: Choice) -> None:
    """What `kernels.matmul` would refuse or divide wrongly must not be in the file."""
    format = choice.kind.partition("-")[0]
    allowed = {
        "bf16": {"cublas", "wgmma"},
        "e4m3-scalar": {"cublas", "cublas-slow", "cublas-row", "triton-tma", "triton", "wgmma"},
        "e4m3-vector": {"cublas-row", "triton-tma", "triton", "wgmma"},
        "int8-vector": {"triton-tma", "triton", "wgmma"},
    }
    if choice.kind.endswith(GATED):
        assert choice.kind.removesuffix(GATED) in allowed
        assert choice.implementation in (*GATED_IMPLEMENTATIONS, SEPARATE)
    elif choice.kind.endswith(HEADS):
        assert choice.kind.removesuffix(HEADS) in allowed
        assert choice.implementation in ("wgmma-heads", SEPARATE)
    else:
        assert choice.implementation in allowed[choice.kind]
        assert choice.implementation in IMPLEMENTATIONS
    needs_tma = choice.implementation in ("triton-tma", "triton-gated")
    assert not needs_tma or choice.capability >= (9, 0)
    assert format == "bf16" or choice.capability >= ((8, 9) if format == "e4m3" else (8, 0))
    assert choice.us > 0
    if choice.implementation.startswith("triton"):
        assert choice.tile is not None
        for side in (choice.tile.m, choice.tile.n, choice.tile.k):
            assert side >= 16
            assert not side & (side - 1), "Triton's blocks are powers of two"
        assert choice.tile.parts in (1, 2)
        assert choice.tile.warps in (1, 2, 4, 8, 16)
        assert min(choice.tile.stages, choice.tile.group, choice.tile.per_sm) >= 1
    elif choice.implementation.startswith("wgmma"):
        assert choice.capability == (9, 0)
        assert choice.tile is not None
        gated, heads = choice.kind.endswith(GATED), (4, 10) if choice.kind.endswith(HEADS) else None
        tile = choice.tile  # which the next line would refuse
        shape = (tile.m // 64, tile.n, tile.stages, tile.cluster)
        Program(torch.int8, *shape, gated=gated, heads=heads)
    else:
        assert choice.tile is None


def test_every_product_of_the_full_size_is_measured() -> None:
    """For one size of picture at least, in every format; twice only with tiles of two heights."""
    shapes = set(product_shapes(ZImageConfig()).values())
    keys = [
        (it.gpu, it.kind, it.rows, it.columns, it.depth, (it.tile or CUBLAS_TILE).m)
        for it in measured()
    ]
    assert len(set(keys)) == len(keys)
    for kind in ("bf16", "e4m3-scalar", "e4m3-vector", "int8-vector"):
        assert shapes <= {(it.columns, it.depth) for it in measured() if it.kind == kind}


@pytest.mark.parametrize(
    ("reads", "weight_scale", "kind"),
    [
        (Output(), None, "bf16"),
        (Output(E4M3_STATIC, SCALAR), SCALAR, "e4m3-scalar"),
        (Output(E4M3_STATIC, SCALAR), VECTOR, "e4m3-vector"),
        (Output(E4M3_ROW), VECTOR, "e4m3-vector"),
        (Output(INT8_ROW), VECTOR, "int8-vector"),
    ],
)
def test_a_kind_is_format_and_scales(
    reads: Output, weight_scale: torch.Tensor | None, kind: str
) -> None:
    assert kind_of(reads, weight_scale) == kind


def test_a_linear_says_what_ran_and_computes_it() -> None:
    plain = nn.Linear(64, 32, bias=False)
    linear = Linear(plain, torch.float32)
    assert linear.describe() == "bf16 by default"
    x = torch.randn(5, 64)
    with torch.inference_mode():
        assert torch.equal(linear(Activation(x)), x @ plain.weight.T)
    assert linear.describe() == "bf16 by cublas"


def test_a_quantized_linear_reads_codes() -> None:
    weight = torch.randn(32, 64)
    (scale,) = weight_scales([weight_amax(weight, E4M3_ROW)], E4M3_ROW)
    quantized = QuantLinear(E4M3_ROW, quantize_weight(weight, scale, E4M3_ROW), scale, None)
    linear = Linear(quantized, torch.float32)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        found = linear(encode_reference(x, linear.reads, torch.float32))
        assert torch.equal(found, quantized(x))
    assert linear.describe() == "e4m3-vector by reference"


def linear_of_codes(columns: int, depth: int) -> Linear:
    weight = torch.randn(columns, depth)
    (scale,) = weight_scales([weight_amax(weight, E4M3_ROW)], E4M3_ROW)
    codes = quantize_weight(weight, scale, E4M3_ROW)
    return Linear(QuantLinear(E4M3_ROW, codes, scale, None), torch.float32)


def test_without_a_measurement_the_gate_follows_its_product() -> None:
    linear = linear_of_codes(64, 32)
    x = encode_reference(torch.randn(5, 32), linear.reads, torch.float32)
    assert linear.gates_at_once(5) is None
    actual, expected = linear.gated(x, Output()), gated(linear(x), Output())
    assert torch.equal(actual.values, expected.values)


@pytest.mark.parametrize(
    ("winners", "at_once", "described"),
    [
        ({1000: "triton-gated"}, {1000, 1900, 600}, "triton-gated"),
        ({1000: "wgmma-gated"}, {1000, 1900, 600}, "wgmma-gated"),
        ({1000: SEPARATE}, set(), "cublas-row"),
        ({1000: "triton-gated", 4000: SEPARATE}, {1000, 1900, 600}, "cublas-row or triton-gated"),
    ],
)
def test_one_kernel_gates_where_that_was_faster(
    monkeypatch: pytest.MonkeyPatch, winners: dict[int, str], at_once: set[int], described: str
) -> None:
    table = [Choice("H", (9, 0), "e4m3-vector", 1000, 64, 32, "cublas-row", None, 10.0)]
    table += [
        Choice("H", (9, 0), "e4m3-vector" + GATED, rows, 64, 32, winner, Tile(), 10.0)
        for rows, winner in winners.items()
    ]
    monkeypatch.setattr(gemm, "fitting", lambda _, kind, *__: [c for c in table if c.kind == kind])
    monkeypatch.setattr(gemm, "multiprocessors", lambda _: 132)
    choose.cache_clear()
    linear = linear_of_codes(64, 32)
    assert linear.gates_at_once(1000) is None, "measured in BF16, not in FP32"
    linear.dtype = torch.bfloat16
    assert linear.describe() == f"e4m3-vector by {described}"
    rows = (400, 600, 1000, 1900, 2600, 8001)
    assert {row for row in rows if linear.gates_at_once(row)} == at_once
    choose.cache_clear()


@pytest.mark.parametrize(
    ("winner", "described"), [("wgmma-heads", "wgmma-heads"), (SEPARATE, "cublas-row")]
)
def test_heads_are_normed_by_their_product_where_that_was_faster(
    monkeypatch: pytest.MonkeyPatch, winner: str, described: str
) -> None:
    columns, norms = 3 * 384, HeadNorms(torch.ones(128).bfloat16(), torch.ones(128).bfloat16(), 0.1)
    rope = Rope.of(torch.arange(5)[:, None].expand(-1, 3), (32, 48, 48), 256.0, CPU)
    table = [Choice("H", (9, 0), "e4m3-vector", 10, columns, 32, "cublas-row", None, 10.0)]
    heads = replace(table[0], kind="e4m3-vector" + HEADS, implementation=winner, tile=HEADS_TILE)
    monkeypatch.setattr(
        gemm, "fitting", lambda _, kind, *__: [c for c in [*table, heads] if c.kind == kind]
    )
    monkeypatch.setattr(gemm, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(gemm, "matmul", lambda *it: matmul(*it[:4], "reference"))
    choose.cache_clear()
    linear = linear_of_codes(columns, 32)
    x = encode_reference(torch.randn(10, 32), linear.reads, torch.float32)
    assert linear.turns_at_once(10) is None, "measured in BF16, not in FP32"
    apart = linear.heads(x, norms, rope)
    linear.dtype = torch.bfloat16
    linear.chosen.clear()
    assert linear.describe() == f"e4m3-vector by {described}"
    at_once = linear.heads(x, norms, rope)
    assert linear.chosen[10] == described
    assert [tuple(head.shape) for head in at_once] == 3 * [(2, 5, 3, 128)]
    for found, expected in zip(at_once, apart, strict=True):
        assert relative_error(found, expected) < 1e-2
    programs = list(linear.programs(axes=rope.axes))
    assert [it.heads for it in programs] == ([] if winner == SEPARATE else [rope.axes])
    table.append(replace(table[0], implementation="wgmma", tile=HEADS_TILE))
    programs = list(linear.programs(axes=rope.axes))
    assert [it.heads for it in programs] == [None] + [rope.axes] * (winner != SEPARATE)
    assert [it.heads for it in linear.programs()] == [None], "attention in codes turns heads apart"
    short = HeadNorms(torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), 0.1)
    rope = Rope.of(torch.arange(5)[:, None].expand(-1, 3), (16, 24, 24), 256.0, CPU)
    linear.heads(encode_reference(torch.randn(5, 32), linear.reads, torch.float32), short, rope)
    assert linear.chosen[5] == "cublas-row", "the kernel has no tiles for heads of 64"
    choose.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [E4M3_STATIC, E4M3_ROW, INT8_ROW])
def test_what_is_compiled_beforehand_is_what_runs(
    monkeypatch: pytest.MonkeyPatch, spec: QuantSpec
) -> None:
    if reason := hopper.needs_hopper(torch.cuda.get_device_capability()):
        pytest.skip(reason)
    weight = torch.randn(20480, 3840, device="cuda", dtype=torch.bfloat16)
    (scale,) = weight_scales([weight_amax(weight, spec)], spec)
    static = torch.ones([], device="cuda") if spec.is_static else None
    codes = quantize_weight(weight, scale, spec)
    linear = Linear(QuantLinear(spec, codes, scale, static), torch.bfloat16)
    x = encode(torch.randn(2112, 3840, device="cuda", dtype=torch.bfloat16), linear.reads)
    ran: list[object] = []
    load = hopper._function
    monkeypatch.setattr(
        hopper, "_function", lambda device, program: ran.append(program) or load(device, program)
    )
    linear.gated(x, linear.reads)
    products = {program for program in ran if isinstance(program, Program)}
    assert products
    assert products <= set(linear.programs(linear.reads))


@pytest.mark.gpu
def test_before_the_first_picture_the_measured_ones_are_named() -> None:
    """A server describes itself before it has drawn, and that goes into records."""
    linear = Linear(nn.Linear(10240, 3840, bias=False, device="cuda"), torch.bfloat16)
    known = fitting(torch.device("cuda"), "bf16", 3840, 10240)
    winners = {choice.rows: choice.implementation for choice in reversed(known)}
    names = sorted(set(winners.values())) or ["default"]
    assert linear.describe() == f"bf16 by {' or '.join(names)}"
