"""Servers in processes of their own: started, waited for, always ended."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from zimage_fp8.bench.launch import start_server, stop
from zimage_fp8.errors import ZImageError

FAMILY = """\
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_server_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "broken.log"
    with (
        start_server(["no-such-model"], log) as server,
        pytest.raises(ZImageError, match="ended with exit code 1") as failed,
    ):
        server.wait_until_healthy()
    assert "model 'no-such-model' does not exist" in str(failed.value)
    assert server.process.poll() is not None


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    with (
        start_server(["no-such-model"], tmp_path / "log") as server,
        pytest.raises(ZImageError, match="did not become healthy within 0 s"),
    ):
        server.wait_until_healthy(timeout_s=0)
    assert server.process.poll() is not None


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
    assert os.getpid() != parent.pid
