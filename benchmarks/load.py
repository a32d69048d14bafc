"""Many rude clients at once: does the server answer everybody, and is it the same afterwards?

    python benchmarks/load.py --seconds 180 --out benchmarks/results/load-nano.json

Starts `zimage-fp8 serve nano` on a free port. Its clients draw, stream, edit, leave in the middle,
and send nonsense and bodies that are too large, one request after the other. The run passes when
every request was answered as its kind may be, the server's open files and threads are back where
they were, its memory did not grow between the second quarter and the end by more than a stated
share, and a last picture is the same as the first.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import httpx2
import psutil
from PIL import Image

from zimage_fp8.provenance import commit, versions

ROOT = Path(__file__).parents[1]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SAMPLE_S = 1.0
START_S = 300
MAX_WAITING = 32
MAX_UPLOAD_BYTES = 2_000_000
GROWTH_ALLOWED = 0.05  # of the resident memory, from the second quarter's median to the last one's
PROMPTS = ("a red apple", "a green frog", "a blue car on a road", "a yellow cup beside a book")

Kind = Callable[["Client"], Awaitable[str]]


@dataclass
class Client:
    """One client. `outcomes` counts kind -> what came of it; the random choices are its own."""

    http: httpx2.AsyncClient
    rng: random.Random
    picture: str
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)

    def body(self, **fields: object) -> dict[str, object]:
        steps = self.rng.choice((1, 1, 2))
        return {"prompt": self.rng.choice(PROMPTS), "size": "64x64", "steps": steps, **fields}

    async def post(self, path: str, body: object) -> str:
        started = time.perf_counter()
        response = await self.http.post(path, json=body)
        outcome = judged(response)
        if outcome == "200":
            self.latencies_s.append(time.perf_counter() - started)
        return outcome


def judged(response: httpx2.Response) -> str:
    """The status, or what is wrong with the answer."""
    if response.status_code == 200:
        data = response.json()["data"]
        return "200" if data and all(it["b64_json"] for it in data) else "200 without pictures"
    error = response.json().get("error", {})
    is_envelope = set(error) == {"message", "type", "param", "code"}
    if response.status_code == 429 and not is_retryable(response):
        return "429 without retry-after"
    return str(response.status_code) if is_envelope else f"{response.status_code} no envelope"


def is_retryable(response: httpx2.Response) -> bool:
    return "retry-after" in response.headers or response.headers.get("x-should-retry") == "false"


async def draw(client: Client) -> str:
    return await client.post(GENERATIONS, client.body(n=client.rng.choice((1, 1, 1, 3))))


async def stream(client: Client) -> str:
    body = client.body(stream=True, partial_images=2, n=2)
    last = ""
    async with client.http.stream("POST", GENERATIONS, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return judged(response)
        async for line in response.aiter_lines():
            last = line if line.startswith("data: ") else last
    event = json.loads(last.removeprefix("data: ") or "{}")
    return "200" if event.get("type") == "image_generation.completed" else "stream broke off"


async def edit(client: Client) -> str:
    return await client.post(EDITS, client.body(image=client.picture, strength=0.5))


async def leave(client: Client) -> str:
    """Close the connection in the middle, most often while the picture is being drawn."""
    try:
        async with asyncio.timeout(client.rng.uniform(0.0, 0.6)):
            return await client.post(GENERATIONS, client.body(steps=50))
    except TimeoutError:
        return "left"


async def leave_a_stream(client: Client) -> str:
    body = client.body(stream=True, partial_images=3, steps=20)
    async with client.http.stream("POST", GENERATIONS, json=body) as response:
        async for _ in response.aiter_bytes():
            break
    return "left" if response.status_code == 200 else str(response.status_code)


async def talk_nonsense(client: Client) -> str:
    wrong: dict[str, object] = client.rng.choice(
        [{"size": "7x7"}, {"n": 99}, {"prompt": ""}, {"steps": -1}, {"seed": "x"}]
    )
    return await client.post(GENERATIONS, {**client.body(), **wrong})


async def send_garbage(client: Client) -> str:
    garbage = client.rng.randbytes(client.rng.randrange(1, 5000))
    headers = {"content-type": client.rng.choice(["application/json", "multipart/form-data"])}
    path = client.rng.choice([GENERATIONS, EDITS])
    return judged(await client.http.post(path, content=garbage, headers=headers))


async def send_too_much(client: Client) -> str:
    path = client.rng.choice([GENERATIONS, EDITS])
    size = 1_100_000 if path == GENERATIONS else MAX_UPLOAD_BYTES + 1
    return await client.post(path, {"prompt": "x", "padding": "x" * size})


# kind -> (how often, what may come of it). A full queue is an answer, too.
KINDS: dict[Kind, tuple[int, set[str]]] = {
    draw: (30, {"200", "429"}),
    stream: (15, {"200", "429"}),
    edit: (10, {"200", "429"}),
    leave: (15, {"left", "200", "429"}),
    leave_a_stream: (10, {"left", "429"}),
    talk_nonsense: (10, {"400"}),
    send_garbage: (5, {"400", "429"}),
    send_too_much: (5, {"413", "429"}),
}


async def behave(client: Client, until: float) -> None:
    """One request after the other, of random kinds."""
    kinds, weights = list(KINDS), [often for often, _ in KINDS.values()]
    while time.monotonic() < until:
        (kind,) = client.rng.choices(kinds, weights)
        try:
            outcome = await kind(client)
        except httpx2.TransportError as error:
            outcome = f"no answer: {type(error).__name__}"
        client.outcomes[kind.__name__, outcome] += 1
        if outcome == "429":
            await asyncio.sleep(client.rng.uniform(0.2, 2))  # sooner than asked: rude


@dataclass(frozen=True)
class Sample:
    """The server process at one moment; `at_s` counts from the start of the load."""

    at_s: float
    rss_bytes: int
    open_files: int
    threads: int


def sample(process: psutil.Process, started: float) -> Sample:
    return Sample(
        round(time.monotonic() - started, 1),
        process.memory_info().rss,
        process.num_fds(),
        process.num_threads(),
    )


async def watch(process: psutil.Process, started: float, samples: list[Sample]) -> None:
    while True:
        samples.append(sample(process, started))
        await asyncio.sleep(SAMPLE_S)


async def wait_until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not get there in time")
        await asyncio.sleep(0.1)


async def run(url: str, process: psutil.Process, clients: int, seconds: float, seed: int) -> dict:
    async def is_ready() -> bool:
        try:
            return (await http.get("/ready")).status_code == 200
        except httpx2.TransportError:
            return False

    async def is_idle() -> bool:
        text = (await http.get("/metrics")).text
        return "zimage_fp8_queue_depth 0.0" in text and "zimage_fp8_requests_running 0.0" in text

    async def fixed_picture() -> str:
        body = {"prompt": PROMPTS[0], "size": "64x64", "seed": 1}
        return (await http.post(GENERATIONS, json=body)).json()["data"][0]["b64_json"]

    limits = httpx2.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(
        base_url=url, timeout=300, trust_env=False, limits=limits
    ) as http:
        await wait_until(is_ready, START_S)
        before_picture = await fixed_picture()
        before = sample(process, time.monotonic())
        people = [Client(http, random.Random(seed + i), a_picture()) for i in range(clients)]
        samples: list[Sample] = []
        started = time.monotonic()
        watcher = asyncio.create_task(watch(process, started, samples))
        await asyncio.gather(*(behave(person, started + seconds) for person in people))
        took_s = time.monotonic() - started
        await wait_until(is_idle, 180)
        watcher.cancel()
        after_picture = await fixed_picture()
        is_healthy = (await http.get("/health")).status_code == 200
    await asyncio.sleep(2)  # connections of the closed client are gone now
    after = sample(process, started)
    return summary(
        people, samples, before, after, took_s, is_healthy and before_picture == after_picture
    )


def summary(
    people: list[Client],
    samples: list[Sample],
    before: Sample,
    after: Sample,
    took_s: float,
    is_as_before: bool,
) -> dict:
    outcomes = sum((person.outcomes for person in people), Counter())
    allowed = {kind.__name__: outcomes for kind, (_, outcomes) in KINDS.items()}
    unexpected = {
        f"{kind}: {outcome}": count
        for (kind, outcome), count in outcomes.items()
        if outcome not in allowed[kind]
    }
    quarter = max(1, len(samples) // 4)
    early, late = (
        median(it.rss_bytes for it in part)
        for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    )
    growth = late / early - 1
    latencies = sorted(latency for person in people for latency in person.latencies_s)
    checks = {
        "every request was answered as it may be": not unexpected,
        "resident memory is flat": growth <= GROWTH_ALLOWED,
        "open files are as before": after.open_files <= before.open_files,
        "healthy, and the same picture as before": is_as_before,
    }
    return {
        "clients": len(people),
        "seconds": round(took_s, 1),
        "requests": outcomes.total(),
        "outcomes": {
            kind: {it: count for (of, it), count in sorted(outcomes.items()) if of == kind}
            for kind in allowed
        },
        "unexpected": unexpected,
        "pictures_answered": len(latencies),
        "latency_s": {
            f"p{part}": round(latencies[min(len(latencies) - 1, len(latencies) * part // 100)], 3)
            for part in (50, 90, 99)
        },
        "rss_bytes": {
            "before": before.rss_bytes,
            "second_quarter": int(early),
            "last_quarter": int(late),
            "after": after.rss_bytes,
            "growth": round(growth, 4),
            "growth_allowed": GROWTH_ALLOWED,
        },
        "open_files": {
            "before": before.open_files,
            "most": max(it.open_files for it in samples),
            "after": after.open_files,
        },
        "threads": {
            "before": before.threads,
            "most": max(it.threads for it in samples),
            "after": after.threads,
        },
        "checks": checks,
        "passed": all(checks.values()),
        "samples": [
            [it.at_s, it.rss_bytes, it.open_files, it.threads]
            for it in samples[:: max(1, len(samples) // 60)]
        ],
    }


def a_picture() -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((96, 80)).convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    from zimage_fp8.bench.launch import free_port  # after --help

    port = free_port()
    command = [
        sys.executable, "-m", "zimage_fp8", "serve", "nano", "--device", "cpu", "--port", str(port),
        "--max-waiting", str(MAX_WAITING), "--max-upload-bytes", str(MAX_UPLOAD_BYTES),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            found = asyncio.run(
                run(
                    f"http://127.0.0.1:{port}",
                    psutil.Process(server.pid),
                    arguments.clients,
                    arguments.seconds,
                    arguments.seed,
                )
            )
        finally:
            server.terminate()
            exit_code = server.wait(60)
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/load.py --clients {arguments.clients} "
        f"--seconds {arguments.seconds:g} --seed {arguments.seed}",
        "cores": psutil.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "server_exit_code": exit_code,
        **found,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {name: it for name, it in result.items() if name not in ("samples", "versions")}
    print(json.dumps(shown, indent=1))
    return 0 if result["passed"] and exit_code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
