"""Whatever happens to a job, its future is completed."""

from collections.abc import Iterator

import pytest

from fake_engine import FakeEngine
from zimage_fp8.model.pipeline import ImageRequest
from zimage_fp8.serve.jobs import JobCancelled, JobQueue, QueueClosed, QueueFull

REQUEST = ImageRequest("x", 16, 16, steps=4)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def queue(engine: FakeEngine) -> Iterator[JobQueue]:
    queue = JobQueue(engine, max_waiting=2)
    queue.start()
    yield queue
    engine.gate.set()
    queue.close()


def test_a_picture_completes_its_job(queue: JobQueue) -> None:
    (job,) = queue.submit([REQUEST])
    assert job.future.result(10).request == REQUEST
    assert job.queued_s >= 0


def test_a_failure_completes_its_job_and_the_next_one_runs(
    queue: JobQueue, engine: FakeEngine
) -> None:
    engine.failure = MemoryError("no room")
    (failed,) = queue.submit([REQUEST])
    assert isinstance(failed.future.exception(10), MemoryError)
    engine.failure = None
    (job,) = queue.submit([REQUEST])
    assert job.future.result(10).nfe == 4


def test_cancelling_a_running_job_stops_it_at_the_next_step(
    queue: JobQueue, engine: FakeEngine
) -> None:
    engine.gate.clear()
    (job,) = queue.submit([REQUEST])
    assert engine.started.acquire(timeout=10)
    job.cancel()
    engine.gate.set()
    assert isinstance(job.future.exception(10), JobCancelled)
    assert engine.steps_run == 1


def test_a_job_cancelled_while_waiting_never_runs(queue: JobQueue, engine: FakeEngine) -> None:
    engine.gate.clear()
    running, waiting = queue.submit([REQUEST, REQUEST])
    waiting.cancel()
    engine.gate.set()
    assert running.future.result(10)
    assert isinstance(waiting.future.exception(10), JobCancelled)
    assert engine.steps_run == 4


def test_unwanted_jobs_hold_no_place(queue: JobQueue, engine: FakeEngine) -> None:
    engine.gate.clear()
    queue.submit([REQUEST])
    assert engine.started.acquire(timeout=10)
    waiting = queue.submit([REQUEST, REQUEST])
    with pytest.raises(QueueFull) as refused:
        queue.submit([REQUEST])
    assert refused.value.retry_after_s >= 1
    waiting[0].cancel()
    assert len(queue.submit([REQUEST])) == 1


def test_closing_finishes_what_was_accepted(engine: FakeEngine) -> None:
    queue = JobQueue(engine, max_waiting=5)
    queue.start()
    jobs = queue.submit([REQUEST] * 3)
    queue.close()
    assert all(job.future.done() and not job.future.exception() for job in jobs)
    assert not queue.is_alive
    with pytest.raises(QueueClosed):
        queue.submit([REQUEST])
