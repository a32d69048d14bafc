"""A server in a fresh process of its own: started, waited for, and always ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from zimage_fp8.bench.engines import LOCALHOST
from zimage_fp8.bench.gpu import Driver
from zimage_fp8.errors import ZImageError

START_TIMEOUT_S = 1800  # a first start may download 20 GB
STOP_TIMEOUT_S = 30
BASELINE_SLACK_BYTES = 256 * 2**20  # what a driver may keep, and other programs' small changes
LOG_TAIL_LINES = 25


@dataclass(frozen=True)
class Server:
    """A started server process; `url` answers once `wait_until_healthy` has returned.

    gpu_before: bytes in use on the GPU before it was started, None where that is unknown.
    """

    command: list[str]
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    gpu_before: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds from start to health. Raises ZImageError with the log's tail when it ends."""
        while time.perf_counter() - self.started < timeout_s:
            if (code := self.process.poll()) is not None:
                raise self.failure(f"the server ended with exit code {code} while starting")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", trust_env=False).is_success:
                    return time.perf_counter() - self.started
            time.sleep(0.05)
        raise self.failure(f"the server did not become healthy within {timeout_s:g} s")

    def failure(self, what: str) -> ZImageError:
        """An error that says what was run and shows the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return ZImageError(f"{what}: {' '.join(self.command)}\n{tail}", hint=f"see {self.log}")


def start_server(command: Sequence[str], port: int, log: Path, driver: Driver | None) -> Server:
    """Run `command`, which will listen on `port`, in its own process group.

    `zimage-fp8` is this very program. Raises ZImageError when there is no such program.
    """
    program, *rest = command
    run = [sys.executable, "-m", "zimage_fp8"] if program == "zimage-fp8" else [program]
    log.parent.mkdir(parents=True, exist_ok=True)
    gpu_before = driver.used_bytes() if driver else None
    started = time.perf_counter()
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                [*run, *rest], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise ZImageError(
                f"cannot run {program!r}: {error.strerror}", hint="install it, or give its path"
            ) from None
    url = f"http://{LOCALHOST}:{port}"
    return Server(list(command), url, process, log, started, gpu_before)


def stop_server(server: Server, driver: Driver | None) -> list[str]:
    """End the server and everything it started; what it left behind, as sentences.

    Waits until its port is free and the GPU's memory is back where it was before.
    """
    stop(server.process)
    left = []
    if not _wait(lambda: is_free(server.port)):
        left.append(f"Port {server.port} is still taken after the server's end.")
    before = server.gpu_before
    if driver and before is not None:
        if not _wait(lambda: (driver.used_bytes() or 0) <= before + BASELINE_SLACK_BYTES):
            extra = ((driver.used_bytes() or 0) - before) / 2**30
            left.append(f"{extra:.2f} GiB more of the GPU are in use than before the server.")
    return left


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group: politely, then by force, and whatever has left the group."""
    family = _family(process.pid)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, STOP_TIMEOUT_S)


def note_process(pid: int, notes: Path) -> None:
    """Write down a started process, for `end_orphans` after a kill that nobody could catch."""
    with suppress(psutil.NoSuchProcess), notes.open("a", encoding="utf-8") as file:
        created = psutil.Process(pid).create_time()
        file.write(f"{pid} {created}\n")


def end_orphans(notes: Path) -> None:
    """End the processes that a killed run left behind, and forget the notes."""
    if not notes.exists():
        return
    for line in notes.read_text(encoding="utf-8").splitlines():
        pid, _, created = line.partition(" ")
        with suppress(psutil.NoSuchProcess, ValueError):
            process = psutil.Process(int(pid))
            # Process ids are used again; the moment of birth tells another program apart.
            if process.create_time() == float(created):
                family = [process, *process.children(recursive=True)]
                for one in family:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
                psutil.wait_procs(family, STOP_TIMEOUT_S)
    notes.unlink()


def _family(pid: int) -> list[psutil.Process]:
    """Descendants, noted before the parent's end: a worker may have a session of its own."""
    with suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server could listen on it now. Connections that linger do not count, as for it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCALHOST, port))
        except OSError:
            return False
    return True
