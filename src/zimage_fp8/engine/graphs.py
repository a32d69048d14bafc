"""CUDA graphs by key: capture once per shape, replay ever after, forget the least recently used.

One replay costs the host some ten microseconds whatever it holds; launching the three hundred
kernels of a denoise step one by one can cost it more time than the GPU needs to run them. All
graphs share one memory pool, so many shapes cost little more than the largest.
"""

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_fp8.kernels.hopper import hopper_refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    function: Callable[..., Tensor]  # and with it what it reads, whose addresses the graph knows
    inputs: tuple[Tensor, ...]
    output: Tensor
    reserved_bytes: int


class GraphCache:
    """Runs functions of tensors; on CUDA as graphs, elsewhere directly.

    capacity: how many graphs are kept.
    """

    def __init__(self, device: torch.device, capacity: int = 16) -> None:
        self.device = device
        self.capacity = capacity
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = self._stream = None
        bound_workspaces(device)
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            # One for all: cuBLAS keeps a workspace per stream.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def reserved_bytes(self) -> int:
        """Device memory that the captured graphs made PyTorch reserve, their shared pool."""
        return sum(captured.reserved_bytes for captured in self._captured.values())

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, replayed from the graph of `key` once that is captured.

        The key must determine shapes, dtypes, and every tensor that `function` reads besides its
        inputs; `function` must hold those, and is kept as long as its graph. It must not
        synchronize or allocate what outlives it. The result is a static buffer: use or copy it
        before the next `run` of any key.
        """
        if self._pool is None:
            return function(*inputs)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._capture(function, inputs)
            self._captured[key] = captured
            while len(self._captured) > self.capacity:
                self._captured.popitem(last=False)
            log.info(
                "captured a graph for %s; %d are kept, in %.0f MiB",
                [tuple(given.shape) for given in inputs],
                len(self._captured),
                self.reserved_bytes / 2**20,
            )
        else:
            self._captured.move_to_end(key)
            for static, given in zip(captured.inputs, inputs, strict=True):
                if static is not given:
                    static.copy_(given)
        captured.graph.replay()
        return captured.output

    def forget(self) -> None:
        """Drop every graph and its memory; the next run captures again."""
        self._captured.clear()
        if self._pool is not None:
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Captured:
        """Recorded without having run: what a first run outside the graph would need comes on top
        of the pool, 0.3 to 0.6 GiB at full size."""
        statics = tuple(value.clone() for value in inputs)
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            # Triton compiles and libraries load kernels meanwhile, which stricter modes forbid.
            capture_error_mode="relaxed",
        )
        with _no_garbage_collection(), recording:
            output = function(*statics)
        reserved = torch.cuda.memory_reserved(self.device) - before
        return _Captured(graph, function, statics, output, max(0, reserved))


def bound_workspaces(device: torch.device) -> None:
    """Have cuBLAS work in 8 MiB instead of 32 where products are our own: on Hopper.

    Every handle and every stream has a workspace, of PyTorch's and of cuBLAS' own. On an H200 a
    server of `full` held 14.01 GiB at 1024x512 and holds 13.82, at the same speed. It must be said
    before the process multiplies the first time; who sets cuBLAS' variable is obeyed.
    """
    if not hopper_refusal(device):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph that is collected frees memory, which must not happen while one is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
