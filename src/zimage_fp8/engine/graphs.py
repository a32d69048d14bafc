"""CUDA graphs by key: capture once per shape, replay ever after, forget the least recently used.

One replay costs the host some ten microseconds whatever it holds; launching the three hundred
kernels of a denoise step one by one can cost it more time than the GPU needs to run them. All
graphs share one memory pool and one stream, and so does the run before each capture, in which
kernels are compiled: many shapes cost little more than the largest, a new one no second copy.
"""

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class GraphCache:
    """Runs functions of tensors; on CUDA as graphs, elsewhere directly.

    capacity: how many graphs are kept.
    """

    def __init__(self, device: torch.device, capacity: int = 16) -> None:
        self.device = device
        self.capacity = capacity
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = self._stream = None
        if device.type == "cuda":
            # cuBLAS keeps a workspace per stream, the allocator blocks per stream: one serves all.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = _new_pool(device)

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def reserved_bytes(self) -> int:
        """Device memory of the shared pool, in use or not."""
        if self._pool is None:
            return 0
        segments = self._pool.snapshot()  # type: ignore[no-untyped-call]
        return sum(int(segment["total_size"]) for segment in segments)

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, replayed from the graph of `key` once that is captured.

        The key must determine shapes, dtypes, and every tensor that `function` reads besides its
        inputs. `function` must not synchronize or allocate what outlives it. The result is a static
        buffer: use or copy it before the next `run` of any key.
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
        self._captured.clear()  # first: a pool must outlive what was captured in it
        if self._pool is not None:
            self._pool = _new_pool(self.device)
            torch.cuda.empty_cache()

    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Captured:
        assert self._pool is not None
        assert self._stream is not None
        statics = tuple(value.clone() for value in inputs)
        # While allocations go to the pool, PyTorch cannot take free memory from elsewhere.
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with _no_garbage_collection():
            # compiles Triton kernels, lets libraries choose algorithms
            with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                function(*statics)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            pool = self._pool.id
            # PyTorch's stubs know only graph_pool_handle()'s type, the same pair of integers.
            with torch.cuda.graph(graph, pool, self._stream):  # type: ignore[arg-type]
                output = function(*statics)
        return _Captured(graph, statics, output)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """PyTorch ends the process when another cache's pool is collected while it fills this one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _new_pool(device: torch.device) -> torch.cuda.MemPool:
    with torch.cuda.device(device):
        return torch.cuda.MemPool()
