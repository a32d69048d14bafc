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

from zimage_fp8.errors import OutOfMemory, UsageError, ZImageError
from zimage_fp8.protocol import ApiError, ErrorAnswer, UnsupportedField
from zimage_fp8.serve.job import JobCancelled
from zimage_fp8.serve.jobs import EngineLost, Overloaded, QueueClosed, TooSlow

# The engine's own names of what the wire calls otherwise.
WIRE_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}

# OpenAI's client would otherwise send twice more what failed for a lasting reason.
DO_NOT_RETRY = {"x-should-retry": "false"}

# Python calls it "Request Entity Too Large" until 3.12.
HTTP_CODES = {413: "content_too_large"}

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


def error_answer(error: Exception) -> tuple[Failure, ErrorAnswer]:
    """The row for `error`, and the envelope that says it. Unknown errors are INTERNAL."""
    kinds = (kind for kind in type(error).__mro__ if kind in FAILURES)
    kind = next(kinds, None)
    failure = FAILURES[kind](error) if kind else INTERNAL
    message = failure.message or _sentence(error)
    param = error.param if isinstance(error, UsageError) else None
    return failure, _envelope(failure, message, WIRE_NAMES.get(param or "", param))


def answer(failure: Failure, message: str, param: str | None = None) -> Response:
    return _response(failure, _envelope(failure, message, param))


def _envelope(failure: Failure, message: str, param: str | None) -> ErrorAnswer:
    error = ApiError(message=message, type=failure.type, param=param, code=failure.code)
    return ErrorAnswer(error=error)


def _response(failure: Failure, body: ErrorAnswer) -> Response:
    return Response(
        body.model_dump_json(),
        failure.status,
        dict(failure.headers),
        media_type="application/json",
    )


def answer_failures(app: FastAPI) -> None:
    """Install the table: every exception a route raises becomes an answer in OpenAI's shape."""
    for kind in FAILURES:
        app.add_exception_handler(kind, _handle)


def _handle(request: Request, error: Exception) -> Response:
    return _response(*error_answer(error))


def _sentence(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{error} (hint: {hint})" if hint else str(error)


def _http(error: Exception) -> Failure:
    assert isinstance(error, HTTPException)
    phrase = http.HTTPStatus(error.status_code).phrase.lower()
    return Failure(
        error.status_code,
        "invalid_request_error",
        HTTP_CODES.get(error.status_code, phrase.replace(" ", "_")),
        error.detail if error.detail.lower() != phrase else f"{phrase}: see /docs for what is here",
        error.headers or {},
    )


def _overloaded(error: Exception) -> Failure:
    assert isinstance(error, Overloaded)
    seconds = error.retry_after_s
    return Failure(
        429,
        "rate_limit_error",
        "deadline_too_short" if isinstance(error, TooSlow) else "queue_full",
        headers={"retry-after": str(seconds)} if seconds else DO_NOT_RETRY,
    )


FAILURES: dict[type[Exception], Callable[[Exception], Failure]] = {
    UnsupportedField: lambda _: Failure(400, "invalid_request_error", "unsupported_parameter"),
    UsageError: lambda _: Failure(400, "invalid_request_error", "invalid_value"),
    ZImageError: lambda _: Failure(500, "server_error", "generation_failed"),
    HTTPException: _http,
    Overloaded: _overloaded,
    QueueClosed: lambda _: Failure(
        503, "server_error", "shutting_down", "the server is shutting down", {"retry-after": "5"}
    ),
    EngineLost: lambda _: Failure(
        503,
        "server_error",
        "engine_lost",
        "the device is lost; this server must be started again",
        {"retry-after": "30"},
    ),
    JobCancelled: lambda _: Failure(CLIENT_GONE, "server_error", "cancelled"),
    ClientDisconnect: lambda _: Failure(CLIENT_GONE, "server_error", "cancelled"),
    OutOfMemory: lambda _: Failure(500, "server_error", "out_of_memory", headers=DO_NOT_RETRY),
}
