"""Load tests against a server whose times are known."""

from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median

import pytest

from zimage_fp8.bench.launch import Server
from zimage_fp8.bench.load import Client, Work
from zimage_fp8.bench.summary import goodput_per_s, images_per_s
from zimage_fp8.bench.throughput import closed_loop, open_loop, poisson_arrivals_s

WORK = Work("x", seed=1, size="16x16", steps=4, guidance=0.0)
PICTURE_S = 0.12


@pytest.fixture
def client(start_stub: Callable[..., Server]):
    client = Client(start_stub("--step", PICTURE_S / 4).url)
    client.time(WORK)
    yield client
    client.close()


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals_s(4001, rate_per_s=5.0)
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] == 0
    # Mean and median of an exponential; 4000 gaps have a standard error of 1.6 %.
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert median(gaps) == pytest.approx(0.2 * 0.6931, rel=0.07)
    assert arrivals == poisson_arrivals_s(4001, rate_per_s=5.0)


def test_a_closed_loop_keeps_the_server_busy_and_no_more(client: Client) -> None:
    """Three clients of a server that draws one at a time: its rate, three times its latency."""
    found = closed_loop(client, [WORK] * 9, concurrency=3, slo_s=2 * PICTURE_S)
    assert (found.concurrency, found.rate_per_s, found.failures) == (3, None, {})
    assert len(found.latencies_s) == 9
    # At most the server's rate; the rest is a busy machine's, hence the room below.
    assert 0.5 / PICTURE_S < images_per_s(found) <= 1.02 / PICTURE_S
    assert median(found.latencies_s) >= 2 * PICTURE_S
    good = sum(latency_s <= 2 * PICTURE_S for latency_s in found.latencies_s)
    assert goodput_per_s(found) == good / found.duration_s


def test_random_arrivals_below_capacity_wait_little(client: Client) -> None:
    found = open_loop(client, [WORK] * 6, rate_per_s=0.3 / PICTURE_S)
    assert (found.concurrency, found.rate_per_s) == (None, 0.3 / PICTURE_S)
    assert len(found.latencies_s) == 6
    assert found.duration_s >= poisson_arrivals_s(6, 0.3 / PICTURE_S)[-1] + PICTURE_S
    assert goodput_per_s(found) is None


def test_failures_are_counted_and_not_averaged_away(start_stub: Callable[..., Server]) -> None:
    client = Client(start_stub("--dies-after", 2).url)
    found = closed_loop(client, [WORK] * 5, concurrency=1)
    client.close()
    assert len(found.latencies_s) == 2
    assert sum(found.failures.values()) == 3
    assert all("did not answer" in reason for reason in found.failures)
