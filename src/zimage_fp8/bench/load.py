"""One client, one request at a time, timed on the wall clock at the client."""

import base64
import binascii
import time
from dataclasses import dataclass

import httpx2
from pydantic import ValidationError

from zimage_fp8.errors import ZImageError
from zimage_fp8.protocol import ErrorAnswer, ImagesAnswer, RunFacts

REQUEST_TIMEOUT_S = 3600
SHOWN_LETTERS = 200  # of a body that is not ours


@dataclass(frozen=True)
class Drawn:
    """One answered request. `latency_s`: from sending the body to the last byte of the answer."""

    latency_s: float
    png: bytes
    facts: RunFacts


class Client:
    """Draws through an OpenAI-style image server. Raises ZImageError on any failed request."""

    def __init__(self, url: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def draw(self, prompt: str, *, seed: int, size: str, steps: int, guidance: float) -> Drawn:
        # Steps and guidance are always sent: other servers take 50 and 1.0 (two forwards a step)
        # when they are missing.
        body = {
            "prompt": prompt,
            "seed": seed,
            "size": size,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "n": 1,
            "response_format": "b64_json",
        }
        started = time.perf_counter()
        try:
            response = self._http.post("/v1/images/generations", json=body)
        except httpx2.TransportError as error:
            raise ZImageError(f"the server did not answer: {error}") from None
        latency_s = time.perf_counter() - started
        return _drawn(response, latency_s)


def _drawn(response: httpx2.Response, latency_s: float) -> Drawn:
    if not response.is_success:
        raise ZImageError(f"the server answered {response.status_code}: {_reason(response)}")
    try:
        answer = ImagesAnswer.model_validate_json(response.content)
    except ValidationError:
        raise ZImageError(f"not an answer with pictures: {_first_line(response)}") from None
    if answer.zimage_fp8 is None:
        raise ZImageError("the answer lacks the block zimage_fp8: forwards cannot be counted")
    return Drawn(latency_s, _png(answer), answer.zimage_fp8)


def _png(answer: ImagesAnswer) -> bytes:
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
