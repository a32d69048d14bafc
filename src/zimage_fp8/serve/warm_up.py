"""The first pictures, drawn before anybody is told that the server is ready.

The first picture of a size loads kernels and captures graphs, and so does every number of pictures
that may share a forward; the last one teaches the pace, so that Retry-After and deadlines are right
from the first request on.
"""

import asyncio
import logging
from collections.abc import Mapping

from zimage_fp8.model.request import ImageRequest
from zimage_fp8.protocol import DEFAULT_STEPS
from zimage_fp8.serve.job import Engine, Job
from zimage_fp8.serve.jobs import JobQueue, QueueClosed

log = logging.getLogger(__name__)

PROMPT = "a red apple on a wooden table"


class WarmUp:
    """Draws for every engine in turn. `is_done` when all could; `problem` says why one could not.

    A failure is logged and told by /ready; requests are drawn all the same, since a smaller size
    may well work.
    """

    def __init__(self, queue: JobQueue) -> None:
        self.is_done = False
        self.problem: str | None = None
        self._queue = queue
        self._jobs: list[Job] = []
        self._task: asyncio.Task[None] | None = None

    def start(self, engines: Mapping[str, Engine]) -> None:
        """Begin, on the running event loop."""
        self._task = asyncio.create_task(self._run(engines))

    def cancel(self) -> None:
        """Stop at the next step: the server ends. From any thread."""
        for job in self._jobs:
            job.cancel()

    async def _run(self, engines: Mapping[str, Engine]) -> None:
        try:
            for name, engine in engines.items():
                for batch in range(1, self._queue.max_batch + 1):
                    await self._draw(engine, 1, batch)
                took_s = await self._draw(engine, DEFAULT_STEPS)
                log.info("%s is warm: a picture takes %.3f s", name, took_s)
        except QueueClosed:
            return
        except Exception as error:  # whatever it is, /ready must say it
            self.problem = f"the warm-up picture failed: {type(error).__name__}: {error}"
            log.exception("the warm-up picture failed; requests are drawn all the same")
            return
        self.is_done = True

    async def _draw(self, engine: Engine, steps: int, batch: int = 1) -> float:
        """Seconds that the first of `batch` equal pictures took."""
        width, height = engine.default_size
        request = ImageRequest(PROMPT, width, height, steps=steps)
        self._jobs = [Job(request, engine, is_warm_up=steps == 1) for _ in range(batch)]
        self._queue.submit(self._jobs, client=self)
        images = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in self._jobs))
        return sum(images[0].timings_s.values())
