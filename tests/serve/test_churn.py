"""Many clients at once, some of whom leave or talk nonsense: nothing is lost, nothing is left."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2

from fake_engine import FakeEngine
from live_server import Live, live, wait_until
from zimage_fp8.serve import ServeOptions, build_app

PATH = "/v1/images/generations"
NUM_REQUESTS = 300


def draw(client: httpx2.Client, **body: object) -> int:
    response = client.post(PATH, json={"prompt": "x", "steps": 4, **body})
    if response.status_code == 200 and body.get("stream"):
        return response.text.count("event: image_generation.completed")
    assert response.status_code != 200 or response.json()["data"]
    return response.status_code


def leave(server: Live, patience_s: float) -> int:
    """Ask, wait for a moment, and close the connection."""
    content = json.dumps({"prompt": "x", "steps": 50}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        connection.settimeout(patience_s)
        try:
            connection.recv(1)
        except TimeoutError:
            return 0
    return 1


def test_churn() -> None:
    engine = FakeEngine()
    engine.step_s = 0.0005
    options = ServeOptions(max_waiting=8, max_body_bytes=10_000)
    with (
        live(build_app(engine, options)) as server,
        httpx2.Client(base_url=server.url, timeout=30, trust_env=False) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        rng = random.Random(1)
        kinds = [
            (partial(draw, client), {200, 429}),
            (partial(draw, client, n=3, output_format="webp"), {200, 429}),
            (partial(draw, client, stream=True, partial_images=2, n=2), {2, 429}),
            (partial(draw, client, size="1x1"), {400}),
            (partial(draw, client, user="x" * 20_000), {413}),
            (partial(leave, server, 0.005), {0, 1}),
        ]
        chosen = rng.choices(kinds, k=NUM_REQUESTS)
        answers = [pool.submit(ask) for ask, _ in chosen]
        for answer, (_, expected) in zip(answers, chosen, strict=True):
            assert answer.result(30) in expected

        wait_until(lambda: "queue_depth 0.0" in client.get("/metrics").text)
        wait_until(lambda: "requests_running 0.0" in client.get("/metrics").text)
        assert draw(client) == 200
