"""A picture to draw, and what the server asks of an engine that draws it."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from zimage_fp8.model.drawing import Drawing
from zimage_fp8.model.request import GeneratedImage, ImageRequest
from zimage_fp8.serve.pace import work_of


class Lookups(Protocol):
    """How often a cache had what was asked of it, and had not."""

    hits: int
    misses: int


class Engine(Protocol):
    """What the server asks of a pipeline (`model.pipeline.Pipeline` says what each does).

    `begin`, `step`, `preview` and `finish` are only ever called by one thread. captions: its cache
    of encoded prompts.
    """

    @property
    def captions(self) -> Lookups: ...

    @property
    def model(self) -> str: ...

    @property
    def policy(self) -> str: ...

    @property
    def default_size(self) -> tuple[int, int]: ...

    def validate(self, request: ImageRequest) -> None: ...

    def num_tokens(self, prompt: str) -> int: ...

    def shape(self, request: ImageRequest) -> Hashable: ...

    def begin(self, request: ImageRequest) -> Drawing: ...

    def step(self, drawings: Sequence[Drawing]) -> None: ...

    def preview(self, drawing: Drawing) -> np.ndarray: ...

    def finish(self, drawing: Drawing) -> GeneratedImage: ...

    def describe(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Previews:
    """Pictures of the model's running guess: `show(pixels)` is called after each step of `steps`.

    steps count from 1. pixels: uint8 [height, width, 3].
    """

    steps: frozenset[int]
    show: Callable[[np.ndarray], None]


class JobCancelled(Exception):
    """Why a picture was not finished: at a step boundary, nobody waited for it any more."""


@dataclass(eq=False)
class Order:
    """What the jobs of one request share. client: whoever takes turns with others."""

    client: object = None
    has_begun: bool = False


class Job:
    """One picture to draw. `queued_s` is its wait in the queue, known once it runs.

    on_step(done, total) is told of every step boundary, the one before the first step included.
    is_warm_up: the first of its kind takes longer, so the pace learns nothing from it. spent_s: its
    share of the engine's time so far.
    """

    def __init__(
        self,
        request: ImageRequest,
        engine: Engine,
        previews: Previews | None = None,
        on_step: Callable[[int, int], None] | None = None,
        *,
        is_warm_up: bool = False,
    ) -> None:
        self.request = request
        self.engine = engine
        self.previews = previews
        self.on_step = on_step
        self.future: Future[GeneratedImage] = Future()
        self.is_warm_up = is_warm_up
        self.queued_s = 0.0
        self.spent_s = 0.0
        self.work = work_of(request)
        self.order = Order()
        self.submitted = time.time()
        self._drawing: Drawing | None = None
        self._unwanted = threading.Event()

    @cached_property
    def shape(self) -> Hashable:
        """Jobs of one shape can share forwards."""
        return self.engine.shape(self.request)

    @property
    def client(self) -> object:
        return self.order.client

    @property
    def is_unwanted(self) -> bool:
        return self._unwanted.is_set()

    @property
    def has_begun(self) -> bool:
        return self._drawing is not None

    @property
    def drawing(self) -> Drawing:
        """There is one from `begin` on."""
        assert self._drawing is not None
        return self._drawing

    def cancel(self) -> None:
        """Nobody waits for this picture any more. No effect on a finished job."""
        self._unwanted.set()

    def begin(self) -> None:
        """Stand before the first step. Raises JobCancelled when nobody wants it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        self.queued_s = max(0.0, time.time() - self.submitted)
        self._report(0, self.request.steps_to_run)
        self._drawing = self.engine.begin(self.request)

    def after_step(self) -> None:
        """Show what there is to show, and stop if nobody wants the rest."""
        if self.previews and self.drawing.done in self.previews.steps:
            self.previews.show(self.engine.preview(self.drawing))
        self._report(self.drawing.done, self.drawing.total)

    def _report(self, done: int, total: int) -> None:
        if self.is_unwanted:
            raise JobCancelled(f"stopped after step {done} of {total}: the client is gone")
        if self.on_step:
            self.on_step(done, total)
