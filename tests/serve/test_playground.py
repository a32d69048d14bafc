"""The playground in a real browser: Debian's chromium, driven by playwright.

Without them these tests are skipped, and the summary says how many.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fake_engine import FakeEngine
from live_server import Live, live, wait_until
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.serve import ServeOptions, build_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    Visit = Callable[..., Page]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
PROMPT = 'a "quoted" fox\'s den, 狐狸 $HOME `id`'


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {name: FakeEngine(name) for name in ("bf16_base", "online_fp8")}


@pytest.fixture
def server(engines: dict[str, FakeEngine]) -> Iterator[Live]:
    with live(build_app(engines)) as server:
        yield server
        for engine in engines.values():
            engine.gate.set()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Callable[..., "Page"]]:
    """Opens the page in a fresh profile. Whatever the console complains about fails the test."""
    contexts, complaints = [], []

    def visit(server: Live, **profile: object) -> "Page":
        context = browser.new_context(**profile)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
        page.on("request", lambda asked: asked.url.startswith("blob:") or own(asked.url))
        page.goto(server.url)
        ready(page)
        return page

    def own(url: str) -> None:
        if not url.startswith("http://127.0.0.1:"):
            complaints.append(f"a foreign host was asked: {url}")

    visit.complaints = complaints  # type: ignore[attr-defined]
    yield visit
    for context in contexts:
        context.close()
    # The browser also reports every refused request, which tests of refusals mean to see.
    unexpected = [text for text in complaints if "Failed to load resource" not in text]
    assert not unexpected, unexpected


def ready(page: "Page") -> None:
    page.wait_for_selector("html[data-ready]")


def draw(page: "Page", prompt: str = "a fox", *, count: int = 1, **fields: object) -> None:
    """Fill in, press Ctrl+Enter, and wait until so many more pictures are in the history."""
    page.fill("#prompt", prompt)
    for field, value in fields.items():
        page.fill(f"#{field.replace('_', '-')}", str(value))
    before = page.locator("#pictures li").count()
    page.keyboard.press("Control+Enter")
    page.locator("#pictures li").nth(before + count - 1).wait_for()
    page.wait_for_selector("#actions", state="visible")


def says(page: "Page", selector: str, words: str) -> None:
    """Wait for words. Not `wait_for_function`: it asks again by eval, which the page forbids."""
    page.locator(selector, has_text=words).wait_for()


def text(page: "Page", selector: str) -> str:
    return page.locator(selector).inner_text()


def drop(page: "Page", name: str, data: bytes, media_type: str) -> None:
    transfer = page.evaluate_handle(
        """([name, bytes, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return transfer;
        }""",
        [name, list(data), media_type],
    )
    for kind in ("dragover", "drop"):
        page.dispatch_event("#stage", kind, {"dataTransfer": transfer})


def picture(server: Live, **body: object) -> bytes:
    response = httpx2.post(
        f"{server.url}/v1/images/generations",
        json=body,
        headers={"accept": "image/png"},
        trust_env=False,
    )
    assert response.status_code == 200
    return response.content


# The files, without a browser


def test_the_page_is_served_with_a_strict_policy(server: Live) -> None:
    with httpx2.Client(base_url=server.url, trust_env=False) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert client.head("/").status_code == 200
        again = client.get("/", headers={"if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert client.get(f"/{name}").status_code == 200, name
            assert client.get(f"/{name}").headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2F__init__.py", "%2e%2e/app.py"])
def test_no_other_file_is_served(server: Live, name: str) -> None:
    response = httpx2.get(f"{server.url}/playground/{name}", trust_env=False)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


# Drawing


def test_a_prompt_becomes_a_picture_by_keyboard_alone(server: Live, visit: "Visit") -> None:
    page = visit(server)
    page.keyboard.type("a fox on a sledge")  # the cursor waits in the prompt
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#actions", state="visible")
    shown = page.locator("#first")
    assert shown.get_attribute("alt") == "a fox on a sledge"
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 32]
    assert text(page, "#status") == "The picture is finished."
    # 0.875 s by the engine; waiting in the queue and the file add what the machine makes of them.
    facts = re.match(r"seed \d+ · 64 × 32 · 8 steps · bf16_base · (\d\.\d+)", text(page, "#facts"))
    assert facts
    assert 0.87 <= float(facts[1]) < 2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"


def test_steps_and_previews_are_shown_while_drawing(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    engines["bf16_base"].step_s = 0.15
    page = visit(server)
    page.fill("#prompt", "a fox")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#first[alt=Preview]")
    assert 0 < page.locator("#progress").evaluate("bar => bar.value") < 1
    assert re.match(r"Step \d of 8 · \d\.\d s", text(page, "#facts"))
    page.wait_for_selector("#first[alt='a fox']")
    assert page.locator("#progress").is_hidden()


@pytest.mark.parametrize("by", ["Escape", "click"])
def test_drawing_can_be_cancelled(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit", by: str
) -> None:
    engine = engines["bf16_base"]
    engine.gate.clear()
    page = visit(server)
    page.fill("#prompt", "a fox")
    page.keyboard.press("Control+Enter")
    assert engine.started.acquire(timeout=10)
    if by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#cancel")
    page.wait_for_selector("#draw", state="visible")
    assert page.locator("#status").text_content() == "Cancelled."
    # The page knows at once; the server has the length of the steps to see that it is alone.
    engine.step_s = 0.2
    engine.gate.set()
    metrics = f"{server.url}/metrics"
    wait_until(lambda: "cancelled_total 1.0" in httpx2.get(metrics, trust_env=False).text)
    engine.step_s = 0.0
    draw(page)
    assert len(engine.requests) == 1


def test_settings_reach_the_engine(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    page = visit(server)
    page.select_option("#model", "online_fp8")
    page.fill("#guidance", "1.5")
    draw(page, width=32, height=48, steps=3, seed=7, negative="fog")
    assert engines["online_fp8"].requests == [
        ImageRequest("a fox", 32, 48, negative_prompt="fog", steps=3, guidance=1.5, seed=7)
    ]


def test_a_picture_starts_from_another(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    page = visit(server)
    draw(page, seed=40)
    page.click("#start-here")
    draw(page, seed=50, strength=0.5)
    request = engines["bf16_base"].requests[-1]
    assert request.strength == 0.5
    assert request.source is not None
    assert (request.source == 40).all()
    assert "strength 0.5" in text(page, "#facts")


# Comparing


def test_two_policies_share_a_seed_under_a_divider(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    page = visit(server)
    page.check("#two")
    draw(page, count=2)
    ours, theirs = (engine.requests for engine in engines.values())
    assert ours == theirs
    assert (text(page, "#tag-first"), text(page, "#tag-other")) == ("bf16_base", "online_fp8")
    says(page, "#facts", "identical")
    where = "getComputedStyle(document.querySelector('#other')).clipPath"
    page.focus("#divider")
    assert page.evaluate(where) == "inset(0px 0px 0px 50%)"
    page.keyboard.press("Home")
    assert page.evaluate(where) == "inset(0px 0px 0px 0%)"
    box = page.locator("#frame").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 5)
    assert re.search(r"7[45][\d.]*%", page.evaluate(where))


def test_two_seeds_differ_by_what_they_differ(server: Live, visit: "Visit") -> None:
    page = visit(server)
    page.check("#two")
    page.select_option("#second-model", "bf16_base")
    draw(page, count=2, seed=10, second_seed=20)
    says(page, "#facts", "PSNR")
    # Every channel of every pixel is off by 10: 10 · log10(255² / 10²) dB.
    assert text(page, "#facts") == "seed 10 vs seed 20 · PSNR 28.1 dB"
    page.get_by_text("Difference").click()
    amplified = page.evaluate("[...difference.getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert amplified == [80, 80, 80, 255]
    page.get_by_text("Side by side").click()
    left, right = (page.locator(which).bounding_box() for which in ("#first", "#other"))
    assert left["x"] + left["width"] <= right["x"]


def test_nothing_to_compare_is_said(server: Live, visit: "Visit") -> None:
    page = visit(server)
    page.fill("#prompt", "a fox")
    page.check("#two")
    page.select_option("#second-model", "bf16_base")
    page.keyboard.press("Control+Enter")
    assert "would be the same" in text(page, "#error")


def test_old_pictures_can_be_compared(server: Live, visit: "Visit") -> None:
    page = visit(server)
    draw(page, seed=1)
    draw(page, seed=2)
    page.click("#compare")
    page.focus("#pictures [aria-current=true]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert (text(page, "#tag-first"), text(page, "#tag-other")) == ("seed 2", "seed 1")


@pytest.mark.slow
def test_two_real_policies(visit: "Visit") -> None:
    """nano under BF16 and FP8: real pictures, alike but not the same."""
    policies = ("bf16_base", "online_fp8")
    with live(build_app({name: load_pipeline("nano", policy=name) for name in policies})) as server:
        page = visit(server)
        page.set_default_timeout(60_000)
        page.check("#two")
        draw(page, "an owl on a teal background", count=2, seed=11, steps=4)
        says(page, "#facts", "PSNR")
        psnr_db = float(re.search(r"PSNR ([\d.]+)", text(page, "#facts"))[1])  # type: ignore[index]
    assert 20 < psnr_db < 60


# Keeping


def test_the_history_survives_the_page(server: Live, visit: "Visit") -> None:
    page = visit(server)
    draw(page, "first", seed=1)
    draw(page, "second", seed=2)
    page.reload()
    ready(page)
    assert text(page, "#caption") == "second"
    assert page.input_value("#seed") == "2"  # the form is kept as well
    page.click("#delete")
    says(page, "#caption", "first")
    page.click("#clear")
    page.click("#clear-yes")
    page.wait_for_selector("#empty", state="visible")
    page.reload()
    ready(page)
    assert page.locator("#history").is_hidden()


def test_the_oldest_pictures_make_room(server: Live, visit: "Visit") -> None:
    page = visit(server)
    left = page.evaluate(
        """async () => {
            const { History, MAX_BYTES } = await import("/playground/history.js");
            const history = await History.open();
            const canvas = new OffscreenCanvas(8, 8);
            canvas.getContext("2d");
            const small = await canvas.convertToBlob();
            const padding = new Uint8Array(MAX_BYTES / 4);  // a PNG may be followed by anything
            for (let at = 0; at < 6; at++) {
                await history.add({ settings: { at }, blob: new Blob([small, padding]) });
            }
            const kept = (await History.open()).entries;
            await history.clear();
            return [history.isKept, kept.map(({ settings }) => settings.at)];
        }"""
    )
    assert left == [True, [3, 4, 5]]


def test_two_tabs_keep_each_others_pictures(server: Live, visit: "Visit") -> None:
    page = visit(server)
    other = page.context.new_page()
    other.goto(server.url)
    ready(other)
    draw(page, "first")
    draw(other, "second")
    page.reload()
    ready(page)
    assert page.locator("#pictures li").count() == 2


def test_a_picture_is_saved_under_its_prompt(server: Live, visit: "Visit") -> None:
    page = visit(server)
    draw(page, "A fox, sledging", seed=7)
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "a-fox-sledging-7.png"
    assert Image.open(download.value.path()).text["parameters"].startswith("A fox, sledging")


# Reusing


def filled_in(page: "Page") -> dict[str, str]:
    names = ("prompt", "width", "height", "steps", "seed", "guidance", "negative", "model")
    return {name: page.input_value(f"#{name}") for name in names}


EXPECTED = {
    "prompt": PROMPT, "width": "48", "height": "32", "steps": "5", "seed": "9", "guidance": "2",
    "negative": "fog, rain",
}  # fmt: skip


@pytest.mark.parametrize("how", ["drop", "choose"])
def test_a_picture_of_ours_gives_its_settings(server: Live, visit: "Visit", how: str) -> None:
    body = {
        "prompt": PROMPT, "size": "48x32", "steps": 5, "seed": 9, "guidance_scale": 2,
        "negative_prompt": "fog, rain", "model": "online_fp8",
    }  # fmt: skip
    file = picture(server, **body)
    page = visit(server)
    if how == "drop":
        drop(page, "fox.png", file, "image/png")
    else:
        with page.expect_file_chooser() as chooser:
            page.click("#open-picture")
        chooser.value.set_files({"name": "fox.png", "mimeType": "image/png", "buffer": file})
    page.wait_for_selector("#notice", state="visible")
    assert text(page, "#notice") == "Settings taken from fox.png."
    assert filled_in(page) == {**EXPECTED, "model": "online_fp8"}


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "compressed iTXt"])
def test_a_picture_of_others_gives_its_settings(server: Live, visit: "Visit", kind: str) -> None:
    prompt = "a fox" if "T" == kind[1] else PROMPT
    lines = f"{prompt}\nNegative prompt: fog, rain\nSteps: 5, Sampler: Euler a, CFG scale: 3, "
    lines += 'Seed: 9, Size: 48x32, Model hash: "a, b", Version: v1.10.1'
    info = PngInfo()
    if "iTXt" in kind:
        info.add_itxt("parameters", lines, zip=kind.startswith("compressed"))
    else:
        lines = lines.replace(PROMPT, "a fox")
        info.add_text("parameters", lines, zip=kind == "zTXt")
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32)).save(buffer, "PNG", pnginfo=info)
    assert kind.split()[-1].encode() in buffer.getvalue()
    page = visit(server)
    drop(page, "other.png", buffer.getvalue(), "image/png")
    page.wait_for_selector("#notice", state="visible")
    found = "a fox" if "iTXt" not in kind else prompt
    assert filled_in(page) == {**EXPECTED, "prompt": found, "model": "bf16_base"}


def test_a_picture_without_settings_becomes_the_start(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (9, 9, 9)).save(buffer, "PNG")
    page = visit(server)
    drop(page, "plain.png", buffer.getvalue(), "image/png")
    page.wait_for_selector("#start-chosen", state="visible")
    draw(page)
    source = engines["bf16_base"].requests[-1].source
    assert source is not None
    assert (source == 9).all()


@pytest.mark.parametrize("language", ["curl", "Python"])
@pytest.mark.parametrize("from_picture", [False, True])
def test_the_copied_code_draws_the_same(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit", tmp_path: Path, language: str,
    from_picture: bool,
) -> None:  # fmt: skip
    page = visit(server)
    if from_picture:
        Image.new("RGB", (64, 32), (9, 9, 9)).save(tmp_path / "start.png")
        drop(page, "start.png", (tmp_path / "start.png").read_bytes(), "image/png")
        page.wait_for_selector("#start-chosen", state="visible")
    page.fill("#guidance", "1.5")
    draw(page, PROMPT, seed=77, steps=3, negative="fog\nand rain")
    page.click("#code")
    page.get_by_text(language, exact=True).click()
    code = page.locator("#snippet").text_content()
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=60)
    assert Image.open(tmp_path / "picture.png").getpixel((0, 0)) == (77, 77, 77)
    first, second = engines["bf16_base"].requests
    assert first == second
    assert (first.source is None) == (second.source is None) == (not from_picture)


# Refusals


def test_the_servers_sentence_stands_at_the_field(server: Live, visit: "Visit") -> None:
    page = visit(server)
    page.fill("#prompt", "a fox")
    page.fill("#width", "50")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#error", state="visible")
    assert "50x32" in text(page, "#error")
    assert page.evaluate("document.activeElement.id") == "width"
    assert page.locator("#width").get_attribute("aria-invalid") == "true"
    draw(page, width=48)
    assert page.locator("#error").is_hidden()
    assert page.locator("[aria-invalid]").count() == 0


def test_a_failure_and_a_lost_server_are_told(
    engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    with live(build_app(engines)) as server:
        page = visit(server)
        engines["bf16_base"].failure = RuntimeError("secret")
        page.fill("#prompt", "a fox")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#error", state="visible")
        assert "the server failed" in text(page, "#error")
    page.keyboard.press("Control+Enter")
    says(page, "#error", "answer")
    assert text(page, "#error") == "The server does not answer. Is it still running?"


def test_a_key_is_asked_for(engines: dict[str, FakeEngine], visit: "Visit") -> None:
    with live(build_app(engines, ServeOptions(api_keys=["sesame"]))) as server:
        page = visit(server)
        assert page.locator("#key").is_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Tab")
        page.wait_for_selector("#error", state="visible")
        assert "not known" in text(page, "#error")
        page.fill("#key", "sesame")
        page.keyboard.press("Tab")
        page.wait_for_selector("#error", state="hidden")
        draw(page)
        page.click("#code")
        assert "$ZIMAGE_FP8_API_KEY" in text(page, "#snippet")
        assert "sesame" not in page.content()


# For everybody


def test_a_phone_shows_it_all(server: Live, visit: "Visit") -> None:
    page = visit(server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.fill("#prompt", "a fox in a very-long-word-" + "x" * 80)
    page.tap("#draw")
    page.wait_for_selector("#actions", state="visible")
    page.tap("summary")
    page.tap("text=Compare two")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    heights = page.evaluate(
        """[...document.querySelectorAll("button, select, a, textarea, input[type=number]")]
            .filter((it) => it.checkVisibility() && !it.dataset.seed)
            .map((it) => [it.id, it.getBoundingClientRect().height])"""
    )
    assert [each for each in heights if each[1] < 28] == []


CONTRAST = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const luminance = (colour) => {
        const parts = rgb(colour).map((part) => part / 255);
        const [r, g, b] = parts.map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (it) => {
        for (; it; it = it.parentElement) {
            const colour = getComputedStyle(it).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
    };
    const poor = [];
    for (const it of document.querySelectorAll("label, legend, small, p, button, a, h1, h2")) {
        if (!it.checkVisibility() || !it.textContent.trim() || it.closest(".tag")) continue;
        const [a, b] = [getComputedStyle(it).color, ground(it)].map(luminance);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) poor.push([it.outerHTML.slice(0, 80), ratio]);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_night(server: Live, visit: "Visit", scheme: str) -> None:
    page = visit(server, color_scheme=scheme)
    draw(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")
    assert page.evaluate(CONTRAST) == []


def test_nothing_moves_for_those_who_ask(
    server: Live, engines: dict[str, FakeEngine], visit: "Visit"
) -> None:
    engines["bf16_base"].gate.clear()
    page = visit(server, reduced_motion="reduce")
    page.fill("#prompt", "a fox")
    page.keyboard.press("Control+Enter")
    assert engines["bf16_base"].started.acquire(timeout=10)
    assert page.evaluate("document.getAnimations().length") == 0
    page.keyboard.press("Escape")


def test_every_control_has_a_name_and_a_place_in_the_order(server: Live, visit: "Visit") -> None:
    page = visit(server)
    draw(page)
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, a, progress, img")]
            .filter((it) => it.checkVisibility() && it.ariaHidden !== "true")
            .filter((it) => !(it.ariaLabel || it.labels?.length || it.alt || it.textContent.trim()
                || it.querySelector("img[alt]")))
            .map((it) => it.outerHTML)"""
    )
    assert nameless == []
    page.focus("#prompt")
    visited = []
    for _ in range(40):
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    expected = ["prompt", "draw", "model", "two", "width", "steps", "seed", "guidance", "save"]
    places = [visited.index(name) for name in expected]
    assert places == sorted(places)


def test_the_policy_holds_in_the_browser(server: Live, visit: "Visit") -> None:
    page = visit(server)
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
            addEventListener("securitypolicyviolation", (event) => {
                event.preventDefault();
                resolve(event.effectiveDirective);
            });
            try { document.body.innerHTML += "<img src=x onerror=alert(1)>"; } catch { }
        })"""
    )
    assert blocked == "require-trusted-types-for"
    assert "TrustedHTML" in visit.complaints.pop()


def test_it_works_below_a_prefix(engines: dict[str, FakeEngine], visit: "Visit") -> None:
    """Behind a proxy that serves it as /images/: every address is relative."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = build_app(engines)
    outer = Starlette(routes=[Mount("/images", app)], lifespan=app.router.lifespan_context)
    outer.state.drain = app.state.drain
    with live(outer) as server:  # type: ignore[arg-type]
        server.url += "/images/"
        page = visit(server)
        draw(page)
        page.click("#code")
        assert "/images/v1/images/generations" in text(page, "#snippet")
