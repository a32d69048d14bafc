"""Who is let in, and how much they may send."""

from collections.abc import Iterator

import httpx2
import pytest

from fake_engine import FakeEngine
from live_server import live
from zimage_fp8.serve import ServeOptions, build_app

PATH = "/v1/images/generations"
PAGE = "https://page.example"


def serving(**options: object) -> Iterator[httpx2.Client]:
    with live(build_app(FakeEngine(), ServeOptions(**options))) as server:  # type: ignore[arg-type]
        with httpx2.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            yield client


@pytest.fixture(scope="module")
def locked() -> Iterator[httpx2.Client]:
    yield from serving(api_keys=["first", "second"], max_body_bytes=1000)


@pytest.fixture(scope="module")
def shared() -> Iterator[httpx2.Client]:
    yield from serving(cors_origins=[PAGE])


@pytest.fixture(scope="module")
def usual() -> Iterator[httpx2.Client]:
    yield from serving()


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_key_opens(locked: httpx2.Client, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert locked.post(PATH, json={"prompt": "x"}, headers=headers).status_code == 200
    assert locked.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer third", "Bearer firs", "Basic first", "first"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/docs", "/nowhere"])
def test_nothing_else_opens(locked: httpx2.Client, path: str, header: str | None) -> None:
    response = locked.get(path, headers={"authorization": header} if header else {})
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(locked: httpx2.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_the_name_of_a_picture_is_its_key(locked: httpx2.Client) -> None:
    body = {"prompt": "x", "response_format": "url"}
    answer = locked.post(PATH, json=body, headers={"authorization": "Bearer first"}).json()
    assert locked.get(answer["data"][0]["url"]).status_code == 200
    assert locked.get("/v1/pictures/guess.png").status_code == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(locked: httpx2.Client, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    content = iter([body[:500], body[500:]]) if chunked else body
    response = locked.post(PATH, content=content, headers={"authorization": "Bearer first"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "content_too_large"
    assert "1000 bytes" in response.json()["error"]["message"]


def test_pages_of_other_sites_are_kept_out(usual: httpx2.Client) -> None:
    headers = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    refused = usual.post(PATH, json={"prompt": "x"}, headers=headers)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "foreign_origin"
    assert "access-control-allow-origin" not in usual.get("/v1/models", headers=headers).headers
    own = {"sec-fetch-site": "same-origin"}
    assert usual.post(PATH, json={"prompt": "x"}, headers=own).status_code == 200


def test_an_allowed_page_is_let_in(shared: httpx2.Client) -> None:
    headers = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    preflight = shared.options(PATH, headers={**headers, **asked})
    assert preflight.headers["access-control-allow-origin"] == PAGE
    response = shared.post(PATH, json={"prompt": "x"}, headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    other = {**headers, "origin": "https://other.example"}
    assert shared.post(PATH, json={"prompt": "x"}, headers=other).status_code == 403
