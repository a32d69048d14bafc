"""Streamed answers, event by event, and the previews of a real model."""

import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from fake_engine import FakeEngine
from live_server import Live, live
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve import build_app, stream
from zimage_fp8.serve.job import Job, Previews
from zimage_fp8.serve.jobs import JobQueue
from zimage_fp8.serve.stream import preview_steps

PATH = "/v1/images/generations"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Live]:
    with live(build_app(engine)) as server:
        yield server
        engine.gate.set()


def events(server: Live, **body: object) -> list[dict[str, object]]:
    """Every event's data; a name, where there is one, must equal the type."""
    response = httpx2.post(
        f"{server.url}{PATH}",
        json={"prompt": "x", "stream": True, **body},
        timeout=30,
        trust_env=False,
    )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = json.loads(fields["data"])
        assert fields.get("event") == data.get("type")
        found.append(data)
    return found


def grey(event: dict[str, object]) -> int:
    picture = Image.open(io.BytesIO(base64.b64decode(str(event["b64_json"]))))
    return int(picture.convert("L").getpixel((0, 0)))


def test_previews_then_the_picture(server: Live) -> None:
    *partial, completed = events(server, partial_images=3, seed=90)
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * 3
    assert [event["partial_image_index"] for event in partial] == [0, 1, 2]
    assert [grey(event) for event in partial] == [2, 4, 6]  # the steps they were taken at
    assert completed["type"] == "image_generation.completed"
    assert grey(completed) == 90
    for event in (*partial, completed):
        assert (event["size"], event["quality"], event["background"]) == ("64x32", "auto", "opaque")
        assert (event["output_format"], event["index"], event["seed"]) == ("png", 0, 90)
        assert event["created_at"]
    assert completed["usage"] == {"input_tokens": 1, "output_tokens": 8, "total_tokens": 9}
    assert completed["warnings"] == []
    assert completed["zimage_fp8"]["nfe"] == 8  # type: ignore[index]


def test_without_previews_one_event_per_picture(server: Live) -> None:
    found = events(server, n=3, seed=10)
    assert [event["type"] for event in found] == ["image_generation.completed"] * 3
    assert [(event["index"], event["seed"]) for event in found] == [(0, 10), (1, 11), (2, 12)]
    assert [grey(event) for event in found] == [10, 11, 12]


def test_previews_of_several_pictures_are_told_apart(server: Live) -> None:
    found = events(server, n=2, partial_images=1)
    assert [(event["index"], event.get("partial_image_index")) for event in found] == [
        (0, 0), (0, None), (1, 0), (1, None),
    ]  # fmt: skip


def test_comments_tell_every_step(server: Live) -> None:
    body = {"prompt": "x", "stream": True, "n": 2, "num_inference_steps": 2}
    response = httpx2.post(f"{server.url}{PATH}", json=body, timeout=30, trust_env=False)
    told = [line for line in response.text.splitlines() if line.startswith(": step")]
    assert told == [
        f": step {done}/2 of picture {index}" for index in range(2) for done in range(3)
    ]


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(8, 0, []), (8, 1, [4]), (8, 2, [3, 5]), (8, 3, [2, 4, 6]), (2, 3, [1]), (1, 3, [])],
)
def test_previews_are_spread_evenly(steps: int, count: int, expected: list[int]) -> None:
    assert sorted(preview_steps(steps, count)) == expected


def test_a_refusal_is_an_ordinary_answer(server: Live) -> None:
    body = {"prompt": "", "stream": True}
    response = httpx2.post(f"{server.url}{PATH}", json=body, trust_env=False)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_failure_is_the_last_event(server: Live, engine: FakeEngine) -> None:
    engine.failure = RuntimeError("secret details")
    (event,) = events(server, n=2)
    assert event["error"]["code"] == "internal_error"  # type: ignore[index]
    assert "secret" not in str(event)
    engine.failure = None
    assert len(events(server)) == 1


def test_comments_keep_a_quiet_stream_alive(
    server: Live, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.01)
    engine.gate.clear()
    body = {"prompt": "x", "stream": True}
    with httpx2.stream(
        "POST", f"{server.url}{PATH}", json=body, timeout=30, trust_env=False
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        engine.gate.set()
        assert "image_generation.completed" in "".join(lines)


def test_a_client_that_leaves_stops_its_stream(server: Live, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    content = json.dumps({"prompt": "x", "stream": True, "steps": 100, "n": 3}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + content)
        assert engine.started.acquire(timeout=10)
    assert len(events(server, steps=1)) == 1
    assert engine.steps_run < 100


def test_shutdown_ends_a_stream_with_its_pictures(server: Live, engine: FakeEngine) -> None:
    engine.gate.clear()
    body = {"prompt": "x", "stream": True, "n": 2}
    with httpx2.stream(
        "POST", f"{server.url}{PATH}", json=body, timeout=30, trust_env=False
    ) as response:
        assert engine.started.acquire(timeout=10)
        server.begin_stop()
        engine.gate.set()
        assert response.read().count(b"event: image_generation.completed") == 2


def test_previews_of_a_real_model_end_at_its_picture(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), device="cpu")
    request = ImageRequest("x", 64, 48, steps=4, seed=1)
    shown: list[np.ndarray] = []
    job = Job(request, pipeline, Previews(frozenset({2, 4}), shown.append))
    queue = JobQueue(max_waiting=1)
    queue.submit([job])
    queue.start()
    watched = job.future.result(30)
    queue.close()
    plain = pipeline.generate(request)
    assert (watched.pixels == plain.pixels).all()
    assert [preview.shape for preview in shown] == [(48, 64, 3)] * 2
    assert (shown[0] != plain.pixels).any()
    assert (shown[1] == plain.pixels).all()  # the last step points at the picture
    assert set(watched.timings_s) == {"encode", "denoise", "preview", "decode"}
