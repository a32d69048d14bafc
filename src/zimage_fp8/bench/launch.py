"""A server in a fresh process of its own: started, waited for, and always ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from zimage_fp8.errors import ZImageError

LOCALHOST = "127.0.0.1"
START_TIMEOUT_S = 1800  # a first start may download 20 GB
STOP_TIMEOUT_S = 30
LOG_TAIL_LINES = 25


@dataclass(frozen=True)
class Server:
    """A started server process; `url` answers once `wait_until_healthy` has returned."""

    command: list[str]
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds from start to health. Raises ZImageError with the log's tail when it ends."""
        while time.perf_counter() - self.started < timeout_s:
            if (code := self.process.poll()) is not None:
                raise self.failure(f"the server ended with exit code {code} while starting")
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", trust_env=False).is_success:
                    return time.perf_counter() - self.started
            time.sleep(0.05)
        raise self.failure(f"the server did not become healthy within {timeout_s:g} s")

    def failure(self, what: str) -> ZImageError:
        """An error that says what was run and shows the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return ZImageError(f"{what}: {' '.join(self.command)}\n{tail}", hint=f"see {self.log}")


@contextlib.contextmanager
def start_server(arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """`zimage-fp8 serve` with these arguments on a free local port, in its own process group.

    On leaving it is asked to end, then killed, with everything it started.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "zimage_fp8", "serve", *arguments,
        "--host", LOCALHOST, "--port", str(port),
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(command, f"http://{LOCALHOST}:{port}", process, log, time.perf_counter())
    try:
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group: politely, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])
