"""What the server itself costs: everything but the model, for one picture of 1024x512.

    python benchmarks/overhead.py --out benchmarks/results/server-overhead.json
    python benchmarks/overhead.py --noise    a picture of 1.6 MB, as random weights draw them

A server in a process of its own, around an engine that returns a finished picture at once; a client
that reads bytes from a socket and parses nothing, one request after the other on one connection.
The picture's encoding and its base64 are counted apart: the server times the former in every
answer, the latter is timed here on the same bytes. `server_ms` is wall time, which other programs
on the machine lengthen; `server_cpu_ms` is the processor time of the server's process, from which
that of encoding, taken here on the same picture, is subtracted.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pybase64

from zimage_fp8.picture import encode_pixels
from zimage_fp8.provenance import commit, versions

WIDTH, HEIGHT = 1024, 512
PATH = "/v1/images/generations"
GOAL_MS = 3.0
FORMS = {"json": "application/json", "raw": "image/png"}


def picture(is_noise: bool = False) -> np.ndarray:
    """Smooth shapes under a little noise: deflates about as photographs do, to 850 kB. Or noise
    alone, which is stored as it is: 1.6 MB."""
    if is_noise:
        return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] / 64
    waves = [np.sin(rows * a + columns * b) for a, b in ((1, 0.3), (0.4, 1), (0.7, -0.6))]
    noise = np.random.default_rng(1).normal(0, 2, (HEIGHT, WIDTH, 3))
    return (128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def serve(is_noise: bool) -> None:
    """The server's process: prints its port, then answers until it is killed."""
    import torch
    import uvicorn

    from zimage_fp8.model.drawing import Clock, Conditions, Drawing
    from zimage_fp8.model.pipeline import CaptionCache
    from zimage_fp8.model.request import GeneratedImage, ImageRequest
    from zimage_fp8.serve import build_app
    from zimage_fp8.serve.server import bind

    pixels, nothing = picture(is_noise), torch.zeros(1)

    class Null:
        model, policy, default_size = "null", "bf16_base", (WIDTH, HEIGHT)
        captions = CaptionCache()

        def validate(self, request: ImageRequest) -> None: ...

        def num_tokens(self, prompt: str) -> int:
            return 20

        def shape(self, request: ImageRequest) -> Hashable:
            return None

        def begin(self, request: ImageRequest) -> Drawing:
            sigmas = tuple(1 - step / request.steps for step in range(request.steps + 1))
            clock = Clock(torch.device("cpu"))
            return Drawing(request, sigmas, Conditions(nothing), nothing, clock)

        def step(self, drawings: Sequence[Drawing]) -> None:
            for drawing in drawings:  # not `advance`: what it computes is the model's
                drawing.done += 1
                drawing.nfe += 1

        def preview(self, drawing: Drawing) -> np.ndarray:
            return pixels

        def finish(self, drawing: Drawing) -> GeneratedImage:
            timings_s = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
            return GeneratedImage(pixels, drawing.request, drawing.sigmas, drawing.nfe, timings_s)

        def describe(self) -> dict[str, object]:
            return {"model": "null", "policy": "bf16_base", "device": "cpu", "versions": versions()}

    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(build_app(Null()), log_config=None, access_log=False)
    uvicorn.Server(config).run([listener])


BUFFER = bytearray(8 * 2**20)  # one for all: fresh pages would be the client's time


def exchange(connection: socket.socket, request: bytes) -> tuple[float, bytes, memoryview]:
    """(seconds from the first byte sent to the last one received, head, body)."""
    buffer = BUFFER
    started = time.perf_counter()
    connection.sendall(request)
    filled, end = 0, None
    while end is None or filled < end:
        count = connection.recv_into(memoryview(buffer)[filled:])
        assert count, "the server closed the connection"
        filled += count
        if end is None and (split := buffer.find(b"\r\n\r\n", 0, filled)) >= 0:
            head = bytes(buffer[:split])
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length, head
            end = split + 4 + int(length[1])
    took_s = time.perf_counter() - started
    return took_s, head, memoryview(buffer)[split + 4 : end]


def encoding_cpu_ms(accept: str, is_noise: bool) -> float:
    """Processor time of the PNG, all threads, and of its base64 where there is one."""
    pixels = picture(is_noise)
    spent = []
    for _ in range(30):
        started = time.process_time()
        file = encode_pixels(pixels, "png")
        if accept == FORMS["json"]:
            pybase64.b64encode(file)
        spent.append((time.process_time() - started) * 1000)
    return statistics.median(spent)


def measure(
    server: psutil.Process, port: int, accept: str, runs: int, is_noise: bool
) -> dict[str, float]:
    """Medians in milliseconds; `server_ms` is what is left of the latency."""
    body = json.dumps({"prompt": "a red apple", "seed": 1, "size": f"{WIDTH}x{HEIGHT}"}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    rows, cpu_before = [], 0.0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(runs + 5):
            if index == 5:
                cpu_before = cpu_s(server)
            took_s, answered, content = exchange(connection, request)
            assert answered.startswith(b"HTTP/1.1 200"), answered
            timing = re.search(rb"picture;dur=([\d.]+)", answered)
            assert timing
            base64_s = 0.0
            if accept == FORMS["json"]:
                file = pybase64.b64decode(json.loads(bytes(content))["data"][0]["b64_json"])
                started = time.perf_counter()
                pybase64.b64encode(file)
                base64_s = time.perf_counter() - started
            if index >= 5:  # the first ones warm caches and allocators
                png_ms, base64_ms = float(timing[1]), base64_s * 1000
                rows.append((took_s * 1000, png_ms, base64_ms, took_s * 1000 - png_ms - base64_ms))
    cpu_ms = (cpu_s(server) - cpu_before) * 1000 / runs
    names = ("latency_ms", "png_ms", "base64_ms", "server_ms")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    medians = {name: round(statistics.median(column), 3) for name, column in columns}
    server_cpu_ms = round(cpu_ms - encoding_cpu_ms(accept, is_noise), 3)
    return {**medians, "server_cpu_ms": server_cpu_ms, "answer_bytes": len(content)}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--noise", action="store_true", help="a picture of noise, 1.6 MB")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.noise)
        return 0
    noise = ["--noise"] if arguments.noise else []
    command = [sys.executable, __file__, "--serve", *noise]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout
            port = int(server.stdout.readline())
            wait_for(port)
            process = psutil.Process(server.pid)
            found = {
                form: measure(process, port, accept, arguments.runs, arguments.noise)
                for form, accept in FORMS.items()
            }
        finally:
            server.kill()
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python benchmarks/overhead.py --runs {arguments.runs}", *noise]),
        "size": f"{WIDTH}x{HEIGHT}",
        "runs": arguments.runs,
        "goal_ms": GOAL_MS,
        "cores": psutil.cpu_count(),
        "niceness": os.nice(0),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(),
        "commit": commit(),
        **found,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(found[form]["server_ms"] <= GOAL_MS for form in FORMS) else 1


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
