"""CUDA graphs by key; without CUDA the functions run as they are."""

import os
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

from compare import same_bits
from zimage_fp8.engine import EngineOptions, load_pipeline
from zimage_fp8.engine import graphs as engine_graphs
from zimage_fp8.engine.graphs import GraphCache, bound_workspaces
from zimage_fp8.model.request import ImageRequest

CUDA = torch.device("cuda")
WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
CAPTURE_RUNS = 1  # recorded, without a run to warm up


class Counted:
    """x · x + y, and how often Python ran it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return x * x + y


def test_without_cuda_the_function_runs_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACES, raising=False)
    graphs, function = GraphCache(torch.device("cpu")), Counted()
    assert WORKSPACES not in os.environ
    for value in range(3):
        x = torch.full((4,), float(value))
        same_bits(graphs.run("key", function, x, x), x * x + x)
    assert function.calls == 3
    assert len(graphs) == 0
    assert graphs.reserved_bytes == 0
    graphs.forget()
    x = torch.ones(4)
    same_bits(graphs.run("key", function, x, x), x * x + x)


@pytest.mark.parametrize(
    ("refusal", "given", "expected"),
    [(None, None, ":4096:2:16:8"), (None, ":16:8", ":16:8"), ("why", None, None)],
)
def test_workspaces_are_bounded_where_products_are_our_own_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    refusal: str | None,
    given: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setenv(WORKSPACES, given or "")
    if given is None:
        monkeypatch.delenv(WORKSPACES)
    monkeypatch.setattr(engine_graphs, "hopper_refusal", lambda _: refusal)
    bound_workspaces(CUDA)
    assert os.environ.get(WORKSPACES) == expected


MULTIPLY = """
import torch
from zimage_fp8.engine.graphs import GraphCache

GraphCache(torch.device("cuda"))
x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
before = torch.cuda.memory_allocated()
x @ x
print(torch.cuda.memory_allocated() - before)
"""


@pytest.mark.gpu
def test_a_workspace_is_as_small_as_was_asked() -> None:
    environment = {name: value for name, value in os.environ.items() if name != WORKSPACES}
    command = [sys.executable, "-c", MULTIPLY]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert int(ended.stdout) < 9 * 2**20, ended.stderr


@pytest.mark.gpu
def test_captured_once_and_replayed_with_new_values() -> None:
    graphs, function = GraphCache(CUDA), Counted()
    for value in range(5):
        x = torch.randn(1000, device=CUDA, generator=torch.Generator(CUDA).manual_seed(value))
        same_bits(graphs.run("key", function, x, 2 * x).clone(), x * x + 2 * x)
    assert function.calls == CAPTURE_RUNS
    assert len(graphs) == 1


@pytest.mark.gpu
def test_inputs_are_copied_not_remembered() -> None:
    graphs, function = GraphCache(CUDA), Counted()
    x = torch.ones(16, device=CUDA)
    graphs.run("key", function, x, x)
    x.fill_(3)
    same_bits(graphs.run("key", function, x, x).clone(), torch.full((16,), 12.0, device=CUDA))


@pytest.mark.gpu
def test_the_least_recently_used_is_forgotten_first() -> None:
    graphs, function = GraphCache(CUDA, capacity=2), Counted()
    per_capture = CAPTURE_RUNS
    inputs = {size: torch.randn(size, device=CUDA) for size in (8, 16, 32)}

    def run(size: int) -> None:
        x = inputs[size]
        same_bits(graphs.run(size, function, x, x).clone(), x * x + x)

    for size in (8, 16, 8, 32):  # 32 pushes 16 out, not 8
        run(size)
    assert len(graphs) == 2
    assert function.calls == 3 * per_capture
    run(8)
    assert function.calls == 3 * per_capture
    run(16)
    assert function.calls == 4 * per_capture
    assert len(graphs) == 2


@pytest.mark.gpu
def test_forgetting_gives_the_memory_back() -> None:
    graphs = GraphCache(CUDA)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    x = torch.randn(64 * 2**20, device=CUDA)  # 256 MiB
    graphs.run("key", Counted(), x, x)
    assert graphs.reserved_bytes > 0
    graphs.forget()
    assert len(graphs) == 0
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**21
    x = torch.ones(8, device=CUDA)
    same_bits(graphs.run("key", Counted(), x, x).clone(), x * x + x)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["bf16_base", "fp8-row"])
def test_twenty_sizes_need_the_memory_of_the_largest(policy: str) -> None:
    """Sizes come and go; more of them than are kept must not pile up."""
    pipeline = load_pipeline("nano", options=EngineOptions(), policy=policy, device="cuda")
    sizes = [(512 - 16 * index, 256 + 16 * index) for index in range(20)]

    def draw(width: int, height: int) -> None:
        pipeline.generate(ImageRequest("a red apple", width, height, steps=2))

    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    draw(512, 560)  # as large as any of them
    for size in sizes:
        draw(*size)
    first = reserved()
    for size in sizes:
        draw(*size)
    assert reserved() <= first * 1.05 + 2**22


@pytest.mark.gpu
def test_what_a_function_reads_lives_as_long_as_its_graph() -> None:
    """A table that only the function holds: freed, its memory would be another tensor's."""
    graphs, x = GraphCache(CUDA, capacity=1), torch.ones(16, device=CUDA)
    table = torch.full((16,), 5.0, device=CUDA)
    seen = weakref.ref(table)
    graphs.run("key", partial(torch.add, table), x)
    del table
    same_bits(graphs.run("key", torch.add, x).clone(), torch.full((16,), 6.0, device=CUDA))
    assert seen() is not None
    graphs.run("another", torch.neg, x)
    assert seen() is None


@pytest.mark.gpu
def test_captures_do_not_each_keep_a_workspace_of_cublas() -> None:
    graphs, x = GraphCache(CUDA), torch.randn(512, 512, device=CUDA, dtype=torch.bfloat16)
    graphs.run(0, torch.mm, x, x)
    first = torch.cuda.memory_allocated()
    for key in range(1, 6):
        graphs.run(key, torch.mm, x, x)
    # Inputs and result are half a MiB each; a workspace is 8 MiB at least.
    assert torch.cuda.memory_allocated() - first < 5 * 2 * 2**20
