"""Every failure as an answer in OpenAI's error envelope: one table from exception to status.

FastAPI's own 422 body would lose `code`, `param` and even the message in OpenAI's client, and a
stack trace belongs in the log.
"""

import http
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.protocol import ApiError, ErrorAnswer
from zimage_fp8.serve.jobs import JobCancelled, QueueClosed, QueueFull

# The engine's own names of what the wire calls otherwise.
WIRE_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}

CLIENT_GONE = 499  # nginx's number for a client that closed the connection


@dataclass(frozen=True)
class Failure:
    """One row: the status, and OpenAI's `type` and `code` for it."""

    status: int
    type: str
    code: str | None = None
    message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


INTERNAL = Failure(
    500, "server_error", "internal_error", "the server failed; its log says how, by request id"
)


def answer(failure: Failure, message: str, param: str | None = None) -> Response:
    error = ApiError(message=message, type=failure.type, param=param, code=failure.code)
    return Response(
        ErrorAnswer(error=error).model_dump_json(),
        failure.status,
        dict(failure.headers),
        media_type="application/json",
    )


def answer_failures(app: FastAPI) -> None:
    """Install the table: every exception a route raises becomes an answer in OpenAI's shape."""
    for kind, describe in FAILURES.items():
        app.add_exception_handler(kind, _handler(describe))


def _handler(describe: "Describe") -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        failure = describe(error)
        message = failure.message or _sentence(error)
        param = error.param if isinstance(error, UsageError) else None
        return answer(failure, message, WIRE_NAMES.get(param or "", param))

    return handle


def _sentence(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{error} (hint: {hint})" if hint else str(error)


Describe = Callable[[Exception], Failure]


def _http(error: Exception) -> Failure:
    assert isinstance(error, HTTPException)
    phrase = http.HTTPStatus(error.status_code).phrase.lower()
    return Failure(
        error.status_code,
        "invalid_request_error",
        phrase.replace(" ", "_"),
        error.detail if error.detail.lower() != phrase else f"{phrase}: see /docs for what is here",
        error.headers or {},
    )


def _queue_full(error: Exception) -> Failure:
    assert isinstance(error, QueueFull)
    headers = {"retry-after": str(error.retry_after_s)}
    return Failure(429, "rate_limit_error", "queue_full", headers=headers)


FAILURES: dict[type[Exception], Describe] = {
    UsageError: lambda _: Failure(400, "invalid_request_error", "invalid_value"),
    ZImageError: lambda _: Failure(500, "server_error", "generation_failed"),
    HTTPException: _http,
    QueueFull: _queue_full,
    QueueClosed: lambda _: Failure(
        503, "server_error", "shutting_down", "the server is shutting down", {"retry-after": "5"}
    ),
    JobCancelled: lambda _: Failure(CLIENT_GONE, "server_error", "cancelled"),
    ClientDisconnect: lambda _: Failure(CLIENT_GONE, "server_error", "cancelled"),
}
