"""The server over real sockets, with an engine that can be held between steps."""

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from PIL import Image

from fake_engine import FakeEngine
from live_server import Live, live, wait_until
from zimage_fp8.errors import OutOfMemory
from zimage_fp8.model.drawing import Drawing
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve import ServeOptions, build_app

PATH = "/v1/images/generations"
CARD_BODY = {
    "model": "somebody/Z-Image-Turbo-FP8-full",
    "prompt": "a cinematic photograph of an old fisherman standing on a foggy pier at sunrise",
    "size": "1024x512",
    "num_inference_steps": 8,
    "guidance_scale": 0.0,
    "n": 1,
    "response_format": "b64_json",
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    """For tests that leave the server as it was."""
    with live(build_app(FakeEngine())) as server, connect(server) as client:
        yield client


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Live]:
    """A server of the test's own, around the `engine` that it holds, fails or counts."""
    with live(build_app(engine)) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def own_client(server: Live) -> Iterator[httpx2.Client]:
    with connect(server) as client:
        yield client


def connect(server: Live) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=30, trust_env=False)


def picture_of(data: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def test_the_cards_curl_line_is_answered(client: httpx2.Client) -> None:
    response = client.post(PATH, json=CARD_BODY)
    assert response.status_code == 200
    answer = response.json()
    assert picture_of(answer["data"][0]).size == (1024, 512)
    assert (answer["size"], answer["output_format"], answer["warnings"]) == ("1024x512", "png", [])
    usage = answer["usage"]
    assert usage["output_tokens"] == 1024 * 512 // 256
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert abs(answer["created"] - time.time()) < 60


def test_the_answer_says_what_was_done(client: httpx2.Client) -> None:
    facts = client.post(PATH, json={"prompt": "x", "num_inference_steps": 2}).json()["zimage_fp8"]
    assert (facts["policy"], facts["steps"], facts["nfe"]) == ("bf16_base", 2, 2)
    assert facts["sigmas"] == [1.0, 0.5, 0.0]
    assert set(facts["timings_s"]) == {"queue", "encode", "denoise", "decode", "picture"}
    assert facts["timings_s"]["denoise"] == 0.5
    assert facts["peak_memory_bytes"]["process_rss"] > 10**7
    assert facts["server"]["model"] == "fake"


def test_turbo_defaults(client: httpx2.Client) -> None:
    facts = client.post(PATH, json={"prompt": "x"}).json()
    assert (facts["zimage_fp8"]["steps"], facts["zimage_fp8"]["guidance"]) == (8, 0.0)
    assert facts["size"] == "64x32"


def test_n_pictures_take_consecutive_seeds(client: httpx2.Client) -> None:
    answer = client.post(PATH, json={"prompt": "x", "n": 3, "seed": 40}).json()
    assert [data["seed"] for data in answer["data"]] == [40, 41, 42]
    assert [picture_of(data).getpixel((0, 0))[0] for data in answer["data"]] == [40, 41, 42]
    assert answer["zimage_fp8"]["nfe"] == 24


def test_a_seed_is_chosen_and_told(client: httpx2.Client) -> None:
    seeds = {client.post(PATH, json={"prompt": "x"}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_null_means_absent(client: httpx2.Client) -> None:
    nulls = dict.fromkeys(["n", "size", "seed", "model", "quality", "stream", "response_format"])
    assert client.post(PATH, json={"prompt": "x", **nulls}).status_code == 200


def test_what_is_not_honoured_is_listed(client: httpx2.Client) -> None:
    body = {"prompt": "x", "quality": "high", "style": "vivid", "background": "auto", "user": "me"}
    answer = client.post(PATH, json={**body, "safety_identifier": "u1"}).json()
    assert answer["warnings"] == ["style is not supported and was ignored"]
    assert (answer["quality"], answer["safety_identifier"]) == ("high", "u1")
    assert answer["zimage_fp8"]["steps"] == 12  # quality is honoured


def test_a_negative_prompt_without_guidance_is_called_useless(client: httpx2.Client) -> None:
    body = {"prompt": "x", "negative_prompt": "blurry"}
    (warning,) = client.post(PATH, json=body).json()["warnings"]
    assert warning.startswith("negative_prompt has no effect")
    assert not client.post(PATH, json={**body, "guidance_scale": 1.0}).json()["warnings"]


BAD_BODIES: dict[str, tuple[object, str | None]] = {
    "no prompt": ({}, "prompt"),
    "null prompt": ({"prompt": None}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": " "}, "prompt"),
    "prompt is a number": ({"prompt": 3}, "prompt"),
    "not an object": (["prompt"], None),
    "n too small": ({"prompt": "x", "n": 0}, "n"),
    "n too large": ({"prompt": "x", "n": 11}, "n"),
    "n is a word": ({"prompt": "x", "n": "many"}, "n"),
    "size without cross": ({"prompt": "x", "size": "512"}, "size"),
    "size of words": ({"prompt": "x", "size": "bigxsmall"}, "size"),
    "negative size": ({"prompt": "x", "size": "-16x16"}, "size"),
    "size not drawable": ({"prompt": "x", "size": "100x100"}, "size"),
    "negative seed": ({"prompt": "x", "seed": -1}, "seed"),
    "huge seed": ({"prompt": "x", "seed": 2**60}, "seed"),
    "no steps": ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
    "steps is a word": ({"prompt": "x", "num_inference_steps": "few"}, "num_inference_steps"),
    "file asked for": ({"prompt": "x", "response_format": "file"}, "response_format"),
    "url in a stream": (
        {"prompt": "x", "response_format": "url", "stream": True},
        "response_format",
    ),
    "gif asked for": ({"prompt": "x", "output_format": "gif"}, "output_format"),
    "stream is a word": ({"prompt": "x", "stream": "often"}, "stream"),
    "too many previews": ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images"),
    "unknown quality": ({"prompt": "x", "quality": "best"}, "quality"),
    "compression above 100": ({"prompt": "x", "output_compression": 101}, "output_compression"),
    "vector graphics": ({"prompt": "x", "svg": {"model": "m"}}, "svg"),
    "width without height": ({"prompt": "x", "width": 64}, "height"),
    "two sizes": ({"prompt": "x", "width": 64, "height": 64, "size": "32x32"}, "width"),
    "two step counts": (
        {"prompt": "x", "steps": 4, "num_inference_steps": 8},
        "num_inference_steps",
    ),
    "two guidances": ({"prompt": "x", "cfg_scale": 2, "guidance_scale": 2}, "cfg_scale"),
    "half a cfg scale": ({"prompt": "x", "cfg_scale": 0.5}, "cfg_scale"),
    "more steps than allowed": ({"prompt": "x", "steps": 201}, "num_inference_steps"),
    "more pixels than allowed": ({"prompt": "x", "size": "4096x2048"}, "size"),
    "transparency": ({"prompt": "x", "background": "transparent"}, "background"),
}


@pytest.mark.parametrize(("body", "param"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_bodies_get_openais_envelope(
    client: httpx2.Client, body: object, param: str | None
) -> None:
    response = client.post(PATH, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"prompt": "x", "guidance_scale": NaN}', b"\xff"])
def test_bodies_that_are_no_json(client: httpx2.Client, content: bytes) -> None:
    response = client.post(PATH, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/unknown", 404), ("GET", PATH, 405), ("GET", "/v1/models/x/y", 404)],
)
def test_unknown_routes_answer_in_json(
    client: httpx2.Client, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_models(client: httpx2.Client) -> None:
    listed = client.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", ["fake"])
    assert client.get("/v1/models/fake").json() == listed["data"][0]
    assert client.get("/v1/models/other").json()["error"]["code"] == "not_found"


def test_a_model_name_may_hold_a_slash() -> None:
    with live(build_app({"me/model": FakeEngine()})) as server:
        response = httpx2.get(f"{server.url}/v1/models/me/model", trust_env=False)
    assert response.json()["id"] == "me/model"


def test_health_and_version(client: httpx2.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json()["policy"] == "bf16_base"


def test_every_answer_carries_an_id_and_a_duration(client: httpx2.Client) -> None:
    for response in (client.get("/health"), client.get("/nowhere"), client.post(PATH, json={})):
        assert response.headers["x-request-id"]
        assert int(response.headers["openai-processing-ms"]) >= 0
    own = client.get("/health", headers={"x-request-id": "mine"})
    assert own.headers["x-request-id"] == "mine"


def test_a_crash_is_an_answer_without_a_stack_trace(
    own_client: httpx2.Client, engine: FakeEngine
) -> None:
    engine.failure = RuntimeError("secret details")
    response = own_client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    engine.failure = None
    assert own_client.post(PATH, json={"prompt": "x"}).status_code == 200


def test_what_can_never_fit_is_not_worth_a_retry(
    own_client: httpx2.Client, engine: FakeEngine
) -> None:
    engine.failure = OutOfMemory("64x32 does not fit", hint="try 32x16")
    response = own_client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "out_of_memory"
    assert "32x16" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"


def test_a_field_of_openais_that_we_lack_has_its_own_code(client: httpx2.Client) -> None:
    error = client.post(PATH, json={"prompt": "x", "frame_count": 2}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "frame_count")


def test_metadata_can_be_left_out(engine: FakeEngine) -> None:
    for embed in (True, False):
        with live(build_app(engine, ServeOptions(embed_metadata=embed))) as server:
            answer = httpx2.post(f"{server.url}{PATH}", json={"prompt": "x"}, trust_env=False)
        assert ("parameters" in picture_of(answer.json()["data"][0]).info) is embed


def test_a_full_queue_turns_newcomers_away(engine: FakeEngine) -> None:
    with live(build_app(engine, ServeOptions(max_waiting=0))) as server:
        refused = httpx2.post(f"{server.url}{PATH}", json={"prompt": "x"}, trust_env=False)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_the_event_loop_is_free_while_a_picture_is_drawn(
    own_client: httpx2.Client, engine: FakeEngine
) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(own_client.post, PATH, json={"prompt": "x"})
        assert engine.started.acquire(timeout=10)
        assert own_client.get("/health").status_code == 200
        assert not drawing.done()
        engine.gate.set()
        assert drawing.result(10).status_code == 200


def test_a_client_that_leaves_stops_its_picture_at_the_next_step(
    own_client: httpx2.Client, server: Live, engine: FakeEngine
) -> None:
    engine.step_s = 0.02
    connection = send_and_keep(server, {"prompt": "x", "num_inference_steps": 100, "n": 2})
    assert engine.started.acquire(timeout=10)
    connection.close()
    assert own_client.post(PATH, json={"prompt": "x", "num_inference_steps": 1}).status_code == 200
    assert engine.steps_run < 100


def send_and_keep(server: Live, body: dict[str, object]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


class FailsAtFirst(FakeEngine):
    """The first picture fails, and the second waits at the gate."""

    has_failed = False

    def begin(self, request: ImageRequest) -> Drawing:
        if not self.has_failed:
            self.has_failed = True
            self.gate.clear()
            raise MemoryError
        return super().begin(request)


def test_when_one_of_n_pictures_fails_the_others_are_not_drawn() -> None:
    engine = FailsAtFirst()
    with live(build_app(engine)) as server, connect(server) as client:
        assert client.post(PATH, json={"prompt": "x", "n": 5}).status_code == 500
        engine.gate.set()
        assert client.post(PATH, json={"prompt": "x"}).status_code == 200
    assert engine.steps_run <= 1 + 8


def test_pictures_that_shared_forwards_say_so(engine: FakeEngine) -> None:
    with live(build_app(engine, ServeOptions(max_batch=4))) as server, connect(server) as client:
        together = client.post(PATH, json={"prompt": "x", "n": 3}).json()
        alone = client.post(PATH, json={"prompt": "x"}).json()
        metrics = client.get("/metrics").text
    assert engine.companies == [3] * 8 + [1] * 8
    assert (together["zimage_fp8"]["batch"], alone["zimage_fp8"]["batch"]) == (3, 1)
    assert together["zimage_fp8"]["nfe"] == 24
    assert 'zimage_fp8_batch_size_bucket{le="2.0"} 1.0' in metrics
    assert "zimage_fp8_batch_size_count 4.0" in metrics


def test_shutdown_finishes_what_was_begun_and_refuses_what_was_queued(engine: FakeEngine) -> None:
    engine.gate.clear()

    def post(n: int) -> httpx2.Response:
        body = {"prompt": "x", "n": n}
        return httpx2.post(f"{server.url}{PATH}", json=body, timeout=30, trust_env=False)

    with live(build_app(engine)) as server, ThreadPoolExecutor() as pool:
        begun = pool.submit(post, 2)
        assert engine.started.acquire(timeout=10)
        queued = pool.submit(post, 1)
        metrics = f"{server.url}/metrics"
        wait_until(lambda: "queue_depth 2.0" in httpx2.get(metrics, trust_env=False).text)
        server.begin_stop()
        refused = queued.result(20)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        engine.gate.set()
        assert len(begun.result(20).json()["data"]) == 2
