"""The forms in which a picture travels: formats, raw bytes, URLs, and the names users bring."""

import base64
import io
from collections.abc import Iterator

import httpx2
import pytest
from PIL import Image
from starlette.datastructures import URL, Headers

from fake_engine import FakeEngine
from live_server import live
from zimage_fp8.serve import ServeOptions, build_app
from zimage_fp8.serve.shelf import Shelf, public_base

PATH = "/v1/images/generations"
FORMATS = ("png", "webp", "jpeg")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with live(build_app(FakeEngine())) as server:
        with httpx2.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            yield client


@pytest.mark.parametrize("output_format", FORMATS)
def test_formats(client: httpx2.Client, output_format: str) -> None:
    body = {"prompt": "x", "output_format": output_format, "seed": 100}
    answer = client.post(PATH, json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (picture.format, picture.size) == (output_format.upper(), (64, 32))
    assert abs(picture.convert("L").getpixel((5, 5)) - 100) <= 2
    assert answer["output_format"] == output_format


def test_compression_is_quality(client: httpx2.Client) -> None:
    body = {"prompt": "x", "output_format": "jpeg", "size": "256x256"}
    coarse = client.post(PATH, json={**body, "output_compression": 0}).json()
    fine = client.post(PATH, json={**body, "output_compression": 100}).json()
    tables = [
        Image.open(io.BytesIO(base64.b64decode(it["data"][0]["b64_json"]))).quantization[0]
        for it in (coarse, fine)
    ]
    assert min(tables[0]) > max(tables[1])
    (warning,) = client.post(PATH, json={"prompt": "x", "output_compression": 5}).json()["warnings"]
    assert warning.startswith("output_compression has no effect")


@pytest.mark.parametrize("output_format", FORMATS)
def test_raw_bytes_for_those_who_accept_only_pictures(
    client: httpx2.Client, output_format: str
) -> None:
    headers = {"accept": f"image/{output_format}"}
    body = {"prompt": "x", "seed": 7, "style": "vivid"}
    response = client.post(PATH, json=body, headers=headers)
    assert response.headers["content-type"] == f"image/{output_format}"
    assert Image.open(io.BytesIO(response.content)).format == output_format.upper()
    assert response.headers["x-seed"] == "7"
    assert "denoise;dur=500.0" in response.headers["server-timing"]
    assert "style" in response.headers["x-warnings"]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("image/png, application/json", "application/json"),
        ("application/json;q=0.5, image/webp", "image/webp"),
        ("image/webp;q=0.2, image/jpeg;q=0.9", "image/jpeg"),
        ("image/avif, */*;q=0.8", "application/json"),
        ("image/png;q=x", "application/json"),
    ],
)
def test_accept_chooses(client: httpx2.Client, accept: str, content_type: str) -> None:
    response = client.post(PATH, json={"prompt": "x"}, headers={"accept": accept})
    assert response.headers["content-type"] == content_type


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
    ],
)
def test_raw_bytes_have_no_room_for_more(
    client: httpx2.Client, change: dict[str, object], param: str
) -> None:
    response = client.post(PATH, json={"prompt": "x", **change}, headers={"accept": "image/png"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_url_leads_to_the_picture(client: httpx2.Client) -> None:
    body = {"prompt": "x", "response_format": "url", "n": 2, "output_format": "webp"}
    data = client.post(PATH, json=body).json()["data"]
    assert len({it["url"] for it in data}) == 2
    for picture in data:
        assert "b64_json" not in picture
        response = client.get(picture["url"])
        assert response.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(response.content)).size == (64, 32)


def test_a_url_names_the_host_that_the_client_sees(client: httpx2.Client) -> None:
    headers = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example"}
    body = {"prompt": "x", "response_format": "url"}
    (data,) = client.post(PATH, json=body, headers=headers).json()["data"]
    assert data["url"].startswith("https://pictures.example/v1/pictures/")


def test_a_proxy_may_add_a_prefix() -> None:
    headers = Headers({"x-forwarded-host": "a.example, b.example", "x-forwarded-prefix": "/draw/"})
    assert public_base(URL("http://127.0.0.1:8000/v1"), headers) == "http://a.example/draw"
    assert public_base(URL("http://127.0.0.1:8000/v1"), Headers()) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("name", ["none.png", "..%2F..%2Fetc%2Fpasswd", "%00"])
def test_other_names_lead_nowhere(client: httpx2.Client, name: str) -> None:
    response = client.get(f"/v1/pictures/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_a_shelf_forgets() -> None:
    now = 0.0
    shelf = Shelf(lifetime_s=10, max_bytes=100, clock=lambda: now)
    first, second = shelf.put(b"a" * 60, "png"), shelf.put(b"b" * 60, "png")
    assert shelf.get(first) is None  # no room for both
    assert shelf.get(second) == b"b" * 60
    now = 10.0
    assert shelf.get(second) is None


@pytest.mark.parametrize(
    ("alias", "steps", "guidance", "size"),
    [
        ({"steps": 3}, 3, 0.0, "64x32"),
        ({"cfg_scale": 1}, 8, 0.0, "64x32"),
        ({"cfg_scale": 0}, 8, 0.0, "64x32"),
        ({"cfg_scale": 2.5}, 8, 1.5, "64x32"),
        ({"true_cfg_scale": 4.0}, 8, 3.0, "64x32"),
        ({"width": 48, "height": 80}, 8, 0.0, "48x80"),
        ({"quality": "low"}, 4, 0.0, "64x32"),
        ({"quality": "standard"}, 8, 0.0, "64x32"),
        ({"quality": "low", "steps": 9}, 9, 0.0, "64x32"),
    ],
)
def test_names_that_users_bring(
    client: httpx2.Client, alias: dict[str, object], steps: int, guidance: float, size: str
) -> None:
    answer = client.post(PATH, json={"prompt": "x", **alias}).json()
    run = answer["zimage_fp8"]
    assert (run["steps"], run["guidance"], answer["size"]) == (steps, guidance, size)
    assert len(answer["warnings"]) == ("quality" in alias and "steps" in alias)


def test_the_list_of_warnings_is_bounded() -> None:
    body = {"prompt": "x", **{f"{number}{'y' * 500}": 1 for number in range(500)}}
    with live(build_app(FakeEngine(), ServeOptions())) as server:
        answer = httpx2.post(f"{server.url}{PATH}", json=body, trust_env=False).json()
    assert len(answer["warnings"]) == 21
    assert answer["warnings"][-1] == "480 more fields were ignored"
    assert max(map(len, answer["warnings"])) < 100
