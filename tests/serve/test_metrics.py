"""/metrics as Prometheus would read it."""

from concurrent.futures import ThreadPoolExecutor

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeEngine
from live_server import live, wait_until
from zimage_fp8.serve import build_app

PATH = "/v1/images/generations"


def samples(client: httpx2.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_what_happened_is_counted() -> None:
    engine = FakeEngine()
    engine.captions.hits, engine.captions.misses = 2, 5
    with (
        live(build_app(engine)) as server,
        httpx2.Client(base_url=server.url, trust_env=False) as client,
    ):
        client.post(PATH, json={"prompt": "secret words", "n": 2})
        client.post(PATH, json={"prompt": ""})
        engine.failure = RuntimeError()
        client.post(PATH, json={"prompt": "x"})
        found = samples(client)
        text = client.get("/metrics").text

    def value(name: str, **labels: str) -> float:
        return found[f"zimage_fp8_{name}", frozenset(labels.items())]

    assert value("requests_total", status="200") == 1
    assert value("requests_total", status="400") == 1
    assert value("requests_total", status="500") == 1
    assert value("request_duration_seconds_count") == 3
    assert value("images_total", model="fake") == 2
    assert value("image_pixels_total") == 2 * 64 * 32
    assert value("queue_wait_seconds_count") == 2
    assert value("denoise_step_seconds_sum") == 2 * 0.5 / 8
    assert value("stage_seconds_sum", stage="text_encode") == 0.5
    assert value("stage_seconds_sum", stage="vae_decode") == 0.25
    assert value("stage_seconds_count", stage="encode") == 2
    assert value("queue_depth") == value("cancelled_total") == 0
    assert value("gpu_memory_bytes", kind="allocated") >= 0
    assert 'zimage_fp8_build_info{gpu="cpu",model="fake",policy="bf16_base"' in text
    assert value("prompt_cache_total", model="fake", result="hit") == 2
    assert value("prompt_cache_total", model="fake", result="miss") == 5
    assert "secret" not in text


def test_what_is_going_on_can_be_seen() -> None:
    engine = FakeEngine()
    with (
        live(build_app(engine)) as server,
        httpx2.Client(base_url=server.url, trust_env=False) as client,
        ThreadPoolExecutor() as pool,
    ):
        engine.gate.clear()
        drawing = pool.submit(
            httpx2.post, f"{server.url}{PATH}", json={"prompt": "x", "n": 3}, trust_env=False
        )
        assert engine.started.acquire(timeout=10)
        found = samples(client)
        assert found["zimage_fp8_requests_running", frozenset()] == 1
        assert found["zimage_fp8_queue_depth", frozenset()] == 2
        engine.failure = MemoryError()  # of the others, nobody wants to know any more
        engine.gate.set()
        assert drawing.result(10).status_code == 500
        wait_until(lambda: samples(client)["zimage_fp8_queue_depth", frozenset()] == 0)


def test_two_apps_count_apart() -> None:
    first, second = build_app(FakeEngine()), build_app(FakeEngine())
    with live(first) as one, live(second) as two:
        httpx2.post(f"{one.url}{PATH}", json={"prompt": "x"}, trust_env=False)
        with httpx2.Client(base_url=two.url, trust_env=False) as client:
            assert not any(name == "zimage_fp8_images_total" for name, _ in samples(client))
