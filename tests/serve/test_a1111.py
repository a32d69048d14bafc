"""AUTOMATIC1111's API: the bodies that its clients really send, and its Python client itself."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from fake_engine import FakeEngine
from live_server import Live, live, wait_until
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve import ServeOptions, build_app

# SillyTavern's image extension, all of its switches off.
SILLYTAVERN = {
    "prompt": "a fox", "negative_prompt": "", "sampler_name": "Euler", "scheduler": "Automatic",
    "steps": 8, "cfg_scale": 1, "width": 64, "height": 32, "restore_faces": False,
    "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
    "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": "5",
    "override_settings": {"CLIP_stop_at_last_layers": 1}, "clip_skip": 1,
    "override_settings_restore_afterwards": True, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
    "url": "http://127.0.0.1:7860", "auth": "",
}  # fmt: skip

# Open WebUI, with what its administrator may add.
OPEN_WEBUI = {
    "prompt": "a fox", "batch_size": 2, "width": 64, "height": 32, "steps": 8,
    "negative_prompt": "fog", "cfg_scale": 1.0, "sampler_name": "Euler", "scheduler": "Automatic",
    "seed": 5,
}  # fmt: skip

# Web pages that fill in the whole form of the API's documentation.
EVERYTHING = {
    "enable_hr": False, "denoising_strength": 0, "firstphase_width": 0, "firstphase_height": 0,
    "hr_scale": 2, "hr_upscaler": "", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "hr_sampler_name": "", "hr_prompt": "", "hr_negative_prompt": "",
    "prompt": "a fox", "styles": [""], "seed": 5, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": "", "batch_size": 1,
    "n_iter": 1, "steps": 8, "cfg_scale": 1, "width": 64, "height": 32, "restore_faces": False,
    "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False,
    "negative_prompt": "", "eta": 0, "s_min_uncond": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0,
    "s_noise": 1, "override_settings": {"sd_model_checkpoint": "bf16_base"},
    "override_settings_restore_afterwards": True, "refiner_checkpoint": "", "refiner_switch_at": 0,
    "disable_extra_networks": False, "firstpass_image": "", "comments": {}, "script_args": [],
    "sampler_index": "Euler", "script_name": "", "send_images": True, "save_images": False,
    "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []},
                         "controlnet": {"args": [{"enabled": False}, {"enabled": False}]}},
    "infotext": None,
}  # fmt: skip
FOX = ImageRequest("a fox", 64, 32, steps=8, guidance=0.0, seed=5)


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {name: FakeEngine(name) for name in ("bf16_base", "online_fp8")}


@pytest.fixture
def server(engines: dict[str, FakeEngine]) -> Iterator[Live]:
    with live(build_app(engines, ServeOptions(a1111=True, max_steps=50))) as server:
        yield server
        for engine in engines.values():
            engine.gate.set()


@pytest.fixture
def client(server: Live) -> Iterator[httpx2.Client]:
    base_url = f"{server.url}/sdapi/v1"
    with httpx2.Client(base_url=base_url, timeout=30, trust_env=False) as client:
        yield client


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def post(client: httpx2.Client, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """The answer and its `info`."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert set(answer) == {"images", "parameters", "info"}
    return answer, json.loads(answer["info"])


# What clients send


@pytest.mark.parametrize("body", [SILLYTAVERN, EVERYTHING], ids=["sillytavern", "everything"])
def test_a_clients_body_is_drawn(
    client: httpx2.Client, engines: dict[str, FakeEngine], body: dict[str, Any]
) -> None:
    answer, info = post(client, "/txt2img", body)
    assert engines["bf16_base"].requests == [FOX]
    (image,) = answer["images"]
    assert pixels(image).shape == (32, 64, 3)
    assert answer["parameters"]["steps"] == 8
    assert (info["seed"], info["all_seeds"], info["cfg_scale"], info["steps"]) == (5, [5], 1, 8)
    assert (info["width"], info["height"], info["sd_model_name"]) == (64, 32, "bf16_base")
    assert (
        info["infotexts"][0].splitlines()[-1].startswith("Steps: 8, Sampler: Euler, CFG scale: 1")
    )


def test_a_form_of_defaults_warns_of_nothing(client: httpx2.Client) -> None:
    assert post(client, "/txt2img", EVERYTHING)[1]["warnings"] == []


def test_open_webui_gets_its_pictures(
    client: httpx2.Client, engines: dict[str, FakeEngine]
) -> None:
    names = [model["model_name"] for model in client.get("/sd-models").json()]
    assert names == ["bf16_base", "online_fp8"]
    assert client.get("/options").json()["sd_model_checkpoint"] == "bf16_base"
    chosen = client.post("/options", json={"sd_model_checkpoint": "online_fp8"})
    assert (chosen.status_code, chosen.json()) == (200, None)
    assert client.get("/options").json()["sd_model_checkpoint"] == "online_fp8"
    answer, info = post(client, "/txt2img", OPEN_WEBUI)
    assert [request.seed for request in engines["online_fp8"].requests] == [5, 6]
    assert [pixels(image)[0, 0, 0] for image in answer["images"]] == [5, 6]
    assert info["warnings"] == ["negative_prompt has no effect at cfg_scale 1"]


def test_the_python_client(server: Live, engines: dict[str, FakeEngine]) -> None:
    """webuiapi, unmodified."""
    webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed")
    api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", sampler="Euler", steps=8)
    api.session.trust_env = False
    drawn = api.txt2img(prompt="a fox", seed=5, cfg_scale=1, width=64, height=32)
    assert drawn.image.size == (64, 32)
    assert (drawn.info["seed"], drawn.info["warnings"]) == (5, [])
    edited = api.img2img(
        images=[drawn.image], prompt="a fox", seed=9, cfg_scale=1, width=64, height=32,
        denoising_strength=0.5, mask_image=Image.new("L", (64, 32), 255),
    )  # fmt: skip
    assert edited.image.size == (64, 32)
    assert engines["bf16_base"].requests[-1].strength == 0.5
    assert api.util_get_model_names() == ["bf16_base", "online_fp8"]
    assert api.util_get_sampler_names() == ["Euler"]
    assert [each["name"] for each in api.get_schedulers()] == ["automatic"]
    api.util_set_model("online_fp8")
    assert api.util_get_current_model() == "online_fp8"
    api.util_wait_for_ready()
    for probe in (
        api.get_upscalers, api.get_latent_upscale_modes, api.get_loras, api.get_sd_vae,
        api.get_hypernetworks, api.get_face_restorers, api.get_embeddings, api.get_cmd_flags,
        api.get_prompt_styles, api.get_realesrgan_models, api.get_memory, api.get_scripts,
    ):  # fmt: skip
        probe()
    assert api.interrupt() == {}
    assert api.skip() == {}
    with pytest.raises(RuntimeError, match="50x32"):
        api.txt2img(prompt="a fox", width=50, height=32)


@pytest.mark.parametrize(
    ("sent", "drawn"),
    [
        ({"steps": None}, {"steps": 8}),
        ({"steps": 0}, {"steps": 8}),
        ({"steps": 20}, {"steps": 20}),
        ({"cfg_scale": None}, {"guidance": 0}),
        ({"cfg_scale": 0}, {"guidance": 0}),
        ({"cfg_scale": 1}, {"guidance": 0}),
        ({"cfg_scale": 3.5}, {"guidance": 2.5}),
        ({"width": None, "height": None}, {"width": 64, "height": 32}),
        ({"width": 48, "height": 80}, {"width": 48, "height": 80}),
    ],
)
def test_defaults_and_scales_are_translated(
    client: httpx2.Client,
    engines: dict[str, FakeEngine],
    sent: dict[str, object],
    drawn: dict[str, object],
) -> None:
    post(client, "/txt2img", {**EVERYTHING, **sent})
    request = engines["bf16_base"].requests[-1]
    assert {field: getattr(request, field) for field in drawn} == drawn


def test_a_negative_seed_is_another_each_time(client: httpx2.Client) -> None:
    seeds = {post(client, "/txt2img", {"prompt": "x", "seed": -1})[1]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_batches_count_together(client: httpx2.Client) -> None:
    body = {"prompt": "x", "batch_size": 2, "n_iter": 3, "seed": 7}
    answer, info = post(client, "/txt2img", body)
    assert len(answer["images"]) == 6
    assert info["all_seeds"] == [7, 8, 9, 10, 11, 12]
    assert info["batch_size"] == 2


def test_pictures_can_be_left_out(client: httpx2.Client) -> None:
    answer, info = post(client, "/txt2img", {"prompt": "x", "send_images": False})
    assert answer["images"] == []
    assert info["seed"] >= 0


# Starting from a picture


def test_a_picture_is_drawn_anew(client: httpx2.Client, engines: dict[str, FakeEngine]) -> None:
    start = png(Image.new("RGB", (64, 32), (9, 9, 9)))
    for image in (start, f"data:image/png;base64,{start}"):
        body = {**EVERYTHING, "init_images": [image], "denoising_strength": 0.5}
        answer, info = post(client, "/img2img", body)
        assert "init_images" not in answer["parameters"]
        assert info["denoising_strength"] == 0.5
        request = engines["bf16_base"].requests[-1]
        assert request == ImageRequest("a fox", 64, 32, steps=8, seed=5, strength=0.5)
        assert request.source is not None
        assert (request.source == 9).all()
        assert request.mask is None


@pytest.mark.parametrize("is_inverted", [False, True])
def test_a_mask_is_white_where_to_draw(
    client: httpx2.Client, engines: dict[str, FakeEngine], is_inverted: bool
) -> None:
    mask = Image.new("L", (32, 16))  # half the picture's size, which they allow
    mask.paste(255, (0, 0, 16, 16))
    body = {
        "prompt": "a fox", "init_images": [png(Image.new("RGB", (64, 32)))], "mask": png(mask),
        "inpainting_mask_invert": int(is_inverted), "inpainting_fill": 1, "mask_blur": 4,
    }  # fmt: skip
    _, info = post(client, "/img2img", body)
    found = engines["bf16_base"].requests[-1].mask
    assert found is not None
    assert (found[:, :30] != is_inverted).all()
    assert (found[:, 34:] == is_inverted).all()
    assert info["warnings"] == ["mask_blur is not supported and was ignored"]


# Warned of, refused


@pytest.mark.parametrize(
    ("sent", "warning"),
    [
        ({"sampler_name": "DPM++ 2M"}, "sampler 'DPM++ 2M' is not available: Euler draws"),
        ({"scheduler": "Karras"}, "scheduler 'Karras' is not available: the model has its own"),
        ({"cfg_scale": 7}, "cfg_scale is 7: this model is made for 1, and twice as fast there"),
        ({"tiling": True}, "tiling is not supported and was ignored"),
        ({"restore_faces": True}, "restore_faces is not supported and was ignored"),
        ({"styles": ["anime"]}, "styles is not supported and was ignored"),
        ({"subseed_strength": 0.5}, "subseed_strength is not supported and was ignored"),
        ({"prompt": "a <lora:x:1> fox"},
         "<lora:x:1> is read as words: there are no extra networks"),
        ({"prompt": "a (red:1.3) fox"}, "weights such as (word:1.2) are read as words"),
        ({"override_settings": {"sd_vae": "x"}},
         "override_settings.sd_vae is not supported and was ignored"),
        ({"override_settings": {"sd_model_checkpoint": "other"}},
         "model 'other' is not served here; 'bf16_base' drew the picture"),
    ],
)  # fmt: skip
def test_what_is_ignored_is_said(
    client: httpx2.Client, sent: dict[str, object], warning: str
) -> None:
    assert post(client, "/txt2img", {**EVERYTHING, **sent})[1]["warnings"] == [warning]


@pytest.mark.parametrize(
    ("path", "sent", "param", "said"),
    [
        ("txt2img", {"enable_hr": True}, "enable_hr", "final size"),
        ("txt2img", {"script_name": "X/Y/Z plot"}, "script_name", "not supported"),
        ("txt2img", {"refiner_checkpoint": "x"}, "refiner_checkpoint", "no refiner"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "x"}]}}},
         "alwayson_scripts", "ADetailer"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"enabled": True}]}}},
         "alwayson_scripts", "controlnet"),
        ("txt2img", {"steps": 51}, "steps", "at most 50"),
        ("txt2img", {"width": 50}, "width", "50x32"),
        ("txt2img", {"batch_size": 4, "n_iter": 4}, "batch_size", "16"),
        ("txt2img", {"cfg_scale": 0.5}, "cfg_scale", "0.5"),
        ("txt2img", {"prompt": ""}, "prompt", "prompt"),
        ("txt2img", {"seed": "x"}, "seed", "seed"),
        ("img2img", {}, "init_images", "0 pictures"),
        ("img2img", {"init_images": ["C:/picture.png"]}, "init_images", "init_images"),
        ("img2img", {"init_images": ["http://127.0.0.1/x.png"]}, "init_images", "init_images"),
        ("img2img", {"denoising_strength": 2}, "denoising_strength", "above 0 to 1"),
        ("img2img", {"denoising_strength": 0}, "denoising_strength", "above 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(
    client: httpx2.Client, path: str, sent: dict[str, object], param: str, said: str
) -> None:
    response = client.post(f"/{path}", json={**EVERYTHING, "denoising_strength": 0.5, **sent})
    assert response.status_code == 400
    answer = response.json()
    assert said in answer["detail"]
    assert answer["error"]["message"] == answer["errors"] == answer["detail"]
    assert answer["error"]["param"] == param


@pytest.mark.parametrize("body", [b"[]", b"{", b"null", b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("path", ["txt2img", "img2img", "options"])
def test_a_malformed_body_is_the_clients_mistake(
    client: httpx2.Client, path: str, body: bytes
) -> None:
    response = client.post(f"/{path}", content=body)
    assert response.status_code == 400
    assert response.json()["detail"]


ODD = (
    None,
    "",
    "x",
    "\x00",
    -1,
    10**30,
    1e300,
    True,
    [],
    [[]],
    [None],
    {},
    {"args": 5},
    {"x": [{}]},
)


@pytest.mark.parametrize("path", ["txt2img", "img2img"])
def test_no_odd_value_breaks_the_server(client: httpx2.Client, path: str) -> None:
    """Every field with values of every kind: a picture, or a 400 that says why."""
    usual = {**EVERYTHING, "denoising_strength": 0.5, "mask": None}
    usual |= {"init_images": [png(Image.new("RGB", (64, 32)))], "inpainting_mask_invert": 0}
    for field in usual:
        for value in ODD:
            response = client.post(f"/{path}", json={**usual, field: value})
            assert response.status_code in (200, 400), (field, value, response.text[:200])
            assert response.status_code == 200 or response.json()["detail"]


def test_an_unknown_model_cannot_be_chosen(client: httpx2.Client) -> None:
    response = client.post("/options", json={"sd_model_checkpoint": "../secret"})
    assert response.status_code == 400
    assert "only bf16_base, online_fp8" in response.json()["detail"]
    ignored = client.post("/options", json={"jpeg_quality": 80})
    assert "jpeg_quality" in ignored.headers["x-warnings"]


def test_what_is_not_here_is_404(client: httpx2.Client) -> None:
    for response in (client.get("/nothing"), client.post("/extra-single-image", json={})):
        assert response.status_code in (404, 405)
    assert "nothing" in client.get("/nothing").json()["detail"]


def test_a_failing_engine_is_a_500_without_details(
    client: httpx2.Client, engines: dict[str, FakeEngine]
) -> None:
    engines["bf16_base"].failure = RuntimeError("secret")
    response = client.post("/txt2img", json={"prompt": "x"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["detail"]


# Progress and interrupt


def test_progress_moves_and_interrupt_stops(
    client: httpx2.Client, engines: dict[str, FakeEngine]
) -> None:
    engine = engines["bf16_base"]
    assert client.get("/progress").json()["state"]["job_count"] == 0
    engine.step_s = 0.05
    answers: list[httpx2.Response] = []
    body = {"prompt": "x", "steps": 50, "batch_size": 2}
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/txt2img", json=body)), daemon=True
    )
    thread.start()
    wait_until(lambda: client.get("/progress").json()["state"]["sampling_step"] >= 2)
    state = client.get("/progress?skip_current_image=true").json()
    assert 0 < state["progress"] < 0.5
    assert state["eta_relative"] > 0
    assert (state["state"]["job_count"], state["state"]["sampling_steps"]) == (2, 50)
    assert client.post("/interrupt").json() == {}
    thread.join(10)
    (answer,) = answers
    assert answer.status_code == 499
    assert answer.json()["detail"]
    assert engine.steps_run < 50
    assert client.get("/progress").json() | {"state": None} == {
        "progress": 0.0, "eta_relative": 0.0, "state": None, "current_image": None, "textinfo": None
    }  # fmt: skip


def basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"user:{key}".encode()).decode()}


def test_clients_neither_see_nor_stop_each_other(engines: dict[str, FakeEngine]) -> None:
    engine = engines["bf16_base"]
    options = ServeOptions(a1111=True, api_keys=["one", "two"])
    with live(build_app(engines, options)) as server:
        base_url = f"{server.url}/sdapi/v1"
        with (
            httpx2.Client(base_url=base_url, headers=basic("one"), trust_env=False) as one,
            httpx2.Client(base_url=base_url, headers=basic("two"), trust_env=False) as two,
        ):
            engine.gate.clear()
            answers: list[httpx2.Response] = []
            body = {"prompt": "x", "steps": 4}
            thread = threading.Thread(
                target=lambda: answers.append(one.post("/txt2img", json=body)), daemon=True
            )
            thread.start()
            assert engine.started.acquire(timeout=10)
            assert two.get("/progress").json()["state"]["job_count"] == 0
            assert one.get("/progress").json()["state"]["job_count"] == 1
            two.post("/interrupt")
            two.post("/options", json={"sd_model_checkpoint": "online_fp8"})
            assert one.get("/options").json()["sd_model_checkpoint"] == "bf16_base"
            engine.gate.set()
            thread.join(10)
            assert answers[0].status_code == 200


WRONG = [{}, basic("wrong"), basic(""), *({"authorization": f"Basic {it}"} for it in ("one", "é"))]


@pytest.mark.parametrize("headers", WRONG)
def test_keys_are_asked_for(engines: dict[str, FakeEngine], headers: dict[str, str]) -> None:
    with live(build_app(engines, ServeOptions(a1111=True, api_keys=["one"]))) as server:
        sent = {name: value.encode() for name, value in headers.items()}
        refused = httpx2.get(f"{server.url}/sdapi/v1/options", headers=sent, trust_env=False)
        assert refused.status_code == 401
        elsewhere = httpx2.get(f"{server.url}/v1/models", headers=basic("one"), trust_env=False)
        assert elsewhere.status_code == 401


def test_it_is_off_by_default(engines: dict[str, FakeEngine]) -> None:
    with live(build_app(engines)) as server:
        response = httpx2.get(f"{server.url}/sdapi/v1/options", trust_env=False)
        assert response.status_code == 404
