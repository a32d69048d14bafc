"""AUTOMATIC1111's API under /sdapi/v1, for the programs that speak nothing else.

Off unless the operator asks for it (`--a1111`). A translation, not a second engine: bodies become
requests of the OpenAI kind, so limits, queue and errors are the same. That API knows no clients,
one's `interrupt` stops another's picture; here each client sees and stops only its own.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pybase64 import b64encode_as_string
from pydantic import JsonValue
from starlette.exceptions import HTTPException

from zimage_fp8.errors import UsageError
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.picture import a1111_parameters
from zimage_fp8.protocol import ImagesRequest
from zimage_fp8.serve.a1111_request import SAMPLER, SCHEDULER, THEIR_NAMES, Order, parse_order
from zimage_fp8.serve.catalog import Catalog
from zimage_fp8.serve.edits import Edit
from zimage_fp8.serve.failures import INTERNAL, error_answer
from zimage_fp8.serve.guard import read_body
from zimage_fp8.serve.job import Job
from zimage_fp8.serve.reply import Drawn, Reply
from zimage_fp8.serve.stream import cancel_all

log = logging.getLogger(__name__)

PREFIX = "/sdapi/v1"
MAX_CLIENTS = 1000  # whose choice of a model is remembered

# What clients ask before they draw, and are content to hear is not here.
PROBED: dict[str, JsonValue] = {
    "samplers": [{"name": SAMPLER, "aliases": ["k_euler"], "options": {}}],
    "schedulers": [
        {
            "name": "automatic",
            "label": SCHEDULER,
            "aliases": None,
            "default_rho": -1.0,
            "need_inner_model": False,
        }
    ],
    "upscalers": [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}
    ],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "hypernetworks": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
    "cmd-flags": {},
    "memory": {"ram": {}, "cuda": {}},
}


class Host(Protocol):
    """The service behind this translation."""

    catalog: Catalog

    @property
    def max_upload_bytes(self) -> int: ...

    def client_of(self, request: Request) -> object: ...

    def model_for(self, wanted: ImagesRequest) -> str: ...

    def first_of(self, wanted: ImagesRequest, name: str) -> ImageRequest: ...

    async def first_edit(self, edit: Edit, name: str) -> ImageRequest: ...

    async def draw(
        self,
        request: Request,
        wanted: ImagesRequest,
        first: ImageRequest,
        name: str,
        output_format: str,
        answer: Callable[[Reply, Sequence[Drawn]], Response],
        on_jobs: Callable[[Sequence[Job]], None],
    ) -> Response: ...


def add_a1111(app: FastAPI, host: Host) -> None:
    """Add the routes. They stand outside our own OpenAPI document."""
    shim = _Shim(host)
    routes: dict[str, dict[str, Callable[[Request], Awaitable[object]]]] = {
        "txt2img": {"POST": lambda request: shim.draw(request, from_picture=False)},
        "img2img": {"POST": lambda request: shim.draw(request, from_picture=True)},
        "sd-models": {"GET": shim.models},
        "options": {"GET": shim.options, "POST": shim.set_options},
        "progress": {"GET": shim.progress},
        "interrupt": {"POST": shim.interrupt},
        "skip": {"POST": shim.interrupt},
        "refresh-checkpoints": {"POST": shim.nothing},
    }
    for name, methods in routes.items():
        for method, work in methods.items():
            path = f"{PREFIX}/{name}"
            app.add_api_route(path, _answering(work), methods=[method], include_in_schema=False)
    app.add_api_route(f"{PREFIX}/{{name:path}}", _answering(shim.probe), include_in_schema=False)


def _answering(
    work: Callable[[Request], Awaitable[object]],
) -> Callable[[Request], Awaitable[Response]]:
    """Failures as these clients read them: `detail`, beside the envelope that others look into."""

    async def answer(request: Request) -> Response:
        try:
            result = await work(request)
            return result if isinstance(result, Response) else JSONResponse(result)
        except Exception as error:
            failure, envelope = error_answer(error)
            if failure is INTERNAL:
                log.error("%s failed", request.url.path, exc_info=error)
            body = envelope.error.model_dump()
            body["param"] = THEIR_NAMES.get(body["param"], body["param"])
            said = {"error": body, "detail": body["message"], "errors": body["message"], "body": ""}
            return JSONResponse(said, failure.status, dict(failure.headers))

    return answer


class _Task:
    """The pictures of one call, and how far they are."""

    def __init__(self, client: object) -> None:
        self.client = client
        self.started = time.time()
        self.jobs: Sequence[Job] = ()
        self.step = 0

    def watch(self, jobs: Sequence[Job]) -> None:
        """Follow the steps of jobs that are not queued yet."""
        self.jobs = jobs
        for job in jobs:
            job.on_step = self._on_step

    def _on_step(self, done: int, total: int) -> None:
        self.step = done

    @property
    def num_done(self) -> int:
        return sum(job.future.done() for job in self.jobs)

    @property
    def share(self) -> float:
        if not self.jobs or self.num_done == len(self.jobs):
            return float(bool(self.jobs))
        steps = self.jobs[0].request.steps_to_run
        return (self.num_done + self.step / steps) / len(self.jobs)


class _Shim:
    def __init__(self, host: Host) -> None:
        self.host = host
        self._tasks: list[_Task] = []
        self._chosen: OrderedDict[object, str] = OrderedDict()  # client -> model

    async def draw(self, request: Request, *, from_picture: bool) -> object:
        host, client = self.host, self.host.client_of(request)
        body = await read_body(request, host.max_upload_bytes)
        chosen = self._chosen.get(client)
        order = await asyncio.to_thread(parse_order, body, chosen, from_picture=from_picture)
        name = host.model_for(order.wanted)
        if order.edit:
            first = await host.first_edit(order.edit, name)
        else:
            first = host.first_of(order.wanted, name)
        task = _Task(client)
        self._tasks.append(task)
        try:
            return await host.draw(
                request,
                order.wanted,
                first,
                name,
                order.wanted.output_format,
                partial(_answer, order, name),
                task.watch,
            )
        finally:
            self._tasks.remove(task)

    async def models(self, request: Request) -> object:
        return [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": name,
                "config": None,
            }
            for name in self.host.catalog
        ]

    async def options(self, request: Request) -> object:
        chosen = self._chosen.get(self.host.client_of(request), self.host.catalog.default)
        return {
            "sd_model_checkpoint": chosen,
            "sd_checkpoint_hash": "",
            "sd_vae": "Automatic",
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }

    async def set_options(self, request: Request) -> object:
        """The model is chosen for this client; nothing else can be set, and a header says so."""
        try:
            wanted = json.loads(await read_body(request, self.host.max_upload_bytes) or b"{}")
        except (ValueError, RecursionError):
            wanted = None
        if not isinstance(wanted, dict):
            raise UsageError("the body is not a JSON object of options")
        name = wanted.pop("sd_model_checkpoint", None)
        if name is not None:
            if name not in list(self.host.catalog):
                known = ", ".join(self.host.catalog)
                raise UsageError(
                    f"model {str(name)[:60]!r} is not served here, only {known}", param="model"
                )
            client = self.host.client_of(request)
            self._chosen[client] = name
            self._chosen.move_to_end(client)
            while len(self._chosen) > MAX_CLIENTS:
                self._chosen.popitem(last=False)
        warnings = [f"{field[:60]} is not supported and was ignored" for field in list(wanted)[:20]]
        return JSONResponse(None, headers={"x-warnings": json.dumps(warnings)} if warnings else {})

    async def progress(self, request: Request) -> object:
        """How far this client's oldest call is; all zero when it has none, as clients wait for."""
        tasks = self._tasks_of(request)
        first = tasks[0] if tasks else None
        share = min(first.share, 0.99) if first else 0.0
        elapsed = time.time() - first.started if first else 0.0
        return {
            "progress": share,
            "eta_relative": elapsed * (1 - share) / share if share else 0.0,
            "state": {
                "skipped": False,
                "interrupted": bool(first and any(job.is_unwanted for job in first.jobs)),
                "stopping_generation": False,
                "job": "scripts_txt2img" if first else "",
                "job_count": sum(len(task.jobs) or 1 for task in tasks),
                "job_timestamp": _timestamp(first.started if first else time.time()),
                "job_no": first.num_done if first else 0,
                "sampling_step": first.step if first else 0,
                "sampling_steps": first.jobs[0].request.steps_to_run if first and first.jobs else 0,
            },
            "current_image": None,
            "textinfo": None,
        }

    async def interrupt(self, request: Request) -> object:
        for task in self._tasks_of(request):
            cancel_all(task.jobs)
        return {}

    async def nothing(self, request: Request) -> object:
        """What has no meaning here, and does no harm to be told done."""
        return None

    async def probe(self, request: Request) -> object:
        name = request.path_params["name"]
        if name not in PROBED:
            raise HTTPException(404, f"{PREFIX}/{name[:60]} is not part of this server")
        return PROBED[name]

    def _tasks_of(self, request: Request) -> list[_Task]:
        client = self.host.client_of(request)
        return [task for task in self._tasks if task.client == client]


def _answer(order: Order, name: str, reply: Reply, drawn: Sequence[Drawn]) -> Response:
    """Off the event loop: JSON of megabytes."""
    images = [b64encode_as_string(one.file) for one in drawn] if order.send_images else []
    info = json.dumps(_info(order, name, reply, drawn), ensure_ascii=False)
    said = {"images": images, "parameters": order.parameters, "info": info}
    return JSONResponse(said)


def _info(order: Order, name: str, reply: Reply, drawn: Sequence[Drawn]) -> dict[str, object]:
    first, count = drawn[0].image.request, len(drawn)
    seeds = [one.image.request.seed for one in drawn]
    return {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * count,
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [first.negative_prompt] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": 0,
        "all_subseeds": [0] * count,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": SAMPLER,
        "cfg_scale": order.cfg_scale,
        "steps": first.steps,
        "batch_size": order.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": name,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength if order.edit else 0,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [a1111_parameters(one.image, reply.server) for one in drawn],
        "styles": [],
        "job_timestamp": _timestamp(time.time()),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": "zimage-fp8",
        # `order` says in its clients' words what our own request warns of.
        "warnings": [
            *order.warnings,
            *(said for said in reply.warnings if said not in order.wanted.warnings),
        ],
    }


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
