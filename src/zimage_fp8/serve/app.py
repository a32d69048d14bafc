"""The HTTP server as a value: `build_app(engine)` gives an ASGI app, and nothing lives outside it.

    POST /v1/images/generations     a prompt in, pictures out: JSON, a stream, or the bytes
    POST /v1/images/edits           the same, starting from a picture
    GET  /v1/pictures/{name}        a picture that was asked for as a URL
    GET  /v1/models, /v1/models/{id}
    GET  /health, /ready, /version, /metrics
    GET  /                          the playground
    /sdapi/v1/…                     AUTOMATIC1111's API, when the operator asks for it

A generation is: parse the body, queue one job per picture, wait for them or for the client to
leave, encode off the event loop, join the answer as bytes.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from zimage_fp8 import __version__
from zimage_fp8.errors import UsageError
from zimage_fp8.model.request import MAX_STEPS, GeneratedImage, ImageRequest
from zimage_fp8.protocol import (
    MAX_IMAGES,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    EditsRequest,
    ImagesRequest,
    parse_images_request,
    parse_size,
)
from zimage_fp8.serve.a1111 import add_a1111
from zimage_fp8.serve.catalog import Card, Catalog
from zimage_fp8.serve.edits import Edit, parse_edit
from zimage_fp8.serve.failures import answer_failures
from zimage_fp8.serve.guard import Guard, allow_origins, read_body
from zimage_fp8.serve.job import Engine, Job
from zimage_fp8.serve.jobs import JobQueue
from zimage_fp8.serve.metrics import Metrics
from zimage_fp8.serve.openapi import EDIT, GENERATION, PICTURE, PLAIN, TEXT
from zimage_fp8.serve.playground import add_playground
from zimage_fp8.serve.reply import Drawn, Reply, raw_format
from zimage_fp8.serve.request_log import RequestLog
from zimage_fp8.serve.shelf import Shelf, public_base
from zimage_fp8.serve.stream import EventStream, PictureStream, cancel_all, cancel_when_gone
from zimage_fp8.serve.tracing import Traces, add_stages
from zimage_fp8.serve.warm_up import WarmUp

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
DECODERS = 2  # pictures that clients sent, decoded at once: each may take 200 MB for a moment


@dataclass(frozen=True)
class ServeOptions:
    """What a server's operator decides, apart from the models.

    cards: what else /v1/models tells of a model, by name. warm_up: draw before /ready says so.
    max_batch: pictures of one shape that may share forwards; together they may round differently.
    max_upload_bytes: of a body with pictures in it. embed_metadata: write the prompt and settings
    into each picture. log_prompts: prompts are private, so not by default. a1111: also speak
    AUTOMATIC1111's API. api_keys: when there are any, every request but the open ones must carry
    one. cors_origins: web pages that may ask; none
    by default, `*` for all. tracer: OpenTelemetry's, for spans.
    """

    cards: Mapping[str, Card] = field(default_factory=dict)
    warm_up: bool = False
    max_waiting: int = 32
    max_batch: int = 1
    max_images: int = MAX_IMAGES
    max_pixels: int = 2048 * 2048
    max_steps: int = MAX_STEPS
    max_prompt_length: int = MAX_PROMPT_LENGTH
    max_body_bytes: int = 2**20
    max_upload_bytes: int = 20 * 2**20
    embed_metadata: bool = True
    log_prompts: bool = False
    a1111: bool = False
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    tracer: "Tracer | None" = None


def build_app(
    engines: Engine | Mapping[str, Engine], options: ServeOptions | None = None
) -> FastAPI:
    """An ASGI app that draws with these engines, on one thread.

    Several engines go by the names that requests choose from; a single one by its own. Its thread
    starts and ends with the app's lifespan. `app.state.drain()` refuses what has not begun; call it
    when the process is asked to end.
    """
    named = engines if isinstance(engines, Mapping) else {engines.model: engines}
    service = Service(Catalog(named, options.cards if options else None), options or ServeOptions())
    app = FastAPI(title="zimage-fp8", version=__version__, lifespan=service.lifespan)
    app.state.drain = service.drain
    add = app.add_api_route
    add(GENERATIONS, service.generate, methods=["POST"], **GENERATION)
    add(EDITS, service.edit, methods=["POST"], **EDIT)
    add("/v1/pictures/{name}", service.picture, **PICTURE)
    add("/v1/models", service.list_models, **PLAIN)
    add("/v1/models/{name:path}", service.describe_model, **PLAIN)
    add_playground(app)
    if service.options.a1111:
        add_a1111(app, service)
    add("/health", service.health, **PLAIN)
    add("/ready", service.ready, **PLAIN)
    add("/version", service.version, **PLAIN)
    add("/metrics", service.show_metrics, **TEXT)
    answer_failures(app)
    # The last one added is the outermost: what the guard refuses is logged and counted too.
    app.add_middleware(Guard, keys=service.options.api_keys, origins=service.options.cors_origins)
    allow_origins(app, service.options.cors_origins)
    app.add_middleware(RequestLog, on_answer=service.count_answer)
    if service.options.tracer:
        app.add_middleware(Traces, tracer=service.options.tracer)
    return app


class Service:
    """The routes, around a catalog of engines and their one queue."""

    def __init__(self, catalog: Catalog, options: ServeOptions) -> None:
        self.catalog = catalog
        self.options = options
        self.queue = JobQueue(options.max_waiting, options.max_batch)
        self.shelf = Shelf()
        self.metrics = Metrics(self.queue, catalog)
        self.warm_up = WarmUp(self.queue)
        self._decoders = asyncio.Semaphore(DECODERS)
        self._has_noted_a_name = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.queue.start()
        if self.options.warm_up:
            self.warm_up.start(self.catalog.engines)
        yield
        await asyncio.to_thread(self.queue.close)

    def drain(self) -> None:
        """Refuse what has not begun, from any thread."""
        self.warm_up.cancel()
        self.queue.drain()

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations"""
        wanted = parse_images_request(await read_body(request, self.options.max_body_bytes))
        name = self.model_for(wanted)
        return await self._answer(request, wanted, self.first_of(wanted, name), name)

    async def edit(self, request: Request) -> Response:
        """POST /v1/images/edits"""
        self.queue.refuse_if_full()  # before megabytes are read for nothing
        edit = await parse_edit(request, await read_body(request, self.options.max_upload_bytes))
        name = self.model_for(edit.wanted)
        return await self._answer(request, edit.wanted, await self.first_edit(edit, name), name)

    def first_of(self, wanted: ImagesRequest, name: str) -> ImageRequest:
        """The first of the pictures. Raises UsageError for what is forbidden or impossible."""
        first = first_request(wanted, self.catalog.engines[name].default_size)
        self._validate(wanted, first, name)
        return first

    async def first_edit(self, edit: Edit, name: str) -> ImageRequest:
        """The first of the pictures, with its source decoded off the event loop."""
        most = self.catalog.engines[name].default_size
        async with self._decoders:
            pictures = await asyncio.to_thread(edit.open, most)
            first = first_request(edit.wanted, pictures.size)
            self._validate(edit.wanted, first, name)
            return await asyncio.to_thread(pictures.put_into, first)

    async def _answer(
        self, request: Request, wanted: ImagesRequest, first: ImageRequest, name: str
    ) -> Response:
        """Draw `wanted.n` pictures like `first` with the model `name`, and tell of them."""
        raw = raw_format(request.headers.get("accept", ""), wanted)
        if wanted.stream:
            engine = self.catalog.engines[name]
            pictures = PictureStream(in_seeds(first, wanted.n), engine, wanted.partial_images)
            self._submit(pictures.jobs, name, self.client_of(request))
            return EventStream(pictures, self._reply(wanted, wanted.output_format, name))

        def answer(reply: Reply, files: Sequence[Drawn]) -> Response:
            if raw:
                return reply.as_file(files[0])
            if wanted.response_format == "url":
                return self._as_urls(request, reply, files)
            return reply.as_json(files)

        return await self.draw(request, wanted, first, name, raw or wanted.output_format, answer)

    async def draw(
        self,
        request: Request,
        wanted: ImagesRequest,
        first: ImageRequest,
        name: str,
        output_format: str,
        answer: Callable[[Reply, Sequence[Drawn]], Response],
        on_jobs: Callable[[Sequence[Job]], None] = lambda jobs: None,
    ) -> Response:
        """What `answer` makes of `wanted.n` pictures as files, off the event loop like the files
        themselves. `on_jobs` is told of the jobs before they are queued."""
        reply = self._reply(wanted, output_format, name)
        jobs = [Job(each, self.catalog.engines[name]) for each in in_seeds(first, wanted.n)]
        on_jobs(jobs)
        self._submit(jobs, name, self.client_of(request), patience_s(request))
        images = await drawn(request, jobs)
        return await asyncio.to_thread(lambda: answer(reply, list(map(reply.encode, jobs, images))))

    @property
    def max_upload_bytes(self) -> int:
        return self.options.max_upload_bytes

    def client_of(self, request: Request) -> object:
        return client_of(request, self.options.api_keys)

    async def picture(self, name: str) -> Response:
        """GET /v1/pictures/{name}"""
        if (file := self.shelf.get(name)) is None:
            raise HTTPException(404, "no such picture: it has expired, or never was")
        headers = {"cache-control": f"private, max-age={self.shelf.lifetime_s:.0f}, immutable"}
        media_type = f"image/{name.rpartition('.')[2]}"
        return Response(file, headers=headers, media_type=media_type)

    async def list_models(self) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": self.catalog.cards()})

    async def describe_model(self, name: str) -> Response:
        """GET /v1/models/{id}"""
        return JSONResponse(self.catalog.card(name))

    async def health(self) -> Response:
        """GET /health: 200 while the engine's thread lives."""
        alive = self.queue.is_alive
        return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)

    async def ready(self) -> Response:
        """GET /ready: 200 from the end of the warm-up to the moment of shutting down, else 503."""
        is_warm = self.warm_up.is_done or not self.options.warm_up
        if is_warm and self.queue.is_alive and not self.queue.is_closed:
            return JSONResponse({"status": "ready"})
        status = self.warm_up.problem or ("not ready" if is_warm else "warming up")
        return JSONResponse({"status": status}, 503, {"retry-after": "5"})

    async def version(self) -> Response:
        """GET /version: this program, and what the first engine says of itself."""
        facts = self.catalog.facts
        return JSONResponse({"version": __version__, **facts[self.catalog.default]})

    async def show_metrics(self) -> Response:
        """GET /metrics, in Prometheus' text format"""
        return Response(self.metrics.render(), media_type=self.metrics.media_type)

    def count_answer(self, path: str, status: int, duration_s: float) -> None:
        if path in (GENERATIONS, EDITS):
            self.metrics.count_answer(status, duration_s)

    def _submit(
        self, jobs: Sequence[Job], name: str, client: object, patience_s: float | None = None
    ) -> None:
        self.queue.submit(jobs, client, patience_s)
        for job in jobs:
            self.metrics.watch(job, name)

    def _validate(self, wanted: ImagesRequest, request: ImageRequest, name: str) -> None:
        """Raise UsageError for what the operator forbids or the engine cannot draw."""
        size, options = f"{request.width}x{request.height}", self.options
        limits = (
            ("size", f"size {size} is {{}} pixels", request.width * request.height, "max_pixels"),
            ("steps", "steps is {}", request.steps, "max_steps"),
            ("n", "n is {}", wanted.n, "max_images"),
            ("prompt", "the prompt has {} characters", len(wanted.prompt), "max_prompt_length"),
        )
        for param, said, value, option in limits:
            if value > (most := getattr(options, option)):
                raise UsageError(
                    f"{said.format(value)}, this server takes at most {most}", param=param
                )
        self.catalog.engines[name].validate(request)

    def _reply(self, wanted: ImagesRequest, output_format: str, name: str) -> Reply:
        return Reply(
            self.catalog.engines[name],
            self.catalog.facts[name],
            wanted,
            output_format,
            self.options.embed_metadata,
            self._on_drawn,
            warnings=[*filter(None, [self.catalog.warning_for(wanted.model)]), *wanted.warnings],
            kind="image_edit" if isinstance(wanted, EditsRequest) else "image_generation",
        )

    def _on_drawn(self, job: Job, picture: Drawn) -> None:
        self.metrics.count_file(picture.picture_s)
        if self.options.tracer:
            add_stages(self.options.tracer, job, picture)

    def _as_urls(self, request: Request, reply: Reply, files: Sequence[Drawn]) -> Response:
        base = public_base(request.url, request.headers)
        names = [self.shelf.put(one.file, reply.output_format) for one in files]
        urls = [f"{base}/v1/pictures/{name}" for name in names]
        return reply.as_urls(files, urls, int(time.time() + self.shelf.lifetime_s))

    def model_for(self, wanted: ImagesRequest) -> str:
        """The model's name; the prompt is logged if asked to, and so is the first unknown name."""
        if self.options.log_prompts:
            log.info("prompt: %s", wanted.prompt)
        name = self.catalog.name_for(wanted.model)
        if wanted.model not in (None, name) and not self._has_noted_a_name:
            self._has_noted_a_name = True
            log.info("a client asks for model %r; %s serves every other name", wanted.model, name)
        return name


def first_request(wanted: ImagesRequest, default_size: tuple[int, int]) -> ImageRequest:
    """The first of the `wanted.n` pictures; its seed is chosen here unless it was sent."""
    width, height = default_size if wanted.size == "auto" else parse_size(wanted.size)
    return ImageRequest(
        prompt=wanted.prompt,
        width=width,
        height=height,
        negative_prompt=wanted.negative_prompt,
        steps=wanted.num_inference_steps,
        guidance=wanted.guidance_scale,
        seed=random.randrange(MAX_SEED) if wanted.seed is None else wanted.seed,
    )


def in_seeds(first: ImageRequest, count: int) -> list[ImageRequest]:
    """`count` pictures take the seeds seed, seed + 1, …"""
    return [replace(first, seed=first.seed + index) for index in range(count)]


def client_of(request: Request, api_keys: Sequence[str]) -> object:
    """Who takes turns with others: the holder of a key where there are keys, else an address."""
    if api_keys:
        return request.headers.get("authorization")
    return request.client.host if request.client else None


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
