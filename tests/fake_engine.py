"""An engine whose pictures cost nothing, and which can be held between steps or made to fail."""

import threading
import time
from collections.abc import Hashable, Sequence

import numpy as np
import torch

from zimage_fp8.errors import UsageError
from zimage_fp8.model.drawing import Clock, Conditions, Drawing
from zimage_fp8.model.pipeline import CaptionCache
from zimage_fp8.model.request import GeneratedImage, ImageRequest

NOTHING = torch.zeros(1)


class FakeEngine:
    """Draws a flat picture whose grey is the seed, and previews whose grey is their step.

    While `gate` is cleared, `step` waits; each step lasts `step_s`. `steps_run` counts the steps of
    all pictures, `companies` has how many were drawn in each, and `requests` what was finished.
    """

    model = "fake"
    default_size = (64, 32)

    def __init__(self, policy: str = "bf16_base") -> None:
        self.policy = policy
        self.captions = CaptionCache()
        self.requests: list[ImageRequest] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.steps_run = 0
        self.companies: list[int] = []
        self.step_s = 0.0
        self.failure: Exception | None = None

    def validate(self, request: ImageRequest) -> None:
        if request.width % 16 or request.height % 16 or not request.width * request.height:
            raise UsageError(f"size {request.width}x{request.height}", param="size")
        if request.steps < 1:
            raise UsageError(f"steps is {request.steps}", param="steps")
        if not request.prompt.strip():
            raise UsageError("the prompt is empty", param="prompt")

    def num_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def shape(self, request: ImageRequest) -> Hashable:
        return (request.width, request.height)

    def begin(self, request: ImageRequest) -> Drawing:
        self.started.release()
        steps = request.steps_to_run
        sigmas = tuple(1 - step / request.steps for step in range(request.steps + 1))[-steps - 1 :]
        return Drawing(request, sigmas, Conditions(NOTHING), NOTHING, Clock(torch.device("cpu")))

    def step(self, drawings: Sequence[Drawing]) -> None:
        assert self.gate.wait(30)
        if self.failure:
            raise self.failure
        time.sleep(self.step_s)
        self.steps_run += len(drawings)
        self.companies.append(len(drawings))
        for drawing in drawings:
            drawing.advance([NOTHING], len(drawings))

    def preview(self, drawing: Drawing) -> np.ndarray:
        return flat(drawing.request, drawing.done)

    def finish(self, drawing: Drawing) -> GeneratedImage:
        request = drawing.request
        self.requests.append(request)
        timings_s = {"encode": 0.25, "denoise": 0.5, "decode": 0.125}
        pixels = flat(request, request.seed % 256)
        return GeneratedImage(
            pixels, request, drawing.sigmas, drawing.nfe, timings_s, drawing.company
        )

    def describe(self) -> dict[str, object]:
        return {"model": self.model, "policy": self.policy, "device": "cpu", "versions": {}}


def flat(request: ImageRequest, grey: int) -> np.ndarray:
    return np.full((request.height, request.width, 3), grey, np.uint8)
