"""The HTTP server as a value: `build_app(engine)` gives an ASGI app, and nothing lives outside it.

    POST /v1/images/generations     a prompt in, pictures out
    GET  /v1/models, /v1/models/{id}
    GET  /health, /version

A generation is: parse the body, queue one job per picture, wait for them or for the client to
leave, encode off the event loop, join the answer as bytes.
"""

import asyncio
import base64
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import JsonValue, TypeAdapter
from starlette.exceptions import HTTPException

from zimage_fp8 import __version__
from zimage_fp8.model.pipeline import GeneratedImage, ImageRequest
from zimage_fp8.picture import encode_png
from zimage_fp8.protocol import (
    MAX_SEED,
    ImagesAnswer,
    ImagesRequest,
    RunFacts,
    Usage,
    parse_images_request,
    parse_size,
)
from zimage_fp8.serve.failures import answer_failures
from zimage_fp8.serve.jobs import Engine, Job, JobQueue
from zimage_fp8.serve.memory import peak_memory_bytes
from zimage_fp8.serve.request_log import RequestLog

log = logging.getLogger(__name__)

PIXELS_PER_TOKEN = 16 * 16
JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class ServeOptions:
    """What a server's operator decides, apart from the model.

    names: model ids that /v1/models lists; requests may use any. embed_metadata: write the prompt
    and settings into each PNG. log_prompts: prompts are private, so not by default.
    """

    names: Sequence[str] = ()
    max_waiting: int = 32
    embed_metadata: bool = True
    log_prompts: bool = False


def build_app(engine: Engine, options: ServeOptions | None = None) -> FastAPI:
    """An ASGI app that draws with `engine`. Its thread starts and ends with the app's lifespan."""
    service = Service(engine, options or ServeOptions())
    app = FastAPI(title="zimage-fp8", version=__version__, lifespan=service.lifespan)
    app.add_api_route(
        "/v1/images/generations", service.generate, methods=["POST"], openapi_extra=BODY_SCHEMA
    )
    app.add_api_route("/v1/models", service.list_models)
    app.add_api_route("/v1/models/{name:path}", service.describe_model)
    app.add_api_route("/health", service.health)
    app.add_api_route("/version", service.version)
    app.add_middleware(RequestLog)
    answer_failures(app)
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
        # Asked once: it runs git and reads package versions.
        self.facts = JSON_OBJECT.validate_python(engine.describe())
        self.created = int(time.time())
        self._has_noted_a_name = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.queue.start()
        yield
        await asyncio.to_thread(self.queue.close)

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations"""
        wanted = parse_images_request(await request.body())
        self._note(wanted)
        requests = image_requests(wanted, self.engine.default_size)
        self.engine.validate(requests[0])
        jobs = self.queue.submit(requests)
        images = await drawn(request, jobs)
        started = time.perf_counter()
        pictures = await asyncio.to_thread(self._encode, images)
        timings_s = {**_timings(jobs, images), "picture": time.perf_counter() - started}
        return answer_with(pictures, requests, self._envelope(wanted, images, timings_s))

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

    async def version(self) -> Response:
        """GET /version: this program, and what the engine says of itself."""
        return JSONResponse({"version": __version__, **self.facts})

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

    def _encode(self, images: Sequence[GeneratedImage]) -> list[bytes]:
        embed = self.options.embed_metadata
        pngs = (encode_png(image, self.facts, embed_metadata=embed) for image in images)
        return [base64.b64encode(png) for png in pngs]

    def _envelope(
        self, wanted: ImagesRequest, images: Sequence[GeneratedImage], timings_s: dict[str, float]
    ) -> ImagesAnswer:
        first = images[0]
        tokens = first.request.width * first.request.height // PIXELS_PER_TOKEN * len(images)
        run = RunFacts(
            policy=self.engine.policy,
            steps=first.request.steps,
            nfe=sum(image.nfe for image in images),
            guidance=first.request.guidance,
            sigmas=list(first.sigmas),
            timings_s=timings_s,
            peak_memory_bytes=peak_memory_bytes(),
            server=self.facts,
        )
        return ImagesAnswer(
            created=int(time.time()),
            data=[],
            size=f"{first.request.width}x{first.request.height}",
            output_format="png",
            usage=Usage(output_tokens=tokens),
            warnings=wanted.not_honoured,
            zimage_fp8=run,
        )


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


async def drawn(request: Request, jobs: Sequence[Job]) -> list[GeneratedImage]:
    """The pictures, in order. When the client leaves or one job fails, the others are cancelled.

    Raises whatever stopped the first job that failed: JobCancelled when the client left.
    """
    watcher = asyncio.create_task(_cancel_when_gone(request, jobs))
    try:
        return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    finally:
        watcher.cancel()
        for job in jobs:
            job.cancel()


async def _cancel_when_gone(request: Request, jobs: Sequence[Job]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancel()


def _timings(jobs: Sequence[Job], images: Sequence[GeneratedImage]) -> dict[str, float]:
    stages = images[0].timings_s
    sums = {stage: sum(image.timings_s[stage] for image in images) for stage in stages}
    return {"queue": jobs[0].queued_s, **sums}


def answer_with(
    pictures: Sequence[bytes], requests: Sequence[ImageRequest], envelope: ImagesAnswer
) -> Response:
    """The envelope's JSON with the pictures spliced in as bytes.

    Base64 needs no escaping, and `json.dumps` of a 2 MB string takes 11 ms for nothing.
    """
    data = b",".join(
        b'{"seed":%d,"b64_json":"%s"}' % (request.seed, picture)
        for picture, request in zip(pictures, requests, strict=True)
    )
    rest = envelope.model_dump_json(exclude={"data"}).encode()
    return Response(b'{"data":[' + data + b"]," + rest[1:], media_type="application/json")
