"""A streamed answer: server-sent events as OpenAI's client reads them.

What that client makes of a stream sets the rules: only comments keep a connection alive (an event
without data crashes it), failures are `{"error": …}`, and since a stream that just ends looks like
success without pictures, the last event is always a completed picture or an error. An event of a
type that it does not know reads as an empty preview, so steps are told in comments, too:

    : step 3/8 of picture 0
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve.failures import INTERNAL, error_answer
from zimage_fp8.serve.job import Engine, Job, Previews
from zimage_fp8.serve.reply import Reply

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10
COMMENT = b": drawing\n\n"


@dataclass(frozen=True)
class _Preview:
    index: int
    pixels: np.ndarray


@dataclass(frozen=True)
class _Stepped:
    index: int
    done: int
    total: int


@dataclass(frozen=True)
class _Finished:
    index: int


_News = _Preview | _Stepped | _Finished


class PictureStream:
    """Jobs that tell the event loop of their steps, their previews and their end.

    Made on the event loop; the engine's thread only ever puts news into the queue.
    """

    def __init__(
        self, requests: Sequence[ImageRequest], engine: Engine, partial_images: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[_News] = asyncio.Queue()
        self.jobs = [
            self._job(index, request, engine, partial_images)
            for index, request in enumerate(requests)
        ]

    def _job(self, index: int, request: ImageRequest, engine: Engine, partial_images: int) -> Job:
        steps = preview_steps(request.steps_to_run, partial_images)
        previews = Previews(steps, lambda pixels: self._tell(_Preview(index, pixels)))
        job = Job(
            request,
            engine,
            previews if steps else None,
            lambda done, total: self._tell(_Stepped(index, done, total)),
        )
        job.future.add_done_callback(lambda _: self._tell(_Finished(index)))
        return job

    def _tell(self, news: _News) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """Previews and pictures as they come, until all are told or one failed."""
        num_finished = 0
        num_previews = [0] * len(self.jobs)
        try:
            while num_finished < len(self.jobs):
                try:
                    news = await asyncio.wait_for(self._news.get(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield COMMENT
                    continue
                if isinstance(news, _Stepped):
                    yield b": step %d/%d of picture %d\n\n" % (news.done, news.total, news.index)
                    continue
                job = self.jobs[news.index]
                if isinstance(news, _Preview):
                    file = await asyncio.to_thread(reply.encode_preview, news.pixels)
                    yield reply.preview_event(job, news.index, num_previews[news.index], file)
                    num_previews[news.index] += 1
                else:
                    drawn = await asyncio.to_thread(reply.encode, job, job.future.result())
                    yield reply.completed_event(news.index, drawn)
                    num_finished += 1
        except Exception as error:  # noqa: BLE001  the status is sent; this is the only way left
            yield _error_event(error)


class EventStream(StreamingResponse):
    """The response around a PictureStream. When the client leaves, its jobs are cancelled."""

    def __init__(self, pictures: PictureStream, reply: Reply) -> None:
        super().__init__(
            pictures.events(reply),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._jobs = pictures.jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(cancel_when_gone(receive, self._jobs))
        try:
            with contextlib.suppress(OSError):  # how some servers say that the client is gone
                await self.stream_response(send)
        finally:
            watcher.cancel()
            cancel_all(self._jobs)


async def cancel_when_gone(receive: Receive, jobs: Sequence[Job]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel_all(jobs)


def cancel_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancel()


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """`count` steps spread evenly over 1 to `steps − 1`, fewer when there are fewer."""
    spread = (round(part * steps / (count + 1)) for part in range(1, count + 1))
    return frozenset(step for step in spread if 1 <= step < steps)


def _error_event(error: Exception) -> bytes:
    failure, body = error_answer(error)
    if failure is INTERNAL:
        log.error("a streamed picture failed", exc_info=error)
    return b"data: " + body.model_dump_json().encode() + b"\n\n"
