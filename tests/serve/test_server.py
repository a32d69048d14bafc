"""`zimage-fp8 serve` as people start it: options, ports, and the whole path in a real process."""

import base64
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch
from PIL import Image

from zimage_fp8.bench.launch import free_port
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.quantize import quantize
from zimage_fp8.serve.server import api_keys, bind, limit_gpu_memory, serve, stored_algo


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ZImageError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address"):
            bind("127.0.0.1", other.getsockname()[1])


def test_an_address_of_nobody_is_one_sentence() -> None:
    with pytest.raises(ZImageError, match="is not an address of this machine"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(ZImageError, match="cannot listen on"):
        bind("192.0.2.1", 0)  # reserved for documentation


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
        ({"port": 70000}, "port"),
        ({"quantization_config": "{"}, "quantization_config"),
        ({"quantization_config": '{"method":"modelopt"}'}, "quantization_config"),
        ({"policy": "nonsense"}, "policy"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_wrong_options_are_usage_errors(
    tiny_model: Path, options: dict[str, object], param: str
) -> None:
    with pytest.raises(UsageError) as refused:
        serve([str(tiny_model)], **{"port": 0, "device": "cpu", **options})
    assert refused.value.param == param


def test_a_checkpoint_says_how_it_is_stored(tiny_model: Path, tmp_path: Path) -> None:
    assert stored_algo(str(tiny_model)) is None
    (row,) = quantize(str(tiny_model), ["fp8-row"], tmp_path / "row")  # needs no calibration
    assert stored_algo(str(row)) == "FP8_PER_CHANNEL_PER_TOKEN"
    with pytest.raises(UsageError, match=r"says FP8, but .* holds FP8_PER_CHANNEL_PER_TOKEN"):
        serve([str(row)], port=0, quantization_config='{"method":"modelopt","quant_algo":"FP8"}')


# The seed card's command line after the program's name, with its port changed.
CARD_OPTIONS = [
    "--omni", "--host", "0.0.0.0", "--gpu-memory-utilization", "0.90",
    "--tensor-parallel-size", "1",
    "--quantization-config", '{"method":"fp8"}',
]  # fmt: skip


@dataclass
class Started:
    process: subprocess.Popen[str]
    url: str

    def wait_for(self, words: str) -> None:
        """Read the log until a line holds `words`."""
        assert self.process.stderr
        assert any(words in line for line in iter(self.process.stderr.readline, ""))


def wait_until_running(client: httpx2.Client, count: int) -> None:
    """Until so many pictures are being drawn."""
    deadline = time.monotonic() + 30
    while f"requests_running {count}.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[Started]:
    port = free_port()
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable, "-m", "zimage_fp8", "serve", str(tiny_model), *CARD_OPTIONS,
        "--port", str(port), "--log-prompts",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    started = Started(process, f"http://127.0.0.1:{port}")
    started.wait_for("serving at")
    yield started
    process.kill()
    process.communicate()


def test_a_picture_over_http_and_a_clean_end(server: Started) -> None:
    body = {"prompt": "x", "size": "64x48", "num_inference_steps": 8, "guidance_scale": 0.0}
    transport = httpx2.HTTPTransport(retries=5)  # it says so just before it listens
    with (
        httpx2.Client(base_url=server.url, timeout=60, transport=transport) as client,
        ThreadPoolExecutor() as pool,
    ):
        answer = client.post("/v1/images/generations", json=body).json()
        server.wait_for("prompt: x")
        wait_until_running(client, 0)
        longer = {**body, "prompt": "y", "n": 4, "num_inference_steps": 40}
        drawing = pool.submit(client.post, "/v1/images/generations", json=longer)
        server.wait_for("prompt: y")
        wait_until_running(client, 1)  # what has not begun is refused
        server.process.send_signal(signal.SIGTERM)
        assert len(drawing.result(60).json()["data"]) == 4
    png = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(png)).size == (64, 48)
    assert answer["zimage_fp8"]["policy"] == "online_fp8"
    assert answer["zimage_fp8"]["nfe"] == 8
    out, _ = server.process.communicate(timeout=60)
    assert out == ""  # stdout is data, and a server has none
    assert server.process.returncode == 0


def test_nothing_is_left_of_a_killed_server(server: Started, tmp_path: Path) -> None:
    """Killed while it draws, and while a form with a picture comes in."""
    body = {"prompt": "y", "size": "64x48", "steps": 200, "n": 10, "stream": True}
    boundary = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    port = int(server.url.rpartition(":")[2])
    with (
        httpx2.Client(transport=httpx2.HTTPTransport(retries=5)) as client,
        client.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=60) as told,
        socket.create_connection(("127.0.0.1", port)) as upload,
    ):
        head = "POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
        form = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        upload.sendall((head + form).encode() + boundary + bytes(3_000_000))
        lines = told.iter_lines()
        assert next(lines).startswith(": step 0/200")
        server.process.kill()
        server.process.wait(30)
        with pytest.raises(httpx2.TransportError):
            list(lines)
    bind("127.0.0.1", port).close()
    assert [path.name for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


def test_the_share_of_a_gpu_reaches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int | None]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, index: limits.append((share, index)),
    )
    for device in (None, "cuda", "cuda:1", "cpu"):
        limit_gpu_memory(0.5, device)
    assert limits == [(0.5, None), (0.5, None), (0.5, 1)]


def test_what_has_no_effect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        limit_gpu_memory(0.9, "cpu")
    assert "no effect on a CPU" in caplog.text


def test_keys_come_from_options_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the office\nsecond\n\n  third  \n")
    assert api_keys(["first"], None) == ("first",)
    assert api_keys(["first"], file) == ("first", "second", "third")


@pytest.mark.parametrize(
    ("given", "content", "said"),
    [([""], None, "empty"), ([], "# none\n", "holds no API key"), ([], b"\xff", "cannot be read")],
)
def test_keys_that_would_leave_the_door_open_are_refused(
    tmp_path: Path, given: list[str], content: str | bytes | None, said: str
) -> None:
    file = None if content is None else tmp_path / "keys"
    if file:
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(UsageError, match=said):
        api_keys(given, file)
