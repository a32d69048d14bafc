"""Scenes and their captions, drawn by worker processes ahead of need.

Writing captions for 256 scenes takes 80 ms of one CPU core, as long as training steps on several
batches, so it happens beside the training process.
"""

from collections import deque
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from recipes.nano.captions import Scene, is_held_out_pair, load_things
from recipes.nano.tokenizer import Captioner

TWO_OBJECT_SHARE = 0.3


@dataclass(frozen=True)
class Rows:
    """scenes: int64 [rows, 3] of first, second (-1: none), colour, the first `num_one` single;
    short, long: token ids int16 [rows, variants, bucket]."""

    scenes: np.ndarray
    num_one: int
    short: np.ndarray
    long: np.ndarray


class RowWriter:
    """Draws training rows: allowed colours only, held-out combinations and pairs never."""

    def __init__(self, captioner: Captioner, trained: np.ndarray) -> None:
        self.captioner = captioner
        self.trained = trained

    def write(self, count: int, seed: tuple[int, ...]) -> Rows:
        rng = np.random.default_rng(seed)
        num_one = count - int(count * TWO_OBJECT_SHARE)
        scenes = [self._one(rng) for _ in range(num_one)]
        scenes += [self._two(rng) for _ in range(count - num_one)]
        short, long = self.captioner.rows(scenes, rng)
        numbers = [(s.first, -1 if s.second is None else s.second, s.color) for s in scenes]
        return Rows(np.array(numbers, np.int64), num_one, short, long)

    def _one(self, rng: np.random.Generator) -> Scene:
        thing = int(rng.integers(len(self.trained)))
        return Scene(thing, int(rng.choice(np.flatnonzero(self.trained[thing]))))

    def _two(self, rng: np.random.Generator) -> Scene:
        while True:
            first, second = (int(i) for i in rng.integers(0, len(self.trained), 2))
            colors = np.flatnonzero(self.trained[first] & self.trained[second])
            if first != second and len(colors) and not is_held_out_pair(first, second):
                return Scene(first, int(rng.choice(colors)), second)


class RowQueue:
    """A few chunks of rows are always being written; `next` waits for the oldest."""

    def __init__(
        self,
        data: Path,
        limit: int | None,
        trained: np.ndarray,
        chunk: int,
        seed: tuple[int, ...],
        workers: int = 4,
    ) -> None:
        self.chunk, self.seed, self.drawn = chunk, seed, 0
        # spawn: forking a process that already runs CUDA and thread pools can hang
        self.pool = get_context("spawn").Pool(workers, _start_worker, (data, limit, trained))
        self.pending = deque(self._order() for _ in range(4 * workers))

    def next(self) -> Rows:
        self.pending.append(self._order())
        return self.pending.popleft().get(timeout=300)

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()

    def _order(self):
        self.drawn += 1
        return self.pool.apply_async(_write, (self.chunk, (*self.seed, self.drawn)))


_writer: RowWriter  # one per worker process, set when it starts


def _start_worker(data: Path, limit: int | None, trained: np.ndarray) -> None:
    global _writer
    _writer = RowWriter(Captioner(data, load_things(data, limit)), trained)


def _write(count: int, seed: tuple[int, ...]) -> Rows:
    return _writer.write(count, seed)
