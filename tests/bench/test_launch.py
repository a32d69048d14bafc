"""Servers in processes of their own: started, waited for, always ended."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fake_gpu import MIB, FakeDriver
from stub_server import STUB
from zimage_fp8.bench import launch
from zimage_fp8.bench.launch import (
    Server,
    end_orphans,
    free_port,
    is_free,
    note_process,
    start_server,
    stop,
    stop_server,
)
from zimage_fp8.errors import ZImageError

FAMILY = """\
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def run_stub(tmp_path: Path, *options: str, driver: FakeDriver | None = None) -> Server:
    port = free_port()
    command = [sys.executable, str(STUB), "--port", str(port), *options]
    return start_server(command, port, tmp_path / "logs" / "stub.log", driver)


def test_a_server_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "broken.log"
    server = start_server(["zimage-fp8", "serve", "no-such-model"], 1, log, None)
    with pytest.raises(ZImageError, match="ended with exit code 1") as failed:
        server.wait_until_healthy()
    assert "model 'no-such-model' does not exist" in str(failed.value)
    assert stop_server(server, None) == []


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    server = run_stub(tmp_path)
    with pytest.raises(ZImageError, match="did not become healthy within 0 s"):
        server.wait_until_healthy(timeout_s=0)
    stop_server(server, None)
    assert server.process.poll() is not None


def test_a_program_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ZImageError, match="cannot run 'no-such-program': No such file"):
        start_server(["no-such-program"], 1, tmp_path / "log", None)


def test_stopping_leaves_no_process_and_frees_the_port(tmp_path: Path) -> None:
    """Not even a worker that went into a session of its own."""
    server = run_stub(tmp_path, "--with-child")
    server.wait_until_healthy(30)
    assert not is_free(server.port)
    child = psutil.Process(int(server.log.read_text().split()[1]))
    assert child.is_running()
    assert stop_server(server, None) == []
    assert not psutil.pid_exists(server.pid)
    assert not psutil.pid_exists(child.pid)
    assert is_free(server.port)


def test_stopping_waits_until_the_gpu_has_its_memory_back(
    tmp_path: Path, driver: FakeDriver
) -> None:
    server = run_stub(tmp_path, driver=driver)
    driver.used = 5000 * MIB

    def give_back() -> None:
        time.sleep(0.3)
        driver.used = 1100 * MIB

    threading.Thread(target=give_back).start()
    assert stop_server(server, driver) == []


def test_memory_that_does_not_come_back_is_told(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = run_stub(tmp_path, driver=driver)
    driver.used = 1000 * MIB + 3 * 2**30
    stop(server.process)
    monkeypatch.setattr(launch, "STOP_TIMEOUT_S", 0.2)
    assert stop_server(server, driver) == [
        "3.00 GiB more of the GPU are in use than before the server."
    ]


def test_stopping_ends_the_whole_family() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    stop(parent)
    parent.stdout.close()
    assert parent.returncode is not None
    assert child.wait(10) is not None or not psutil.pid_exists(child.pid)


def test_servers_of_a_killed_run_are_ended_by_the_next(
    tmp_path: Path, start_stub: Callable[..., Server]
) -> None:
    orphan, other = start_stub(), start_stub()
    notes = tmp_path / "servers.txt"
    note_process(orphan.pid, notes)
    with notes.open("a") as file:
        file.write(f"{other.pid} 12.5\n999999999 1.0\n")  # ids that were used again, or are gone
    end_orphans(notes)
    assert not psutil.pid_exists(orphan.pid)
    assert other.process.poll() is None
    assert not notes.exists()
    end_orphans(notes)
