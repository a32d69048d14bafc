"""The benchmark's client against our app on loopback."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from fake_engine import FakeEngine
from live_server import live
from zimage_fp8.bench.load import Client, Work
from zimage_fp8.bench.quality import pixels
from zimage_fp8.errors import ZImageError
from zimage_fp8.serve import build_app

WORK = Work("x", seed=7, size="64x48", steps=4, guidance=0.0)


@pytest.fixture
def client() -> Iterator[Client]:
    with live(build_app(FakeEngine())) as server:
        client = Client(server.url)
        yield client
        client.close()


def test_a_request_is_timed_and_its_forwards_are_counted(client: Client) -> None:
    drawn = client.draw(WORK)
    assert pixels(drawn.png).shape == (48, 64, 3)
    assert drawn.facts.nfe == 4
    assert drawn.facts.server["model"] == "fake"
    assert drawn.latency_s > 0
    assert client.time(WORK) > 0
    assert client.served_models() == ["fake"]


def test_a_refused_request_says_why(client: Client) -> None:
    with pytest.raises(ZImageError, match="the server answered 400: size 100x100"):
        client.draw(replace(WORK, size="100x100"))


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
        (pictures({"url": "http://x/y.png"}), "no picture as b64_json"),
        (pictures({"b64_json": ""}), "no picture as b64_json"),
        (pictures(), "no picture as b64_json"),
        (pictures({"b64_json": "%"}), "not base64"),
    ],
)
def test_an_unexpected_answer_is_one_sentence(answer: Response, message: str) -> None:
    with client_of(answer) as client, pytest.raises(ZImageError, match=message):
        client.draw(WORK)


def test_a_server_that_is_gone_is_one_sentence() -> None:
    client = Client("http://127.0.0.1:9")
    with pytest.raises(ZImageError, match="the server did not answer"):
        client.draw(WORK)
    client.close()


OMNI = {"queue_wait_ms": 40.0, "preprocess_ms": 10.0, "stage_0_gen_ms": 700.0}
PROFILED = {"ZImagePipeline.text_encoder.forward": 0.08, "ZImagePipeline.vae.decode": 0.05}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, {}),
        (OMNI, {"queue": 0.05, "generate": 0.7}),
        (OMNI | PROFILED | {"ZImagePipeline.forward": 0.69},
         {"queue": 0.05, "encode": 0.08, "decode": 0.05, "denoise": 0.57}),
    ],
)  # fmt: skip
def test_another_servers_stages(told: dict[str, float] | None, expected: dict[str, float]) -> None:
    """As vLLM-Omni 0.26 to 0.30 names them, without and with its profiler."""
    answer = {"created": 1, "data": [{"b64_json": "eA=="}], "metrics": {"stage_durations": told}}
    with client_of(JSONResponse(answer)) as client:
        assert client.draw(WORK).facts.timings_s == pytest.approx(expected)


def test_another_server_says_what_it_can() -> None:
    """vLLM-Omni counts no forwards; its peak is torch's reserved memory, in MiB."""
    metrics = {"stage_durations": {"diffuse": 3.0}, "peak_memory_mb": 20480.0}
    answer = JSONResponse({"created": 1, "data": [{"b64_json": "eA=="}], "metrics": metrics})
    with client_of(answer) as client:
        facts = client.draw(WORK).facts
        assert client.served_models() == []
    assert (facts.nfe, facts.timings_s) == (None, {})
    assert facts.peak_memory_bytes == {"torch_reserved": 20 * 2**30}


def test_steps_and_guidance_are_always_sent() -> None:
    sent: list[dict[str, object]] = []
    app = FastAPI()
    app.state.drain = lambda: None

    async def keep(request: Request) -> Response:
        sent.append(await request.json())
        return Response("{}")

    app.add_api_route("/v1/images/generations", keep, methods=["POST"])
    with live(app) as server:
        client = Client(server.url, {"generator_device": "cpu"})
        client.time(WORK)
        client.close()
    assert sent == [
        {
            "prompt": "x", "seed": 7, "size": "64x48", "num_inference_steps": 4,
            "guidance_scale": 0.0, "n": 1, "response_format": "b64_json",
            "generator_device": "cpu",
        }
    ]  # fmt: skip
