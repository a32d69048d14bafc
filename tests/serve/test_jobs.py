"""Whatever happens to a job, its future is completed."""

from collections.abc import Iterator

import pytest

from fake_engine import FakeEngine
from zimage_fp8.model.pipeline import ImageRequest
from zimage_fp8.serve.jobs import Job, JobCancelled, JobQueue, QueueClosed, QueueFull, TooSlow

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


def submit(queue: JobQueue, *requests: ImageRequest, patience_s: float | None = None) -> list[Job]:
    jobs = [Job(request) for request in requests]
    queue.submit(jobs, patience_s)
    return jobs


def test_a_picture_completes_its_job(queue: JobQueue) -> None:
    (job,) = submit(queue, REQUEST)
    assert job.future.result(10).request == REQUEST
    assert job.queued_s >= 0


def test_a_failure_completes_its_job_and_the_next_one_runs(
    queue: JobQueue, engine: FakeEngine
) -> None:
    engine.failure = MemoryError("no room")
    (failed,) = submit(queue, REQUEST)
    assert isinstance(failed.future.exception(10), MemoryError)
    engine.failure = None
    (job,) = submit(queue, REQUEST)
    assert job.future.result(10).nfe == 4


def test_cancelling_a_running_job_stops_it_at_the_next_step(
    queue: JobQueue, engine: FakeEngine
) -> None:
    engine.gate.clear()
    (job,) = submit(queue, REQUEST)
    assert engine.started.acquire(timeout=10)
    job.cancel()
    engine.gate.set()
    assert isinstance(job.future.exception(10), JobCancelled)
    assert engine.steps_run == 1


def test_a_job_cancelled_while_waiting_never_runs(queue: JobQueue, engine: FakeEngine) -> None:
    engine.gate.clear()
    running, waiting = submit(queue, REQUEST, REQUEST)
    waiting.cancel()
    engine.gate.set()
    assert running.future.result(10)
    assert isinstance(waiting.future.exception(10), JobCancelled)
    assert engine.steps_run == 4


def test_unwanted_jobs_hold_no_place(queue: JobQueue, engine: FakeEngine) -> None:
    engine.gate.clear()
    submit(queue, REQUEST)
    assert engine.started.acquire(timeout=10)
    waiting = submit(queue, REQUEST, REQUEST)
    with pytest.raises(QueueFull) as refused:
        submit(queue, REQUEST)
    assert refused.value.retry_after_s >= 1
    waiting[0].cancel()
    assert len(submit(queue, REQUEST)) == 1


def test_closing_finishes_what_was_accepted(engine: FakeEngine) -> None:
    queue = JobQueue(engine, max_waiting=5)
    queue.start()
    jobs = submit(queue, *[REQUEST] * 3)
    queue.close()
    assert all(job.future.done() and not job.future.exception() for job in jobs)
    assert not queue.is_alive
    with pytest.raises(QueueClosed):
        submit(queue, REQUEST)


def test_draining_refuses_requests_of_which_no_picture_has_begun(engine: FakeEngine) -> None:
    engine.gate.clear()
    queue = JobQueue(engine, max_waiting=5)
    queue.start()
    begun = submit(queue, REQUEST, REQUEST)
    queued = submit(queue, REQUEST, REQUEST)
    assert engine.started.acquire(timeout=10)
    queue.drain()
    assert all(isinstance(job.future.exception(10), QueueClosed) for job in queued)
    with pytest.raises(QueueClosed):
        submit(queue, REQUEST)
    engine.gate.set()
    assert all(job.future.result(10) for job in begun)
    queue.close()


def test_a_client_of_little_patience_is_told_at_once(queue: JobQueue, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    (first,) = submit(queue, REQUEST, patience_s=0.001)  # nothing is known yet
    assert first.future.result(10)
    with pytest.raises(TooSlow) as refused:
        submit(queue, REQUEST, patience_s=0.01)
    assert refused.value.retry_after_s is None  # even an idle server would be too slow
    engine.gate.clear()
    submit(queue, REQUEST)
    with pytest.raises(TooSlow) as refused:
        submit(queue, REQUEST, patience_s=0.12)  # 80 ms each, two of them
    assert refused.value.retry_after_s == 1


def test_the_estimate_grows_with_what_waits(queue: JobQueue, engine: FakeEngine) -> None:
    jobs = [Job(REQUEST), Job(REQUEST)]
    assert queue.pace.estimate_s(jobs) == 0
    queue.pace.learn(jobs[0], 3.0)
    assert queue.pace.estimate_s(jobs) == pytest.approx(6.0)
    twice = Job(ImageRequest("x", 16, 16, steps=4, guidance=1.0))
    assert queue.pace.estimate_s([twice]) == pytest.approx(6.0)
