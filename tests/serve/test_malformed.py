"""Bodies that no client should send: every answer is a 4xx in OpenAI's envelope."""

import asyncio
import json
import random
from collections.abc import Callable

import httpx2
import pytest

from fake_engine import FakeEngine
from zimage_fp8.protocol import ErrorAnswer
from zimage_fp8.serve import ServeOptions, build_app

PATH = "/v1/images/generations"
EDITS = "/v1/images/edits"
GOOD = {"prompt": "a red apple", "n": 1, "size": "64x32", "seed": 3, "steps": 2}
DEEP = 100_000

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "a zero byte": b"\0",
    "only a prompt": b"a red apple",
    "a form": b"prompt=a+red+apple&n=1",
    "half an object": b'{"prompt": "x"',
    "two objects": b'{"prompt": "x"}{"prompt": "x"}',
    "a trailing comma": b'{"prompt": "x",}',
    "single quotes": b"{'prompt': 'x'}",
    "a comment": b'{"prompt": "x" /* red */}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "a raw newline": b'{"prompt": "a\nb"}',
    "deep arrays": b'{"prompt": ' + b"[" * DEEP,
    "closed deep arrays": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP,
    "deep arrays in an ignored field": b'{"prompt": "x", "a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a long number": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "a huge exponent": b'{"prompt": "x", "n": 1e999}',
    "a huge guidance": b'{"prompt": "x", "guidance_scale": 1e999}',
    "infinity": b'{"prompt": "x", "cfg_scale": Infinity}',
    "minus zero steps": b'{"prompt": "x", "steps": -0}',
    "half a picture": b'{"prompt": "x", "n": 0.5}',
    "a prompt of 32,001": b'{"prompt": "' + b"x" * 32_001 + b'"}',
    "a negative prompt of 32,001": b'{"prompt": "x", "negative_prompt": "' + b"x" * 32_001 + b'"}',
    "other digits": '{"prompt": "x", "size": "٦٤x٣٢"}'.encode(),
    "no pixels": b'{"prompt": "x", "size": "0x0"}',
    "too large a body": b'{"prompt": "' + b"x" * 2**20 + b'"}',
}

WRONG: dict[str, list[object]] = {
    "prompt": ["", "  \n", 7, True, [], {}, ["x"], "x" * 40_000],
    "n": [0, -1, 11, 1e30, "one", [], {}, 1.5],
    "size": ["", "64", "64x", "x64", "-64x64", "64x64x64", 64, [64, 64], "63x64", "99999x99999"],
    "seed": [-1, 2**53, 2**70, 0.5, "x", [], {}],
    "steps": [0, -5, 10**9, 2**80, "many", [], 0.1],
    "num_inference_steps": [-1, 201, "x", {}],
    "guidance_scale": ["x", [], {}],
    "cfg_scale": [-1, 0.5, "x", []],
    "width": [64, "wide", -64],
    "quality": ["best", 3, []],
    "output_format": ["gif", "svg", "", 1],
    "output_compression": [-1, 101, "x"],
    "response_format": ["file", "", 5],
    "background": ["transparent", 5],
    "stream": ["often", 5, []],
    "partial_images": [-1, 4, "x"],
    "model": [5, [], {}],
    "negative_prompt": [5, []],
    "frame_count": [2, 16],
    "user": [5, []],
}


def random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(200))


def cut(rng: random.Random) -> bytes:
    body = json.dumps(GOOD).encode()
    return body[: rng.randrange(len(body))]


def damaged(rng: random.Random) -> bytes:
    """A good body with bytes changed until it is no JSON any more."""
    body = bytearray(json.dumps(GOOD).encode())
    while is_json(bytes(body)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def is_json(body: bytes) -> bool:
    try:
        json.loads(body.decode())
    except ValueError:
        return False
    return True


def wrong_values(rng: random.Random) -> bytes:
    fields = rng.sample(sorted(WRONG), rng.randrange(1, 4))
    return json.dumps(GOOD | {field: rng.choice(WRONG[field]) for field in fields}).encode()


def no_object(rng: random.Random) -> bytes:
    return json.dumps(rng.choice([None, True, 0, -1.5, "x", [], [GOOD], [[]], ["prompt"]])).encode()


def tree(rng: random.Random, depth: int = 5) -> object:
    """Random JSON, as the prompt: whatever it is, it is no text."""
    if depth == 0 or rng.random() < 0.2:
        return {rng.choice("abc"): rng.random()}
    return [tree(rng, depth - 1) for _ in range(rng.randrange(4))]


def strange_prompt(rng: random.Random) -> bytes:
    return json.dumps({**GOOD, "prompt": tree(rng)}).encode()


MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    random_bytes, cut, damaged, wrong_values, wrong_values, no_object, strange_prompt,
)  # fmt: skip

ODD_HEADERS: list[dict[str, str]] = [
    {},
    {"accept": "image/png"},
    {"accept": ";;;q=,,image/*;q=nan"},
    {"x-stainless-read-timeout": "nan"},
    {"x-stainless-read-timeout": "-1e9"},
    {"content-type": "multipart/form-data"},
    {"authorization": "Bearer"},
    {"x-forwarded-host": '"\\'},
    {"x-request-id": "x" * 1000},
]


def wrong_form(rng: random.Random) -> bytes:
    """A form for an edit whose picture is none, with some wrong fields beside it."""
    fields = [("prompt", b"x"), ("image", rng.randbytes(rng.randrange(300)))]
    chosen = rng.sample(sorted(WRONG), rng.randrange(3))
    fields += [(field, str(rng.choice(WRONG[field])).encode()) for field in chosen]
    rng.shuffle(fields)
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="a.png"' if name == "image" else b"", value)
        for name, value in fields
    )
    return body + b"--x--\r\n" * rng.randrange(2)


async def post_all(
    bodies: list[tuple[bytes, dict[str, str]]], path: str = PATH
) -> list[httpx2.Response]:
    engine = FakeEngine()
    app = build_app(engine, ServeOptions(max_waiting=10_000))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        return [await client.post(path, content=body, headers=headers) for body, headers in bodies]


def assert_refused(response: httpx2.Response, body: bytes) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, body[:300])
    error = ErrorAnswer.model_validate_json(response.content).error
    assert error.type == "invalid_request_error"
    assert 0 < len(error.message) < 500


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_malformed_bodies(body: bytes) -> None:
    (response,) = asyncio.run(post_all([(body, {})]))
    assert_refused(response, body)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_blamed_on_its_field(field: str, value: object) -> None:
    body = json.dumps({"prompt": "x", field: value}).encode()
    (response,) = asyncio.run(post_all([(body, {})]))
    assert_refused(response, body)
    said = {"steps": "num_inference_steps", "width": "height"}
    assert response.json()["error"]["param"] in (field, said.get(field), "size")


def test_1000_malformed_bodies() -> None:
    rng = random.Random(20261122)
    bodies = [(rng.choice(MAKERS)(rng), rng.choice(ODD_HEADERS)) for _ in range(1000)]
    for (body, _), response in zip(bodies, asyncio.run(post_all(bodies)), strict=True):
        assert_refused(response, body)


def test_1000_malformed_edits() -> None:
    rng = random.Random(20261122)
    form = {"content-type": "multipart/form-data; boundary=x"}
    bodies = [
        (wrong_form(rng), form)
        if rng.random() < 0.5
        else (rng.choice(MAKERS)(rng), rng.choice([form, *ODD_HEADERS]))
        for _ in range(1000)
    ]
    for (body, _), response in zip(bodies, asyncio.run(post_all(bodies, EDITS)), strict=True):
        assert_refused(response, body)
