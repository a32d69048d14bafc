"""What an operator sees: readiness, logs, traces."""

import io
import json
import logging
from collections.abc import Iterator

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fake_engine import FakeEngine
from live_server import live, wait_until
from zimage_fp8.errors import UsageError
from zimage_fp8.serve import ServeOptions, build_app
from zimage_fp8.serve.logs import HumanLines, JsonLines, log_to_stderr

PATH = "/v1/images/generations"
WARM = ServeOptions(warm_up=True)


def get(url: str) -> httpx2.Response:
    return httpx2.get(url, trust_env=False)


def test_ready_means_warm() -> None:
    engine, other = FakeEngine(), FakeEngine("full")
    engine.gate.clear()
    with live(build_app({"one": engine, "two": other}, WARM)) as server:
        cold = get(f"{server.url}/ready")
        assert (cold.status_code, cold.json()["status"]) == (503, "warming up")
        assert int(cold.headers["retry-after"]) > 0
        assert get(f"{server.url}/health").status_code == 200
        engine.gate.set()
        wait_until(lambda: get(f"{server.url}/ready").status_code == 200)
    for each in (engine, other):
        assert [request.steps for request in each.requests] == [1, 8]
        assert {(request.width, request.height) for request in each.requests} == {(64, 32)}


def test_the_warm_up_teaches_the_pace() -> None:
    engine = FakeEngine()
    engine.step_s = 0.02
    with live(build_app(engine, WARM)) as server:
        wait_until(lambda: get(f"{server.url}/ready").status_code == 200)
        refused = httpx2.post(
            f"{server.url}{PATH}",
            json={"prompt": "x", "steps": 100},
            headers={"x-stainless-read-timeout": "0.5"},
            trust_env=False,
        )
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "deadline_too_short"


def test_the_warm_up_draws_every_batch(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with live(build_app(engine, ServeOptions(warm_up=True, max_batch=3))) as server:
        wait_until(lambda: get(f"{server.url}/ready").status_code == 200)
    assert engine.companies == [1, 2, 3, *[1] * 8]


def test_a_warm_up_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.failure = MemoryError("no room")
    with live(build_app(engine, WARM)) as server:
        wait_until(lambda: "MemoryError" in get(f"{server.url}/ready").text)
        engine.failure = None
        body = {"prompt": "x"}
        drawn = httpx2.post(f"{server.url}{PATH}", json=body, trust_env=False)
    assert drawn.status_code == 200
    assert "the warm-up picture failed" in caplog.text


def test_ending_does_not_wait_for_the_warm_up() -> None:
    engine = FakeEngine()
    engine.step_s = 0.1
    with live(build_app(engine, WARM)) as server:
        assert engine.started.acquire(timeout=10)
        server.begin_stop()
    assert engine.steps_run <= 2


@pytest.fixture
def logger(request: pytest.FixtureRequest) -> Iterator[logging.Logger]:
    logger = logging.getLogger(request.param)
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before


own_logger = pytest.mark.parametrize("logger", ["zimage_fp8"], indirect=True)
root_logger = pytest.mark.parametrize("logger", [""], indirect=True)


def logged(formatter: logging.Formatter, logger: logging.Logger) -> tuple[str, str]:
    """What two requests write, and the id of the second, which fails."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    engine = FakeEngine()
    with live(build_app(engine)) as server:
        url = f"{server.url}{PATH}"
        httpx2.post(url, json={"prompt": "secret words"}, trust_env=False)
        engine.failure = RuntimeError("broken")
        failed = httpx2.post(url, json={"prompt": "secret words"}, trust_env=False)
        get(f"{server.url}/health")
    assert "secret" not in stream.getvalue()
    assert "/health" not in stream.getvalue()
    return stream.getvalue(), failed.headers["x-request-id"]


@own_logger
def test_json_logs(logger: logging.Logger) -> None:
    text, identity = logged(JsonLines(), logger)
    lines = [json.loads(line) for line in text.splitlines()]
    drawn, crash, failed = (line for line in lines if line["logger"].startswith("zimage_fp8"))
    assert (drawn["method"], drawn["path"], drawn["status"]) == ("POST", PATH, 200)
    assert drawn["duration_ms"] >= 0
    assert drawn["time"].endswith("Z")
    assert crash["request_id"] == failed["request_id"] == identity != drawn["request_id"]
    assert "RuntimeError: broken" in crash["exception"]
    assert (crash["level"], failed["status"]) == ("error", 500)


@own_logger
def test_human_logs(logger: logging.Logger) -> None:
    text, identity = logged(HumanLines(), logger)
    (failed,) = (line for line in text.splitlines() if " 500 " in line)
    assert failed.endswith(f"ms [{identity}]")
    assert "RuntimeError: broken" in text


@root_logger
def test_an_unknown_log_format_is_refused(logger: logging.Logger) -> None:
    with pytest.raises(UsageError, match="human, json"):
        log_to_stderr("xml")
    log_to_stderr("json")
    assert isinstance(logger.handlers[0].formatter, JsonLines)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced(
    spans: InMemorySpanExporter, engine: FakeEngine, **request: object
) -> list[ReadableSpan]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    options = ServeOptions(tracer=provider.get_tracer("test"))
    with live(build_app(engine, options)) as server:
        httpx2.post(f"{server.url}{PATH}", trust_env=False, **request)  # type: ignore[arg-type]
        get(f"{server.url}/health")
    return sorted(spans.get_finished_spans(), key=lambda span: span.start_time or 0)


STAGES = ["queue", "text_encode", "denoise", "vae_decode", "picture"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_per_stage(spans: InMemorySpanExporter, stream: bool) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"prompt": "secret words", "seed": 7, "stream": stream}
    found = traced(spans, FakeEngine(), json=body, headers={"traceparent": parent})
    by_name = {span.name: span for span in found}
    request = by_name.pop(f"POST {PATH}")
    assert sorted(by_name) == sorted(STAGES)
    assert f"{request.context.trace_id:x}" == parent.split("-")[1].lstrip("0")
    assert request.parent
    assert f"{request.parent.span_id:x}" == parent.split("-")[2]
    assert request.attributes
    assert request.attributes["http.response.status_code"] == 200
    for span in by_name.values():
        assert span.parent
        assert span.parent.span_id == request.context.span_id
        assert span.attributes
        assert span.attributes["zimage_fp8.seed"] == 7
    starts = [by_name[name].start_time for name in STAGES]
    assert starts == sorted(starts)  # type: ignore[type-var]
    denoise = by_name["denoise"]
    assert denoise.end_time is not None
    assert denoise.start_time is not None
    assert (denoise.end_time - denoise.start_time) / 1e9 == pytest.approx(0.5)
    assert "secret" not in str([span.to_json() for span in found])


def test_a_failure_marks_its_span(spans: InMemorySpanExporter) -> None:
    engine = FakeEngine()
    engine.failure = RuntimeError("broken")
    (span,) = traced(spans, engine, json={"prompt": "x"})
    assert span.attributes
    assert span.attributes["http.response.status_code"] == 500
    assert not span.status.is_ok
