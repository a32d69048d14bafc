"""The unmodified `openai` package against a live server."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image

from fake_engine import FakeEngine
from live_server import Live, live
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.serve import ServeOptions, build_app

KEY = "correct horse"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Live]:
    with live(build_app(engine, ServeOptions(api_keys=["other", KEY], max_waiting=1))) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


def connect(server: Live, key: str = KEY, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **options)  # type: ignore[arg-type]


def size_of(b64_json: str | None) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or ""))).size


def test_generate(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="gpt-image-1", prompt="x", n=2, size="1024x512", extra_body={"seed": 5, "steps": 2}
    )
    assert [size_of(data.b64_json) for data in answer.data or []] == [(1024, 512)] * 2
    assert [data.seed for data in answer.data or []] == [5, 6]  # type: ignore[attr-defined]
    assert answer.usage
    assert answer.usage.output_tokens == 2 * 1024 * 512 // 256
    assert answer.zimage_fp8["nfe"] == 4  # type: ignore[attr-defined]


def test_every_optional_field_may_be_none(client: openai.OpenAI) -> None:
    options = ("n", "size", "quality", "background", "style", "output_format", "response_format")
    answer = client.images.generate(prompt="x", **dict.fromkeys(options))  # type: ignore[call-overload]
    assert answer.warnings == []


def test_what_librechat_sends(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="gpt-image-1", prompt="x", size="auto", quality="auto", background="auto", n=1
    )
    assert answer.data
    assert size_of(answer.data[0].b64_json) == (64, 32)


def test_stream(client: openai.OpenAI) -> None:
    events = client.images.generate(prompt="x", stream=True, partial_images=2)
    *partial, completed = list(events)
    assert [event.partial_image_index for event in partial] == [0, 1]  # type: ignore[union-attr]
    assert completed.type == "image_generation.completed"
    assert size_of(completed.b64_json) == (64, 32)
    assert completed.usage.total_tokens == 9


def test_a_stream_that_fails_raises(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.failure = MemoryError()
    with pytest.raises(openai.APIError) as raised:
        list(client.images.generate(prompt="x", stream=True))
    assert (raised.value.code, raised.value.type) == ("internal_error", "server_error")


def test_async(server: Live) -> None:
    async def draw() -> tuple[int, int]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            answer = await client.images.generate(prompt="x")
            stream = await client.images.generate(prompt="x", stream=True, partial_images=1)
            return len(answer.data or []), len([event async for event in stream])

    assert asyncio.run(draw()) == (1, 2)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "zimage-fp8"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other")
    assert raised.value.code == "not_found"


def test_a_wrong_field_raises_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="size") as raised:
        client.images.generate(prompt="x", size="100x100")  # type: ignore[call-overload]
    assert (raised.value.param, raised.value.code) == ("size", "invalid_value")
    assert raised.value.request_id


def test_a_wrong_key_raises_authentication_error(server: Live) -> None:
    with connect(server, "wrong") as client, pytest.raises(openai.AuthenticationError) as raised:
        client.images.generate(prompt="x")
    assert raised.value.code == "invalid_api_key"


def test_a_crash_is_sent_again(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.failure = RuntimeError()
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=1).images.generate(prompt="x")
    assert engine.started.acquire(blocking=False)
    assert engine.started.acquire(blocking=False)
    assert not engine.started.acquire(blocking=False)


def test_a_retry_after_a_full_queue_succeeds(server: Live, engine: FakeEngine) -> None:
    engine.gate.clear()

    async def draw() -> list[int]:
        options = {"base_url": f"{server.url}/v1", "api_key": KEY}
        async with openai.AsyncOpenAI(**options) as client:  # type: ignore[arg-type]
            first = asyncio.create_task(client.images.generate(prompt="x"))
            await asyncio.to_thread(engine.started.acquire)
            second = asyncio.create_task(client.images.generate(prompt="x"))
            while not second.done() and "queue_depth 1.0" not in await metrics(client):
                pass
            with pytest.raises(openai.RateLimitError) as refused:
                await client.with_options(max_retries=0).images.generate(prompt="x")
            assert int(refused.value.response.headers["retry-after"]) >= 1
            third = asyncio.create_task(client.images.generate(prompt="x"))
            engine.gate.set()
            return [len((await task).data or []) for task in (first, second, third)]

    assert asyncio.run(draw()) == [1, 1, 1]


async def metrics(client: openai.AsyncOpenAI) -> str:
    headers = {"authorization": f"Bearer {KEY}"}
    url = str(client.base_url).replace("/v1/", "/metrics")
    response = await client._client.get(url, headers=headers)
    return response.text


def test_a_timeout_shorter_than_the_work_is_refused_once(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.step_s = 0.05
    client.images.generate(prompt="x")  # teaches the pace: 0.4 s
    steps_before = engine.steps_run
    with pytest.raises(openai.RateLimitError) as raised:
        client.with_options(timeout=0.2).images.generate(prompt="x")
    assert raised.value.code == "deadline_too_short"
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert engine.steps_run == steps_before
    streamed = client.with_options(timeout=5).images.generate(prompt="x", stream=True)
    assert len(list(streamed)) == 1


def test_a_client_that_times_out_costs_at_most_a_step_more(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.step_s = 0.05
    impatient = client.with_options(timeout=0.15, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt="x", extra_body={"steps": 100})
    engine.step_s = 0
    client.images.generate(prompt="x", extra_body={"steps": 1})
    assert engine.steps_run < 20


def test_raw_response_headers(client: openai.OpenAI) -> None:
    raw = client.images.with_raw_response.generate(prompt="x", extra_body={"seed": 3})
    assert raw.headers["x-seed"] == "3"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().data


def test_url_and_formats(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x", response_format="url", output_format="jpeg")
    assert answer.data
    assert answer.data[0].b64_json is None
    assert str(answer.data[0].url).endswith(".jpeg")


def test_a_real_model(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), device="cpu")
    with live(build_app(pipeline)) as server, connect(server, "anything") as client:
        stream = client.images.generate(
            prompt="x", stream=True, partial_images=2, size="64x48", extra_body={"seed": 1}
        )
        *partial, completed = [event.b64_json for event in stream]
        answer = client.images.generate(prompt="x", size="64x48", extra_body={"seed": 1})
    assert [size_of(event) for event in partial] == [(64, 48)] * 2
    assert len({*partial, completed}) == 3
    assert answer.data
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(str(it)))).tobytes()
        for it in (completed, answer.data[0].b64_json)
    ]
    assert pictures[0] == pictures[1]
