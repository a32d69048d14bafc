"""The HTTP server as a value: `build_app(engine)` gives an ASGI app, and nothing lives outside it.

    POST /v1/images/generations     a prompt in, pictures out: JSON, a stream, or the bytes
    GET  /v1/pictures/{name}        a picture that was asked for as a URL
    GET  /v1/models, /v1/models/{id}
    GET  /health, /ready, /version, /metrics
    GET  /                          the playground

A generation is: parse the body, queue one job per picture, wait for them or for the client to
leave, encode off the event loop, join the answer as bytes.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import JsonValue, TypeAdapter
from starlette.exceptions import HTTPException

from zimage_fp8 import __version__
from zimage_fp8.errors import UsageError
from zimage_fp8.model.pipeline import MAX_STEPS, GeneratedImage, ImageRequest
from zimage_fp8.protocol import MAX_SEED, ImagesRequest, parse_images_request, parse_size
from zimage_fp8.serve.failures import answer_failures
from zimage_fp8.serve.guard import Guard, allow_origins, read_body
from zimage_fp8.serve.jobs import Engine, Job, JobQueue
from zimage_fp8.serve.metrics import Metrics
from zimage_fp8.serve.playground import add_playground
from zimage_fp8.serve.reply import Drawn, Reply, raw_format
from zimage_fp8.serve.request_log import RequestLog
from zimage_fp8.serve.shelf import Shelf, public_base
from zimage_fp8.serve.stream import EventStream, PictureStream, cancel_all, cancel_when_gone

log = logging.getLogger(__name__)

GENERATIONS = "/v1/images/generations"
JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class ServeOptions:
    """What a server's operator decides, apart from the model.

    names: model ids that /v1/models lists; requests may use any. embed_metadata: write the prompt
    and settings into each picture. log_prompts: prompts are private, so not by default. api_keys:
    when there are any, every request but the open ones must carry one. cors_origins: web pages
    that may ask; none by default, `*` for all.
    """

    names: Sequence[str] = ()
    max_waiting: int = 32
    max_pixels: int = 2048 * 2048
    max_steps: int = MAX_STEPS
    max_body_bytes: int = 2**20
    embed_metadata: bool = True
    log_prompts: bool = False
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()


def build_app(engine: Engine, options: ServeOptions | None = None) -> FastAPI:
    """An ASGI app that draws with `engine`. Its thread starts and ends with the app's lifespan.

    `app.state.drain()` refuses what has not begun; call it when the process is asked to end.
    """
    service = Service(engine, options or ServeOptions())
    app = FastAPI(title="zimage-fp8", version=__version__, lifespan=service.lifespan)
    app.state.drain = service.queue.drain
    app.add_api_route(GENERATIONS, service.generate, methods=["POST"], openapi_extra=BODY_SCHEMA)
    app.add_api_route("/v1/pictures/{name}", service.picture)
    app.add_api_route("/v1/models", service.list_models)
    app.add_api_route("/v1/models/{name:path}", service.describe_model)
    add_playground(app)
    app.add_api_route("/health", service.health)
    app.add_api_route("/ready", service.ready)
    app.add_api_route("/version", service.version)
    app.add_api_route("/metrics", service.show_metrics)
    answer_failures(app)
    # The last one added is the outermost: what the guard refuses is logged and counted too.
    app.add_middleware(Guard, keys=service.options.api_keys, origins=service.options.cors_origins)
    allow_origins(app, service.options.cors_origins)
    app.add_middleware(RequestLog, on_answer=service.count_answer)
    return app


# The body is parsed by us, for errors in OpenAI's shape; FastAPI only needs to document it.
BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ImagesRequest.model_json_schema()}},
    }
}


class Service:
    """The routes, around one engine and its queue."""

    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        self.engine = engine
        self.options = options
        self.names = tuple(options.names) or (engine.model,)
        self.queue = JobQueue(engine, options.max_waiting)
        self.shelf = Shelf()
        # Asked once: it runs git and reads package versions.
        self.facts = JSON_OBJECT.validate_python(engine.describe())
        self.metrics = Metrics(self.queue, self.facts)
        self.created = int(time.time())
        self._has_noted_a_name = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.queue.start()
        yield
        await asyncio.to_thread(self.queue.close)

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations"""
        wanted = parse_images_request(await read_body(request, self.options.max_body_bytes))
        self._note(wanted)
        raw = raw_format(request.headers.get("accept", ""), wanted)
        requests = image_requests(wanted, self.engine.default_size)
        self._validate(requests[0])
        reply = self._reply(wanted, raw or wanted.output_format)
        if wanted.stream:
            pictures = PictureStream(requests, wanted.partial_images)
            self._submit(pictures.jobs)
            return EventStream(pictures, reply)
        jobs = [Job(each) for each in requests]
        self._submit(jobs, patience_s(request))
        images = await drawn(request, jobs)
        files = await asyncio.to_thread(lambda: list(map(reply.encode, jobs, images)))
        if raw:
            return reply.as_file(files[0])
        if wanted.response_format == "url":
            return self._as_urls(request, reply, files)
        return await asyncio.to_thread(reply.as_json, files)  # base64 of megabytes

    async def picture(self, name: str) -> Response:
        """GET /v1/pictures/{name}"""
        if (file := self.shelf.get(name)) is None:
            raise HTTPException(404, "no such picture: it has expired, or never was")
        headers = {"cache-control": f"private, max-age={self.shelf.lifetime_s:.0f}, immutable"}
        media_type = f"image/{name.rpartition('.')[2]}"
        return Response(file, headers=headers, media_type=media_type)

    async def list_models(self) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.names]})

    async def describe_model(self, name: str) -> Response:
        """GET /v1/models/{id}"""
        if name not in self.names:
            known = ", ".join(self.names)
            raise HTTPException(404, f"no model {name!r} here, only {known}")
        return JSONResponse(self._card(name))

    async def health(self) -> Response:
        """GET /health: 200 while the engine's thread lives."""
        alive = self.queue.is_alive
        return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)

    async def ready(self) -> Response:
        """GET /ready: 200 while requests are accepted, 503 from the moment of shutting down."""
        if self.queue.is_alive and not self.queue.is_closed:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, {"retry-after": "5"})

    async def version(self) -> Response:
        """GET /version: this program, and what the engine says of itself."""
        return JSONResponse({"version": __version__, **self.facts})

    async def show_metrics(self) -> Response:
        """GET /metrics, in Prometheus' text format"""
        return Response(self.metrics.render(), media_type=self.metrics.media_type)

    def count_answer(self, path: str, status: int, duration_s: float) -> None:
        if path == GENERATIONS:
            self.metrics.count_answer(status, duration_s)

    def _submit(self, jobs: Sequence[Job], patience_s: float | None = None) -> None:
        self.queue.submit(jobs, patience_s)
        for job in jobs:
            self.metrics.watch(job)

    def _validate(self, request: ImageRequest) -> None:
        """Raise UsageError for what the operator forbids or the engine cannot draw."""
        if request.width * request.height > self.options.max_pixels:
            raise UsageError(
                f"size {request.width}x{request.height}: this server draws at most "
                f"{self.options.max_pixels} pixels",
                param="size",
            )
        if request.steps > self.options.max_steps:
            raise UsageError(
                f"steps is {request.steps}, this server takes at most {self.options.max_steps}",
                param="steps",
            )
        self.engine.validate(request)

    def _reply(self, wanted: ImagesRequest, output_format: str) -> Reply:
        embed, on_file = self.options.embed_metadata, self.metrics.count_file
        return Reply(self.engine, self.facts, wanted, output_format, embed, on_file)

    def _as_urls(self, request: Request, reply: Reply, files: Sequence[Drawn]) -> Response:
        base = public_base(request.url, request.headers)
        names = [self.shelf.put(one.file, reply.output_format) for one in files]
        urls = [f"{base}/v1/pictures/{name}" for name in names]
        return reply.as_urls(files, urls, int(time.time() + self.shelf.lifetime_s))

    def _card(self, name: str) -> dict[str, object]:
        width, height = self.engine.default_size
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "zimage-fp8",
            "policy": self.engine.policy,
            "default_size": f"{width}x{height}",
        }

    def _note(self, wanted: ImagesRequest) -> None:
        """Log the prompt if asked to, and the first model name that is not ours."""
        if self.options.log_prompts:
            log.info("prompt: %s", wanted.prompt)
        name = wanted.model
        if name and name not in self.names and not self._has_noted_a_name:
            self._has_noted_a_name = True
            log.info("a client asks for model %r; every name is served by %s", name, self.names[0])


def image_requests(wanted: ImagesRequest, default_size: tuple[int, int]) -> list[ImageRequest]:
    """One request per picture: n pictures take the seeds seed, seed + 1, …"""
    width, height = default_size if wanted.size == "auto" else parse_size(wanted.size)
    seed = random.randrange(MAX_SEED) if wanted.seed is None else wanted.seed
    first = ImageRequest(
        prompt=wanted.prompt,
        width=width,
        height=height,
        negative_prompt=wanted.negative_prompt,
        steps=wanted.num_inference_steps,
        guidance=wanted.guidance_scale,
        seed=seed,
    )
    return [replace(first, seed=seed + index) for index in range(wanted.n)]


def patience_s(request: Request) -> float | None:
    """How long OpenAI's client waits before it gives up and sends everything again."""
    try:
        seconds = float(request.headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


async def drawn(request: Request, jobs: Sequence[Job]) -> list[GeneratedImage]:
    """The pictures, in order. When the client leaves or one job fails, the others are cancelled.

    Raises whatever stopped the first job that failed: JobCancelled when the client left.
    """
    watcher = asyncio.create_task(cancel_when_gone(request.receive, jobs))
    try:
        return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    finally:
        watcher.cancel()
        cancel_all(jobs)
