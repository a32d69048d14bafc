"""Who may ask, and how much: API keys, foreign web pages, the size of a body."""

import base64
import hashlib
import hmac
from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from zimage_fp8.serve.failures import Failure, answer

# Load balancers carry no keys, the random name of a picture is its key, and the playground's page,
# which is the same for everybody, is where a person enters one.
OPEN_PATHS = ("/health", "/ready", "/")
OPEN_PREFIXES = ("/v1/pictures/", "/playground/")

# A1111's clients know user and password only: there the password is the key.
BASIC_PREFIX = "/sdapi/"

UNAUTHORIZED = Failure(
    401, "authentication_error", "invalid_api_key", headers={"www-authenticate": "Bearer"}
)
FOREIGN_PAGE = Failure(403, "permission_error", "foreign_origin")


class Guard:
    """ASGI middleware that answers 401 and 403 in OpenAI's envelope.

    Keys are compared as digests, all of them, in constant time. Without CORS a browser hides our
    answers from foreign pages but still delivers their simple POSTs, which would draw pictures: so
    what browsers mark as coming from another site is refused, unless its origin is allowed.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], origins: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await answer(*refusal)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[Failure, str] | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD") and self._is_foreign(headers):
            return FOREIGN_PAGE, "web pages of other sites may not use this server"
        path = scope["path"]
        if not self._digests or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
            return None
        key = _key_of(headers, is_basic=path.startswith(BASIC_PREFIX))
        if not key:
            return UNAUTHORIZED, "no API key: send it as Authorization: Bearer KEY"
        if not self._is_known(key):
            return UNAUTHORIZED, "this API key is not known here"
        return None

    def _is_known(self, key: str) -> bool:
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])

    def _is_foreign(self, headers: Headers) -> bool:
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return False
        return "*" not in self._origins and headers.get("origin") not in self._origins


def _key_of(headers: Headers, *, is_basic: bool) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    if scheme.lower() == "basic" and is_basic:
        try:
            return base64.b64decode(key).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins read our answers; without any, no header is sent at all."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-seed", "server-timing", "retry-after"],
        )


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, of which at most `max_bytes` are ever held. Raises HTTPException 413 beyond."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"the body is too large: at most {max_bytes} bytes")
    return bytes(body)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
