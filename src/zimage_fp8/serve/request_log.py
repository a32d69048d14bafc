"""Around every request: an id, the time it took, one log line, and no stack trace on the wire."""

import logging
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage_fp8.serve.failures import INTERNAL, answer
from zimage_fp8.serve.logs import request_id

log = logging.getLogger(__name__)

MAX_ID_LENGTH = 128
PROBED = ("/health", "/ready", "/metrics")  # asked every second by somebody; not worth a line

OnAnswer = Callable[[str, int, float], None]  # (path, status, seconds)


class RequestLog:
    """ASGI middleware: the headers `x-request-id` and `openai-processing-ms` on every answer.

    A caller's own x-request-id is kept. Plain ASGI rather than Starlette's BaseHTTPMiddleware,
    which would hide the client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self.app = app
        self.on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = _request_id(Headers(scope=scope))
        token = request_id.set(identity)
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                headers["openai-processing-ms"] = str(_elapsed_ms(started))
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:  # the last line of defence: whatever it was, the client gets an answer
            log.exception("the request failed")
            if status == 0:
                await answer(INTERNAL, str(INTERNAL.message))(scope, receive, send_with_headers)
        self.on_answer(scope["path"], status, time.perf_counter() - started)
        facts = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": _elapsed_ms(started),
        }
        log.log(
            logging.DEBUG if scope["path"] in PROBED else logging.INFO,
            "%s %s %d %d ms",
            *facts.values(),
            extra={"facts": facts},
        )
        request_id.reset(token)


def _elapsed_ms(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _request_id(headers: Headers) -> str:
    sent = headers.get("x-request-id", "")
    return sent if sent.isprintable() and 0 < len(sent) <= MAX_ID_LENGTH else uuid.uuid4().hex
