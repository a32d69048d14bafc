"""The benchmark's client against our app on loopback."""

import contextlib
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

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


@contextlib.contextmanager
def client_of(answer: Response) -> Iterator[Client]:
    """A client of somebody else's server, which always gives this answer."""
    app = FastAPI()
    app.state.drain = lambda: None  # nothing is queued
    app.add_api_route("/v1/images/generations", lambda: answer, methods=["POST"])
    with live(app) as server:
        client = Client(server.url)
        try:
            yield client
        finally:
            client.close()


FACTS = {
    "policy": "full", "steps": 4, "nfe": 4, "guidance": 0.0, "sigmas": [], "timings_s": {},
    "peak_memory_bytes": {}, "server": {},
}  # fmt: skip


def pictures(*data: dict[str, object]) -> Response:
    return JSONResponse({"created": 1, "data": list(data), "zimage_fp8": FACTS})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response("<h1>Bad gateway</h1>", 502), "answered 502: <h1>Bad gateway</h1>"),
        (Response("", 503), "answered 503: an empty body"),
        (JSONResponse({"detail": "no"}, 404), "answered 404: .*detail"),
        (Response("hello"), "not an answer with pictures: hello"),
        (pictures({"url": "http://x/y.png"}), "no.* picture"),
        (pictures({"b64_json": ""}), "no picture as b64_json"),
        (pictures(), "no picture as b64_json"),
        (pictures({"b64_json": "%"}), "not base64"),
    ],
)
def test_an_unexpected_answer_is_one_sentence(answer: Response, message: str) -> None:
    with client_of(answer) as client, pytest.raises(ZImageError, match=message):
        client.draw("x", **WORK)


def test_a_server_that_is_gone_is_one_sentence() -> None:
    client = Client("http://127.0.0.1:9")
    with pytest.raises(ZImageError, match="the server did not answer"):
        client.draw("x", **WORK)
    client.close()
