"""An engine whose pictures cost nothing, and which can be held between steps or made to fail."""

import threading
import time
from collections.abc import Callable

import numpy as np

from zimage_fp8.errors import UsageError
from zimage_fp8.model.pipeline import CaptionCache, GeneratedImage, ImageRequest, Previews


class FakeEngine:
    """Draws a flat picture whose grey is the seed, and previews whose grey is their step.

    While `gate` is cleared, `generate` waits before each step; each step lasts `step_s`, and
    `steps_run` counts them, and `requests` keeps what was drawn.
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

    def generate(
        self,
        request: ImageRequest,
        on_step: Callable[[int, int], None] | None = None,
        previews: Previews | None = None,
    ) -> GeneratedImage:
        self.started.release()
        steps = request.steps_to_run
        for step in range(steps):
            assert self.gate.wait(30)
            if self.failure:
                raise self.failure
            time.sleep(self.step_s)
            self.steps_run += 1
            if previews and step + 1 in previews.steps:
                previews.show(flat(request, step + 1))
            if on_step:
                on_step(step + 1, steps)
        self.requests.append(request)
        pixels = flat(request, request.seed % 256)
        sigmas = tuple(1 - step / request.steps for step in range(request.steps + 1))[-steps - 1 :]
        timings_s = {"encode": 0.25, "denoise": 0.5, "decode": 0.125}
        return GeneratedImage(pixels, request, sigmas, steps, timings_s)

    def describe(self) -> dict[str, object]:
        return {"model": self.model, "policy": self.policy, "device": "cpu", "versions": {}}


def flat(request: ImageRequest, grey: int) -> np.ndarray:
    return np.full((request.height, request.width, 3), grey, np.uint8)
