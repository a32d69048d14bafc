"""Load tests: many requests at once, in a closed loop or arriving at random."""

import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from zimage_fp8.bench.load import Client, Work
from zimage_fp8.bench.record import LoadRecord
from zimage_fp8.errors import ZImageError

ARRIVAL_SEED = 1235  # every variant meets the same arrivals


@dataclass
class _Outcomes:
    """What came of the requests, filled by many threads. Appending to a list is atomic."""

    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self, client: Client, work: Work) -> None:
        try:
            self.latencies_s.append(client.time(work))
        except ZImageError as error:
            self.errors.append(str(error))


def closed_loop(
    client: Client, works: Sequence[Work], concurrency: int, slo_s: float | None = None
) -> LoadRecord:
    """`concurrency` clients, each sending its next request when it has its answer.

    slo_s: what counts as a good answer, for the goodput.
    """
    waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
    for work in works:
        waiting.put(work)
    outcomes = _Outcomes()

    def ask_until_done() -> None:
        while True:
            try:
                work = waiting.get_nowait()
            except queue.Empty:
                return
            outcomes.run(client, work)

    started = time.perf_counter()
    _run_all([ask_until_done] * min(concurrency, len(works)))
    duration_s = time.perf_counter() - started
    return _record(outcomes, works[0].size, duration_s, slo_s, concurrency=concurrency)


def open_loop(
    client: Client, works: Sequence[Work], rate_per_s: float, slo_s: float | None = None
) -> LoadRecord:
    """Requests arrive as a Poisson process, whether or not earlier ones are answered.

    A latency is measured from the moment a request is sent, which is its arrival: every request
    has a thread of its own. The first arrives at once.
    """
    outcomes = _Outcomes()
    arrivals_s = poisson_arrivals_s(len(works), rate_per_s)
    started = time.perf_counter()

    def ask_at(arrival_s: float, work: Work) -> Callable[[], None]:
        def ask() -> None:
            time.sleep(max(0.0, arrival_s - (time.perf_counter() - started)))
            outcomes.run(client, work)

        return ask

    _run_all(ask_at(*pair) for pair in zip(arrivals_s, works, strict=True))
    duration_s = time.perf_counter() - started
    return _record(outcomes, works[0].size, duration_s, slo_s, rate_per_s=rate_per_s)


def poisson_arrivals_s(count: int, rate_per_s: float) -> list[float]:
    """Seconds from the first arrival, which is 0, to each."""
    generator = random.Random(ARRIVAL_SEED)
    arrivals = [0.0]
    for _ in range(count - 1):
        arrivals.append(arrivals[-1] + generator.expovariate(rate_per_s))
    return arrivals


def _run_all(actions: Iterable[Callable[[], None]]) -> None:
    listed = list(actions)
    with ThreadPoolExecutor(max_workers=len(listed)) as pool:
        for future in [pool.submit(act) for act in listed]:
            future.result()


def _record(
    outcomes: _Outcomes,
    size: str,
    duration_s: float,
    slo_s: float | None,
    *,
    concurrency: int | None = None,
    rate_per_s: float | None = None,
) -> LoadRecord:
    return LoadRecord(
        size=size,
        concurrency=concurrency,
        rate_per_s=rate_per_s,
        slo_s=slo_s,
        duration_s=duration_s,
        latencies_s=[round(latency_s, 6) for latency_s in outcomes.latencies_s],
        failures=dict(Counter(outcomes.errors)),
    )
