"""Whatever happens to a job, its future is completed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from fake_engine import FakeEngine
from zimage_fp8.errors import ZImageError
from zimage_fp8.model.drawing import Drawing
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve import jobs as jobs_module
from zimage_fp8.serve.job import Job, JobCancelled, Order
from zimage_fp8.serve.jobs import EngineLost, JobQueue, QueueClosed, QueueFull, TooSlow
from zimage_fp8.serve.pace import Pace
from zimage_fp8.serve.turns import Turns

REQUEST = ImageRequest("x", 16, 16, steps=4)
Submit = Callable[..., list[Job]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def queue(engine: FakeEngine) -> Iterator[JobQueue]:
    queue = JobQueue(max_waiting=2)
    queue.start()
    yield queue
    engine.gate.set()
    queue.close()


@pytest.fixture
def long_queue(engine: FakeEngine) -> Iterator[JobQueue]:
    queue = JobQueue(max_waiting=50)
    queue.start()
    yield queue
    engine.gate.set()
    queue.close()


@pytest.fixture
def submit(queue: JobQueue, engine: FakeEngine) -> Submit:
    return partial(put, queue, engine)


def put(
    queue: JobQueue,
    engine: FakeEngine,
    *requests: ImageRequest,
    client: object = None,
    patience_s: float | None = None,
) -> list[Job]:
    jobs = [Job(request, engine) for request in requests]
    queue.submit(jobs, client, patience_s)
    return jobs


def test_a_picture_completes_its_job(submit: Submit) -> None:
    (job,) = submit(REQUEST)
    assert job.future.result(10).request == REQUEST
    assert job.queued_s >= 0


def test_a_failure_completes_its_job_and_the_next_one_runs(
    submit: Submit, engine: FakeEngine
) -> None:
    engine.failure = MemoryError("no room")
    (failed,) = submit(REQUEST)
    assert isinstance(failed.future.exception(10), MemoryError)
    engine.failure = None
    (job,) = submit(REQUEST)
    assert job.future.result(10).nfe == 4


def test_cancelling_a_running_job_stops_it_at_the_next_step(
    submit: Submit, engine: FakeEngine
) -> None:
    engine.gate.clear()
    (job,) = submit(REQUEST)
    assert engine.started.acquire(timeout=10)
    job.cancel()
    engine.gate.set()
    assert isinstance(job.future.exception(10), JobCancelled)
    assert engine.steps_run == 1


def test_a_job_cancelled_while_waiting_never_runs(submit: Submit, engine: FakeEngine) -> None:
    engine.gate.clear()
    running, waiting = submit(REQUEST, REQUEST)
    waiting.cancel()
    engine.gate.set()
    assert running.future.result(10)
    assert isinstance(waiting.future.exception(10), JobCancelled)
    assert engine.steps_run == 4


def test_unwanted_jobs_hold_no_place(submit: Submit, engine: FakeEngine) -> None:
    engine.gate.clear()
    submit(REQUEST)
    assert engine.started.acquire(timeout=10)
    waiting = submit(REQUEST, REQUEST)
    with pytest.raises(QueueFull) as refused:
        submit(REQUEST)
    assert refused.value.retry_after_s >= 1
    waiting[0].cancel()
    assert len(submit(REQUEST)) == 1


def test_closing_finishes_what_was_accepted(engine: FakeEngine) -> None:
    queue = JobQueue(max_waiting=5)
    submit = partial(put, queue, engine)
    queue.start()
    jobs = submit(*[REQUEST] * 3)
    queue.close()
    assert all(job.future.done() and not job.future.exception() for job in jobs)
    assert not queue.is_alive
    with pytest.raises(QueueClosed):
        submit(REQUEST)


def test_draining_refuses_requests_of_which_no_picture_has_begun(engine: FakeEngine) -> None:
    engine.gate.clear()
    queue = JobQueue(max_waiting=5)
    submit = partial(put, queue, engine)
    queue.start()
    begun = submit(REQUEST, REQUEST)
    queued = submit(REQUEST, REQUEST)
    assert engine.started.acquire(timeout=10)
    queue.drain()
    assert all(isinstance(job.future.exception(10), QueueClosed) for job in queued)
    with pytest.raises(QueueClosed):
        submit(REQUEST)
    engine.gate.set()
    assert all(job.future.result(10) for job in begun)
    queue.close()


def test_a_client_of_little_patience_is_told_at_once(
    queue: JobQueue, submit: Submit, engine: FakeEngine
) -> None:
    (first,) = submit(REQUEST, patience_s=0.001)  # nothing is known yet
    assert first.future.result(10)
    queue.pace = taught(engine, 0.08)
    with pytest.raises(TooSlow) as refused:
        submit(REQUEST, patience_s=0.01)
    assert refused.value.retry_after_s is None  # even an idle server would be too slow
    engine.gate.clear()
    submit(REQUEST)
    with pytest.raises(TooSlow) as refused:
        submit(REQUEST, patience_s=0.12)  # two of them
    assert refused.value.retry_after_s == 1


def taught(engine: FakeEngine, picture_s: float) -> Pace:
    """A pace that knows how long REQUEST takes."""
    pace = Pace()
    pace.learn(Job(REQUEST, engine), picture_s)
    return pace


def test_the_estimate_grows_with_what_waits(engine: FakeEngine) -> None:
    pace = Pace()
    jobs = [Job(REQUEST, engine), Job(REQUEST, engine)]
    assert pace.estimate_s(jobs) == 0
    pace.learn(jobs[0], 3.0)
    assert pace.estimate_s(jobs) == pytest.approx(6.0)
    twice = Job(ImageRequest("x", 16, 16, steps=4, guidance=1.0), engine)
    assert pace.estimate_s([twice]) == pytest.approx(6.0)


def test_every_engine_has_a_pace_of_its_own(engine: FakeEngine) -> None:
    pace, other = Pace(), FakeEngine()
    pace.learn(Job(REQUEST, engine), 3.0)
    assert pace.estimate_s([Job(REQUEST, other)]) == pytest.approx(3.0)  # like the ones known
    pace.learn(Job(REQUEST, other), 1.0)
    assert pace.estimate_s([Job(REQUEST, other)]) == pytest.approx(1.0)
    assert pace.estimate_s([Job(REQUEST, engine)]) == pytest.approx(3.0)


def test_a_warm_up_teaches_nothing(queue: JobQueue, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    job = Job(REQUEST, engine, is_warm_up=True)
    queue.submit([job])
    assert job.future.result(10)
    assert queue.pace.estimate_s([job]) == 0


@pytest.fixture
def pairs(engine: FakeEngine) -> Iterator[JobQueue]:
    """A queue that draws two pictures at once, and waits at the gate of the first step."""
    queue = JobQueue(max_waiting=50, max_batch=2)
    engine.gate.clear()
    queue.start()
    yield queue
    engine.gate.set()
    queue.close()


def test_alike_pictures_are_drawn_together(pairs: JobQueue, engine: FakeEngine) -> None:
    jobs = put(pairs, engine, *[REQUEST] * 3)
    assert engine.started.acquire(timeout=10)
    engine.gate.set()
    assert [job.future.result(10).company for job in jobs] == [2, 2, 1]
    assert engine.companies == [2] * 4 + [1] * 4


def test_newcomers_join_at_a_step_boundary(pairs: JobQueue, engine: FakeEngine) -> None:
    (first,) = put(pairs, engine, REQUEST)
    assert engine.started.acquire(timeout=10)  # it waits in its first step
    (second,) = put(pairs, engine, REQUEST)
    engine.gate.set()
    assert first.future.result(10).nfe == second.future.result(10).nfe == 4
    assert engine.companies == [1, 2, 2, 2, 1]


def test_nobody_is_overtaken(pairs: JobQueue, engine: FakeEngine) -> None:
    """A picture of another shape waits for the running ones, and those behind it for it."""
    other = replace(REQUEST, width=32)
    jobs = [
        *put(pairs, engine, REQUEST),
        *put(pairs, engine, other),
        *put(pairs, engine, replace(REQUEST, prompt="last")),
    ]
    engine.gate.set()
    assert all(job.future.result(10) for job in jobs)
    assert engine.companies == [1] * 12
    assert [request.width for request in engine.requests] == [16, 32, 16]


def test_pictures_of_two_engines_are_drawn_apart(pairs: JobQueue, engine: FakeEngine) -> None:
    another = FakeEngine()
    jobs = put(pairs, engine, REQUEST) + put(pairs, another, REQUEST)
    engine.gate.set()
    assert [job.future.result(10).company for job in jobs] == [1, 1]


def test_one_who_leaves_leaves_the_others_alone(pairs: JobQueue, engine: FakeEngine) -> None:
    gone, stays = put(pairs, engine, REQUEST, REQUEST)
    assert engine.started.acquire(timeout=10)
    gone.cancel()
    engine.gate.set()
    assert isinstance(gone.future.exception(10), JobCancelled)
    assert stays.future.result(10).nfe == 4


def test_a_failure_of_several_is_looked_for_one_by_one(pairs: JobQueue) -> None:
    engine = PoorEngine()
    bad, good = put(pairs, engine, replace(REQUEST, prompt="bad"), REQUEST)
    assert isinstance(bad.future.exception(10), MemoryError)
    assert good.future.result(10).nfe == 4
    assert engine.companies == [1] * 4


class PoorEngine(FakeEngine):
    """It cannot draw what is called bad, and nothing in company with it."""

    def step(self, drawings: Sequence[Drawing]) -> None:
        if any(drawing.request.prompt == "bad" for drawing in drawings):
            raise MemoryError
        super().step(drawings)


def test_company_shares_the_time_it_takes(
    pairs: JobQueue, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learnt of two together is what one costs the engine, not how long it took."""
    a_second_per_step = SimpleNamespace(perf_counter=lambda: float(len(engine.companies)))
    monkeypatch.setattr(jobs_module, "time", a_second_per_step)
    jobs = put(pairs, engine, REQUEST, REQUEST)
    engine.gate.set()
    assert all(job.future.result(10) for job in jobs)
    assert [job.spent_s for job in jobs] == [2.0, 2.0]
    assert pairs.pace.estimate_s(jobs) == pytest.approx(4.0)


def waiting(client: str, *names: str) -> list[Job]:
    """The jobs of one request, named by their prompts."""
    order = Order(client)
    jobs = [Job(replace(REQUEST, prompt=name), FakeEngine()) for name in names]
    for job in jobs:
        job.order = order
    return jobs


def drawn_in(turns: Turns[Job]) -> str:
    return " ".join(job.request.prompt for job in turns)


def test_clients_and_their_requests_take_turns() -> None:
    turns = Turns([*waiting("a", "a1", "a2", "a3"), *waiting("a", "b1"), *waiting("c", "c1", "c2")])
    assert len(turns) == 6
    assert drawn_in(turns) == "a1 c1 b1 c2 a2 a3"
    assert drawn_in(turns) == "a1 c1 b1 c2 a2 a3"  # looking changes nothing
    assert turns.pop().request.prompt == "a1"
    turns.add(waiting("d", "d1"))  # waits for one picture of everybody else, not for five
    assert drawn_in(turns) == "c1 b1 d1 c2 a2 a3"
    assert drawn_in(Turns(turns)) == drawn_in(turns)


def test_ten_pictures_hold_up_a_newcomer_for_two(long_queue: JobQueue, engine: FakeEngine) -> None:
    submit = partial(put, long_queue, engine)
    engine.gate.clear()
    ten = submit(*[REQUEST] * 10, client="ten")
    assert engine.started.acquire(timeout=10)
    (one,) = submit(replace(REQUEST, prompt="one"), client="one")
    engine.gate.set()
    assert one.future.result(10)
    assert all(job.future.result(10) for job in ten)
    assert [request.prompt for request in engine.requests].index("one") <= 2


def test_a_deadline_counts_only_what_comes_before(long_queue: JobQueue, engine: FakeEngine) -> None:
    submit = partial(put, long_queue, engine)
    long_queue.pace = taught(engine, 0.08)
    engine.gate.clear()
    submit(*[REQUEST] * 10, client="ten")
    assert engine.started.acquire(timeout=10)
    assert submit(REQUEST, client="one", patience_s=0.5)
    with pytest.raises(TooSlow):
        submit(*[REQUEST] * 10, client="another", patience_s=0.5)


def test_a_lost_device_ends_the_queue(engine: FakeEngine) -> None:
    def probe() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    queue = JobQueue(max_waiting=5, probe=probe)
    queue.start()
    engine.failure = ZImageError("the latent is not finite")  # no reason to doubt the device
    (harmless,) = put(queue, engine, REQUEST)
    assert isinstance(harmless.future.exception(10), ZImageError)
    engine.gate.clear()
    running, waits = put(queue, engine, REQUEST, REQUEST)
    engine.failure = RuntimeError("CUDA error")
    engine.gate.set()
    assert running.future.exception(10) is engine.failure
    assert isinstance(waits.future.exception(10), EngineLost)
    queue._thread.join(10)
    assert not queue.is_alive
    with pytest.raises(EngineLost):
        put(queue, engine, REQUEST)
