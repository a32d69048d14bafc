"""An app behind a real socket on loopback, in a thread of the test process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from zimage_fp8.serve.server import Server, bind


class Live:
    """A running server: `url` to reach it, `stop()` to end it as SIGTERM would."""

    def __init__(self, app: FastAPI) -> None:
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def begin_stop(self) -> None:
        self._server.should_exit = True


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[Live]:
    server = Live(app)
    try:
        yield server
    finally:
        server.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
