"""The Hub's HTTP interface as far as publishing needs it: accounts, repositories, LFS, collections.

It keeps what it is sent, byte for byte, so that a test can look at what a person would find.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

TOKEN = "hf_test"


@dataclass
class Refusal:
    """Answer `status` to the next `times` requests whose `METHOD /path` matches `pattern`."""

    pattern: str
    status: int
    times: int = 1_000_000
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """The state behind the interface. files: repository -> path -> content."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[str]:
    """The interface on a socket of its own; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_hub(hub), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def build_hub(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def gate(request: Request, call_next):
        line = f"{request.method} {request.url.path}"
        hub.requests.append(line)
        for refusal in hub.refusals:
            if refusal.times and re.search(refusal.pattern, line):
                refusal.times -= 1
                body = {"error": refusal.message}
                return JSONResponse(body, refusal.status, headers=refusal.headers)
        if not line.startswith("PUT /lfs/") and not is_known(request):
            return JSONResponse({"error": "Invalid credentials"}, 401)
        return await call_next(request)

    @app.get("/api/whoami-v2")
    def whoami():
        return {"type": "user", "name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}]}

    @app.post("/api/repos/create")
    async def create_repo(request: Request):
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{request.base_url}{name}", "name": name}
        if name in hub.files:
            return JSONResponse({"error": "You already created this model repo", **answer}, 409)
        hub.files[name] = {".gitattributes": b""}
        return answer

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request):
        _, front, _ = (await request.json())["content"].split("---\n", 2)
        data = yaml.safe_load(front)
        errors = [{"message": f'"{key}" is missing'} for key in ("base_model",) if key not in data]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    def tree(owner: str, name: str):
        found = hub.files[f"{owner}/{name}"]
        return [
            {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
            for path, content in found.items()
        ]

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    def model(owner: str, name: str):
        if f"{owner}/{name}" not in hub.files:
            return JSONResponse({"error": "Repository not found"}, 404)
        return {"_id": "1", "id": f"{owner}/{name}", "sha": "c0ffee", "siblings": [], "tags": []}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, request: Request):
        there = hub.files[f"{owner}/{name}"]

        def answer(path: str) -> dict[str, object]:
            is_large = path.endswith(".safetensors")
            digest = large_digest if is_large else git_digest
            oid = digest(there[path]) if path in there else None
            mode = "lfs" if is_large else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return {"files": [answer(file["path"]) for file in (await request.json())["files"]]}

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request):
        def answer(one: dict[str, Any]) -> dict[str, Any]:
            if one["oid"] in hub.large:  # LFS: no action means that the content is there
                return one
            return {**one, "actions": {"upload": {"href": f"{request.base_url}lfs/{one['oid']}"}}}

        objects = [answer(one) for one in (await request.json())["objects"]]
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/{oid}")
    async def put_large(oid: str, request: Request):
        content = await request.body()
        assert large_digest(content) == oid
        hub.large[oid] = content
        return Response()

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, request: Request):
        full = f"{owner}/{name}"
        for line in map(json.loads, (await request.body()).splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[full][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[full][value["path"]] = hub.large[value["oid"]]
        hub.commits.append(full)
        url = f"{request.base_url}{full}/commit/c0ffee"
        return {"success": True, "commitOid": "c0ffee", "commitUrl": url}

    @app.post("/api/collections")
    async def create_collection(request: Request):
        asked = await request.json()
        slug = f"{asked['namespace']}/{asked['title'].lower()}-0123456789abcdef01234567"
        if slug in hub.collections:
            return JSONResponse({"error": "exists", "slug": slug}, 409)
        hub.collections[slug] = {**asked, "slug": slug, "items": []}
        return described(hub.collections[slug])

    @app.get("/api/collections/{owner}/{slug}")
    def get_collection(owner: str, slug: str):
        return described(hub.collections[f"{owner}/{slug}"])

    @app.post("/api/collections/{owner}/{slug}/items")
    async def add_item(owner: str, slug: str, request: Request):
        item = (await request.json())["item"]
        items = hub.collections[f"{owner}/{slug}"]["items"]
        if item["id"] in items:
            return JSONResponse({"error": "already in the collection"}, 409)
        items.append(item["id"])
        return described(hub.collections[f"{owner}/{slug}"])

    return app


def described(collection: dict[str, Any]) -> dict[str, Any]:
    """A collection as the Hub tells it."""
    items = [
        {"_id": str(place), "id": name, "type": "model", "position": place}
        for place, name in enumerate(collection["items"])
    ]
    return {
        **collection,
        "items": items,
        "owner": {"name": collection["namespace"]},
        "lastUpdated": "2026-11-22T12:00:00.000Z",
        "position": 0,
        "theme": "blue",
        "upvotes": 0,
    }


def is_known(request: Request) -> bool:
    return request.headers.get("authorization") == f"Bearer {TOKEN}"


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
