"""The playground: a static page at `/`, whose files are served from memory and nothing else.

It talks to the same server through the public API, so it has no privileges and needs no key of its
own: a server with keys refuses it until its user enters one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

STATIC = Path(__file__).with_name("static")
PREFIX = "/playground/"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing foreign, nothing inline, no text that becomes markup; pictures come as blobs, out of JSON.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # The page belongs to the server's version: ask each time, and mostly hear that nothing changed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def add_playground(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/playground/`; all are read here, once."""
    files = {path.name: _read(path) for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}

    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"the playground has no file {name!r}")
        return _answer(request, files[name])

    methods = ["GET", "HEAD"]
    app.add_api_route("/", page, methods=methods, include_in_schema=False)
    app.add_api_route(PREFIX + "{name}", file, methods=methods, include_in_schema=False)


def _read(path: Path) -> _File:
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return _File(body, MEDIA_TYPES[path.suffix], etag)


def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)
