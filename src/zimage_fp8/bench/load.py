"""The client: one picture asked for and timed on the wall clock, of any OpenAI-style server."""

import base64
import binascii
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2
from pydantic import BaseModel, JsonValue, ValidationError

from zimage_fp8.errors import ZImageError
from zimage_fp8.protocol import ErrorAnswer, RunFacts

REQUEST_TIMEOUT_S = 3600
SHOWN_LETTERS = 200  # of a body that is not ours
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """One picture to ask for. size: WxH."""

    prompt: str
    seed: int
    size: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class ServerFacts:
    """What the server says of one request. A server that is not ours may say nothing."""

    nfe: int | None = None
    sigmas: list[float] = field(default_factory=list)
    timings_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    server: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """One answered request. `latency_s`: from sending the body to the last byte of the answer."""

    latency_s: float
    png: bytes
    facts: ServerFacts


class _Picture(BaseModel):
    b64_json: str | None = None


class _Metrics(BaseModel):
    """vLLM-Omni's. Names of stages that end in `_ms` are milliseconds, all others seconds."""

    stage_durations: dict[str, float] | None = None
    peak_memory_mb: float | None = None


class _Answer(BaseModel):
    data: list[_Picture]
    metrics: _Metrics | None = None
    zimage_fp8: RunFacts | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class Client:
    """Draws through an OpenAI-style image server. Raises ZImageError on any failed request.

    extra: fields that every body carries beside the usual ones. May be used by many threads.
    """

    def __init__(self, url: str, extra: Mapping[str, JsonValue] | None = None) -> None:
        self._extra = dict(extra or {})
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.Client(
            base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=limits
        )

    def close(self) -> None:
        self._http.close()

    def served_models(self) -> list[str]:
        """The ids of /v1/models; empty when the server has no such list.

        Raises ZImageError when there is no server.
        """
        try:
            response = self._http.get("/v1/models", timeout=10)
            return [model.id for model in _Models.model_validate_json(response.content).data]
        except httpx2.TransportError as error:
            raise ZImageError(f"no server answers: {error}") from None
        except ValidationError:
            return []

    def draw(self, work: Work) -> Drawn:
        """Ask for one picture, wait for it and take it apart."""
        response, latency_s = self._post(work)
        return _drawn(response, latency_s)

    def time(self, work: Work) -> float:
        """Seconds of one request whose picture nobody needs."""
        response, latency_s = self._post(work)
        _refuse_failure(response)
        return latency_s

    def _post(self, work: Work) -> tuple[httpx2.Response, float]:
        # Steps and guidance are always sent: other servers take 50 and 1.0 (two forwards a step)
        # when they are missing.
        body: dict[str, JsonValue] = {
            "prompt": work.prompt,
            "seed": work.seed,
            "size": work.size,
            "num_inference_steps": work.steps,
            "guidance_scale": work.guidance,
            "n": 1,
            "response_format": "b64_json",
            **self._extra,
        }
        started = time.perf_counter()
        try:
            response = self._http.post("/v1/images/generations", json=body)
        except httpx2.TransportError as error:
            raise ZImageError(f"the server did not answer: {error}") from None
        return response, time.perf_counter() - started


def _refuse_failure(response: httpx2.Response) -> None:
    if not response.is_success:
        raise ZImageError(f"the server answered {response.status_code}: {_reason(response)}")


def _drawn(response: httpx2.Response, latency_s: float) -> Drawn:
    _refuse_failure(response)
    try:
        answer = _Answer.model_validate_json(response.content)
    except ValidationError:
        raise ZImageError(f"not an answer with pictures: {_first_line(response)}") from None
    return Drawn(latency_s, _png(answer), _facts(answer))


def _facts(answer: _Answer) -> ServerFacts:
    if (ours := answer.zimage_fp8) is not None:
        return ServerFacts(
            ours.nfe, ours.sigmas, ours.timings_s, ours.peak_memory_bytes, ours.server
        )
    metrics = answer.metrics or _Metrics()
    peak_mib = metrics.peak_memory_mb
    return ServerFacts(
        timings_s=_stages_s(metrics.stage_durations or {}),
        # vLLM-Omni means torch's reserved memory by it.
        peak_memory_bytes={"torch_reserved": round(peak_mib * MIB)} if peak_mib else {},
    )


def _stages_s(told: Mapping[str, float]) -> dict[str, float]:
    """Ours out of vLLM-Omni's, none inside another: their generation holds all the others.

    It tells text encoder and VAE only when started with `--enable-diffusion-pipeline-profiler`,
    and then under the name of the pipeline's class. What is left of the generation is the loop.
    """
    waited = sum(told.get(name, 0.0) for name in ("queue_wait_ms", "preprocess_ms")) / 1000
    whole = sum(ms for name, ms in told.items() if re.fullmatch(r"stage_\d+_gen_ms", name)) / 1000
    parts = {
        stage: seconds
        for stage, end in (("encode", ".text_encoder.forward"), ("decode", ".vae.decode"))
        if (seconds := sum(s for name, s in told.items() if name.endswith(end)))
    }
    if not whole:
        return parts
    rest = max(0.0, whole - sum(parts.values()))
    stages = {"queue": waited} if waited else {}
    return stages | parts | {"denoise" if len(parts) == 2 else "generate": rest}


def _png(answer: _Answer) -> bytes:
    """The one picture that was asked for, in the form that was asked for."""
    encoded = answer.data[0].b64_json if len(answer.data) == 1 else None
    if not encoded:
        raise ZImageError("the answer holds no picture as b64_json, which was asked for")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ZImageError(f"the answer's b64_json is not base64: {error}") from None


def _reason(response: httpx2.Response) -> str:
    """What the server says went wrong; a proxy before it may not speak OpenAI's JSON."""
    try:
        return ErrorAnswer.model_validate_json(response.content).error.message
    except ValidationError:
        return _first_line(response)


def _first_line(response: httpx2.Response) -> str:
    return response.text.strip().partition("\n")[0][:SHOWN_LETTERS] or "an empty body"
