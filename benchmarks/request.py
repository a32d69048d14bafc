"""Whole requests over HTTP at full size: milliseconds, stages, memory, and start to first picture.

    python benchmarks/fake_model.py /data/z-image-random
    zimage-fp8 quantize /data/z-image-random --policy full --size 256x256 --out /data/full-random
    python benchmarks/request.py --out request.json full=/data/full-random \\
        bf16_base=/data/z-image-random online_fp8=/data/z-image-random,--policy,online_fp8

Every variant is NAME=MODEL,OPTION,...: a server of its own, asked one request at a time with steps
and guidance sent explicitly and a new prompt of about 64 tokens each time, so that nothing is
remembered. The client runs on the same machine and receives base64 PNG. Memory is the process's own
by NVML where the driver tells, else the device's use less what was used before; without a GPU it is
the server's resident memory, which the record says.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from gpu import DEVICE, RANDOM_WEIGHTS, envelope, write_rows

# The last one's first picture: a size that nothing was captured for.
SIZES = ("1024x512", "1024x1024", "768x1280")
WORDS = (
    "old harbour morning light fishing boats red roof wet stone quiet street copper kettle window "
    "garden snow lantern silver river bridge market orange fabric glass bottle mountain shadow"
).split()


class Memory:
    """The largest use seen while it samples, by NVML where there is a GPU."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.nvml: Any = None
        self.source = "resident memory of the process: no GPU"
        if DEVICE.type == "cuda":
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.before = int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)
            self.source = "device, less what was used before"
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.peak = max(self.peak, self._used())

    def _used(self) -> int:
        if self.nvml is None:
            return int(self.process.memory_info().rss)
        for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle):
            if process.pid == self.process.pid and process.usedGpuMemory:
                self.source = "process"
                return int(process.usedGpuMemory)
        return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used) - self.before

    def take_peak(self) -> int:
        peak, self.peak = self.peak, 0
        return peak

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def prompt(rng: random.Random) -> str:
    """About 64 tokens with the embedded model's tokenizer, chat template included."""
    return " ".join(rng.choices(WORDS, k=24))


def ask(port: int, size: str, rng: random.Random) -> tuple[float, dict[str, Any]]:
    """Seconds until the whole answer is here, and the answer."""
    body = json.dumps(
        {
            "prompt": prompt(rng),
            "size": size,
            "n": 1,
            "response_format": "b64_json",
            "num_inference_steps": 8,
            "guidance_scale": 0.0,
            "seed": rng.randrange(2**31),
        }
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        data=body,
        headers={"content-type": "application/json"},
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read()
    seconds = time.perf_counter() - started
    return seconds, json.loads(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    name: str, model: str, options: list[str], count: int, log: Path, sizes: Sequence[str]
) -> dict[str, Any]:
    """A server's numbers at all sizes but the last, of which only the first picture is timed."""
    port, rng = free_port(), random.Random(name)
    command = [
        *(sys.executable, "-m", "zimage_fp8", "serve", model, "--port", str(port)),
        *("--no-warm-up", *options),
    ]
    started = time.perf_counter()
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    memory = Memory(server.pid)
    try:
        wait_until_up(server, port, log)
        healthy_s = time.perf_counter() - started
        load_peak = memory.take_peak()
        first_s, answer = ask(port, sizes[0], rng)
        row: dict[str, Any] = {
            "variant": name,
            "options": options,
            "healthy_s": healthy_s,
            "start_to_first_picture_s": time.perf_counter() - started,
            "first_request_s": first_s,
            "load_peak_bytes": load_peak,
            "sizes": {},
        }
        for size in sizes[:-1]:
            ask(port, size, rng)  # its graphs' memory belongs to the size's peak
            ask(port, size, rng)
            asked = [ask(port, size, rng) for _ in range(count)]
            times = sorted(seconds * 1000 for seconds, _ in asked)
            stages = [stages_of(answer) for _, answer in asked]
            row["sizes"][size] = {
                "p50_ms": median(times),
                "p90_ms": times[int(0.9 * (len(times) - 1))],
                "times_ms": times,
                "stages_ms": {
                    stage: median(taken[stage] for taken in stages) for stage in stages[0]
                },
                "png_bytes": len(base64.b64decode(asked[-1][1]["data"][0]["b64_json"])),
                "peak_bytes": memory.take_peak(),
            }
        new_size_s, answer = ask(port, sizes[-1], rng)
        row["new_size_first_picture_s"] = new_size_s
        row["memory_source"] = memory.source
        row["answer"] = {key: value for key, value in answer.items() if key != "data"}
        return row
    finally:
        memory.stop()
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def stages_of(answer: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per stage, as the server tells them for the picture."""
    facts = answer["data"][0].get("zimage_fp8") or answer.get("zimage_fp8") or {}
    timings = facts.get("timings_s") or facts.get("timings") or answer.get("timings") or {}
    return {
        stage: float(value) * 1000
        for stage, value in timings.items()
        if isinstance(value, (int, float))
    }


def wait_until_up(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.perf_counter() + 180
    while time.perf_counter() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"the server did not answer within 180 s:\n{log.read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="NAME=MODEL[,OPTION...]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20, help="timed requests per size")
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, help="the last one is asked once: a new size"
    )
    arguments = parser.parse_args()
    facts = envelope() | {"weights": RANDOM_WEIGHTS}
    rows = measured(arguments.variants, arguments.count, arguments.out, arguments.sizes)
    write_rows(arguments.out, facts, "requests", rows)


def measured(
    variants: Sequence[str], count: int, out: Path, sizes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row per variant; one that fails is named and left out."""
    for variant in variants:
        name, _, rest = variant.partition("=")
        model, *options = rest.split(",")
        try:
            row = measure(name, model, options, count, out.with_suffix(f".{name}.log"), sizes)
        except (SystemExit, OSError, ValueError, KeyError) as error:
            print(f"{name}: {error}", flush=True)
            continue
        show(row)
        yield row


def show(row: dict[str, Any]) -> None:
    for size, found in row["sizes"].items():
        stages = " ".join(f"{stage} {ms:.1f}" for stage, ms in found["stages_ms"].items())
        print(
            f"{row['variant']:22} {size:10} p50 {found['p50_ms']:7.1f} ms ({stages}) "
            f"peak {found['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
    print(
        f"{row['variant']:22} first picture {row['start_to_first_picture_s']:.1f} s after start "
        f"(up after {row['healthy_s']:.1f}), new size {row['new_size_first_picture_s']:.2f} s, "
        f"load peak {row['load_peak_bytes'] / 2**30:.2f} GiB ({row['memory_source']})",
        flush=True,
    )


if __name__ == "__main__":
    main()
