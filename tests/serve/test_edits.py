"""Pictures that start from an uploaded one: by OpenAI's client, by forms and by JSON."""

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from fake_engine import FakeEngine
from live_server import Live, live
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.serve import ServeOptions, build_app

PATH = "/v1/images/edits"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Live]:
    with live(build_app(engine, ServeOptions(max_upload_bytes=300_000))) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client


def file_of(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(name: str = "red", size: tuple[int, int] = (64, 32), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, name)


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def hole(size: tuple[int, int] = (64, 32)) -> Image.Image:
    """A mask that is transparent in its left half."""
    mask = Image.new("RGBA", size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def drawn_from(engine: FakeEngine) -> np.ndarray:
    source = engine.requests[-1].source
    assert source is not None
    return source


def test_openais_client_edits_a_file(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    answer = sdk.images.edit(
        model="gpt-image-1",
        image=io.BytesIO(file_of(colour())),
        prompt="in blue",
        n=2,
        size="64x32",  # type: ignore[arg-type]
        extra_body={"seed": 5, "num_inference_steps": 4, "strength": 0.5},
    )
    assert [data.seed for data in answer.data or []] == [5, 6]  # type: ignore[attr-defined]
    facts = answer.zimage_fp8  # type: ignore[attr-defined]
    assert (facts["steps"], facts["nfe"], facts["strength"]) == (4, 4, 0.5)
    assert len(facts["sigmas"]) == 3
    assert (drawn_from(engine) == (255, 0, 0)).all()
    assert engine.requests[-1].mask is None


def test_openais_client_sends_raw_bytes_and_lists(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    for image in (file_of(colour()), [("a.png", file_of(colour()), "text/plain")]):
        assert sdk.images.edit(image=image, prompt="x").data  # type: ignore[arg-type]
        assert (engine.requests[-1].strength, engine.requests[-1].steps) == (0.6, 8)


def test_openais_client_streams_edits(sdk: openai.OpenAI) -> None:
    events = sdk.images.edit(
        image=file_of(colour()), prompt="x", stream=True, partial_images=1, n=1
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_openais_async_client_edits(server: Live) -> None:
    async def edit() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            answer = await client.images.edit(image=file_of(colour()), prompt="x")
            return len(answer.data or [])

    assert asyncio.run(edit()) == 1


def test_a_mask_says_where(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    answer = sdk.images.edit(image=file_of(colour()), mask=file_of(hole()), prompt="x")
    request = engine.requests[-1]
    assert request.mask is not None
    assert request.mask[:, :32].all()
    assert not request.mask[:, 32:].any()
    assert request.strength == 1.0
    assert answer.warnings == []  # type: ignore[attr-defined]


def test_two_pictures_raise_bad_request(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="edits one") as raised:
        sdk.images.edit(image=[file_of(colour()), file_of(colour())], prompt="x")
    assert (raised.value.param, raised.value.code) == ("image", "unsupported_parameter")


def test_a_picture_too_large_for_the_server(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        sdk.images.edit(image=b"\x89PNG" + bytes(400_000), prompt="x")
    assert raised.value.status_code == 413


def test_json_with_a_data_url(client: httpx2.Client, engine: FakeEngine) -> None:
    url = data_url(file_of(colour("lime")))
    for picture in ({"image": url}, {"image": [url]}, {"images": [{"image_url": url}]}):
        body = {"prompt": "x", "strength": 0.25, "guidance_scale": 0.0, **picture}
        answer = client.post(PATH, json=body).json()
        assert answer["size"] == "64x32"
        assert answer["zimage_fp8"]["strength"] == 0.25
        assert (drawn_from(engine) == (0, 255, 0)).all()
    masked = {"prompt": "x", "image": url, "mask": {"image_url": data_url(file_of(hole()))}}
    assert client.post(PATH, json=masked).status_code == 200
    assert engine.requests[-1].mask is not None


def test_raw_bytes_and_urls(client: httpx2.Client) -> None:
    body = {"prompt": "x", "image": data_url(file_of(colour()))}
    raw = client.post(PATH, json=body, headers={"accept": "image/webp"})
    assert raw.headers["content-type"] == "image/webp"
    (data,) = client.post(PATH, json={**body, "response_format": "url"}).json()["data"]
    assert client.get(data["url"]).status_code == 200


KINDS = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA", "L"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in KINDS for mode in KINDS[kind]])
def test_kinds_and_modes(client: httpx2.Client, engine: FakeEngine, kind: str, mode: str) -> None:
    file = file_of(colour("white").convert(mode), kind)
    body = {"prompt": "x", "image": data_url(file)}
    assert client.post(PATH, json=body).status_code == 200
    assert drawn_from(engine).min() >= 250


def test_16_bits_become_8(client: httpx2.Client, engine: FakeEngine) -> None:
    levels = np.full((32, 64), 0x8000, np.uint16)
    body = {"prompt": "x", "image": data_url(file_of(Image.fromarray(levels)))}
    assert client.post(PATH, json=body).status_code == 200
    assert abs(int(drawn_from(engine)[0, 0, 0]) - 128) <= 1


def test_transparency_becomes_paper(client: httpx2.Client, engine: FakeEngine) -> None:
    body = {"prompt": "x", "image": data_url(file_of(Image.new("RGBA", (64, 32))))}
    assert client.post(PATH, json=body).status_code == 200
    assert (drawn_from(engine) == 255).all()


def test_a_picture_is_turned_upright(client: httpx2.Client, engine: FakeEngine) -> None:
    picture = colour("black", (32, 64))
    picture.paste("white", (0, 0, 32, 32))  # upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    body = {"prompt": "x", "image": data_url(file_of(picture, "JPEG", exif=exif, quality=100))}
    assert client.post(PATH, json=body).json()["size"] == "64x32"
    source = drawn_from(engine)
    assert source[:, 40:].min() > 200
    assert source[:, :24].max() < 50


@pytest.mark.parametrize(
    ("found", "size", "drawn"),
    [
        ((64, 32), "auto", "64x32"),
        ((40, 40), "auto", "32x32"),  # halves are rounded to the even
        ((5, 5), "auto", "16x16"),
        ((640, 320), "auto", "64x32"),  # no more pixels than the model's own size
        ((100, 100), "auto", "48x48"),
        ((64, 32), "128x128", "128x128"),
    ],
)
def test_sizes(
    client: httpx2.Client, engine: FakeEngine, found: tuple[int, int], size: str, drawn: str
) -> None:
    body = {"prompt": "x", "size": size, "image": data_url(file_of(colour("red", found)))}
    answer = client.post(PATH, json=body).json()
    assert answer["size"] == drawn
    assert "x".join(map(str, drawn_from(engine).shape[1::-1])) == drawn


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def moving() -> bytes:
    frames = [colour("red"), colour("blue")]
    return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100)


GOOD = data_url(file_of(colour()))
BAD_BODIES: dict[str, tuple[dict[str, object], str]] = {
    "no picture": ({}, "image"),
    "an empty list": ({"image": []}, "image"),
    "two pictures": ({"image": [GOOD, GOOD]}, "image"),
    "a picture in both places": ({"image": GOOD, "images": [{"image_url": GOOD}]}, "image"),
    "a web address": ({"image": "https://example.com/a.png"}, "image"),
    "a file address": ({"image": "file:///etc/passwd"}, "image"),
    "a path": ({"image": "/etc/passwd"}, "image"),
    "a web address as the mask": ({"image": GOOD, "mask": "http://127.0.0.1:1/"}, "mask"),
    "a file id": ({"images": [{"file_id": "f"}]}, "images.0.image_url"),
    "damaged base64": ({"image": "data:image/png;base64,!!!"}, "image"),
    "no base64": ({"image": "data:image/svg+xml,<svg/>"}, "image"),
    "a text": ({"image": data_url(b"hello")}, "image"),
    "nothing": ({"image": data_url(b"")}, "image"),
    "half a picture": ({"image": data_url(file_of(colour())[:60])}, "image"),
    "a gif": ({"image": data_url(file_of(colour(), "GIF"))}, "image"),
    "a bomb": ({"image": data_url(bomb())}, "image"),
    "a film": ({"image": data_url(moving())}, "image"),
    "a mask of another size": (
        {"image": GOOD, "mask": data_url(file_of(hole((32, 32))))},
        "mask",
    ),
    "an opaque mask": ({"image": GOOD, "mask": GOOD}, "mask"),
    "a mask without holes": (
        {"image": GOOD, "mask": data_url(file_of(colour("red", mode="RGBA")))},
        "mask",
    ),
    "no strength": ({"image": GOOD, "strength": 0}, "strength"),
    "too much strength": ({"image": GOOD, "strength": 1.5}, "strength"),
    "strength is a word": ({"image": GOOD, "strength": "weak"}, "strength"),
    "a huge size": ({"image": GOOD, "size": "99999x99999"}, "size"),
    "a size between": ({"image": GOOD, "size": "65x32"}, "size"),
    "markup": ({"image": GOOD, "markup": GOOD}, "markup"),
    "no prompt": ({"image": GOOD, "prompt": None}, "prompt"),
    "too many steps": ({"image": GOOD, "steps": 201}, "num_inference_steps"),
}


@pytest.mark.parametrize(("body", "param"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_bodies(client: httpx2.Client, body: dict[str, object], param: str) -> None:
    response = client.post(PATH, json={"prompt": "x", **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert 0 < len(error["message"]) < 300


BAD_FORMS: dict[str, tuple[dict[str, str], list[tuple[str, bytes]], str | None]] = {
    "no picture": ({"prompt": "x"}, [("other", b"x")], "other"),
    "the picture as text": ({"prompt": "x", "image": "cat.png"}, [], "image"),
    "no prompt": ({"n": "1"}, [("image", b"x")], "prompt"),
    "an empty prompt": ({"prompt": ""}, [("image", b"x")], "prompt"),
    "n is a word": ({"prompt": "x", "n": "many"}, [("image", b"x")], "n"),
    "two masks": ({"prompt": "x"}, [("image", b"x"), ("mask", b"x"), ("mask", b"x")], "mask"),
    "no picture in the file": ({"prompt": "x"}, [("image", b"x")], "image"),
}


@pytest.mark.parametrize(("fields", "files", "param"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_bad_forms(
    client: httpx2.Client,
    fields: dict[str, str],
    files: list[tuple[str, bytes]],
    param: str | None,
) -> None:
    parts = [(name, ("a.png", file, "image/png")) for name, file in files]
    parts += [(name, (None, text)) for name, text in fields.items()]  # type: ignore[misc]
    response = client.post(PATH, files=parts)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno headers\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x; charset=klingon",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n',
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n',
        ),
        (
            "multipart/form-data; boundary=x",
            b"".join(
                b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n' % number
                for number in range(500)
            )
            + b"--x--\r\n",
        ),
        ("text/plain", b"x"),
        ("application/x-www-form-urlencoded", b"prompt=x"),
    ],
)
def test_forms_that_are_none(client: httpx2.Client, content_type: str, body: bytes) -> None:
    response = client.post(PATH, content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_told_before_the_upload() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with (
        live(build_app(engine, ServeOptions(max_waiting=1))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        url = f"{server.url}/v1/images/generations"
        with httpx2.Client(trust_env=False) as waiting:
            with waiting.stream("POST", url, json={"prompt": "x", "n": 2, "stream": True}):
                with pytest.raises(openai.RateLimitError) as raised:
                    client.images.edit(image=file_of(colour()), prompt="x")
        engine.gate.set()
    assert raised.value.code == "queue_full"


def test_a_real_model_edits(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), device="cpu")
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    file = file_of(Image.fromarray(noise))
    mask = hole((64, 48))
    with (
        live(build_app(pipeline)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
    ):
        answer = client.images.edit(
            image=file, mask=file_of(mask), prompt="x", extra_body={"seed": 1, "strength": 0.5}
        )
    assert answer.data
    png = base64.b64decode(str(answer.data[0].b64_json))
    drawn = np.asarray(Image.open(io.BytesIO(png)))
    assert np.array_equal(drawn[:, 32:], noise[:, 32:])
    assert (drawn[:, :24] != noise[:, :24]).mean() > 0.5
    assert answer.zimage_fp8["nfe"] == 4  # type: ignore[attr-defined]
