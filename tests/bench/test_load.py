"""The benchmark's client against our app on loopback."""

from collections.abc import Iterator

import pytest

from fake_engine import FakeEngine
from live_server import live
from zimage_fp8.bench.load import Client
from zimage_fp8.bench.quality import pixels
from zimage_fp8.errors import ZImageError
from zimage_fp8.serve import build_app

WORK = {"seed": 7, "size": "64x48", "steps": 4, "guidance": 0.0}


@pytest.fixture
def client() -> Iterator[Client]:
    with live(build_app(FakeEngine())) as server:
        client = Client(server.url)
        yield client
        client.close()


def test_a_request_is_timed_and_its_forwards_are_counted(client: Client) -> None:
    drawn = client.draw("x", **WORK)
    assert pixels(drawn.png).shape == (48, 64, 3)
    assert drawn.facts.nfe == 4
    assert drawn.latency_s > 0


def test_a_refused_request_says_why(client: Client) -> None:
    with pytest.raises(ZImageError, match="the server answered 400: size 100x100"):
        client.draw("x", **{**WORK, "size": "100x100"})


def test_a_server_that_is_gone_is_one_sentence() -> None:
    client = Client("http://127.0.0.1:9")
    with pytest.raises(ZImageError, match="the server did not answer"):
        client.draw("x", **WORK)
    client.close()
