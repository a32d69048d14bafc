"""Stub servers in processes of their own, and a GPU that nobody has."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_gpu import FakeDriver
from stub_server import STUB
from zimage_fp8.bench.launch import Server, free_port, start_server, stop_server


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def start_stub(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a stub server with these options and waits for it; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*options: object) -> Server:
            port = free_port()
            command = [sys.executable, str(STUB), "--port", str(port), *map(str, options)]
            server = start_server(command, port, tmp_path / f"stub-{port}.log", None)
            stack.callback(stop_server, server, None)
            server.wait_until_healthy(30)
            return server

        yield start
