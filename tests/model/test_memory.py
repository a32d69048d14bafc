"""Memory between pictures: captions that are kept, and a device that has run full."""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compare import same_bits
from zimage_fp8.errors import OutOfMemory
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import CaptionCache, Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.text import PromptEncoder

REQUEST = ImageRequest("a red apple", 64, 48, steps=2)
FULL = "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 1 GiB"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture
def pipeline(loaded: Pipeline) -> Iterator[Pipeline]:
    loaded.captions = CaptionCache()
    denoiser = loaded.denoiser
    yield loaded
    loaded.denoiser = denoiser


class FullOnce:
    """A denoiser whose second step finds the device full, once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inner = pipeline.denoiser
        self.forwards = self.released = 0
        self.activation: weakref.ref[Tensor] | None = None

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == 2:
            activation = latent.clone()
            self.activation = weakref.ref(activation)
            raise torch.OutOfMemoryError(FULL)
        return self.inner.forward(latent, t, caption)

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        return self.inner.refine_caption(caption, is_pad)

    def describe(self) -> dict[str, object]:
        return self.inner.describe()

    def release(self) -> None:
        self.released += 1


def test_a_full_device_is_told_with_what_would_fit(pipeline: Pipeline) -> None:
    pipeline.denoiser = FullOnce(pipeline)
    with pytest.raises(OutOfMemory) as raised:
        pipeline.generate(REQUEST)
    message = str(raised.value)
    assert "64x48 does not fit into the memory of cpu" in message
    assert "out of memory" in message
    assert "total capacity" not in message  # the first sentence is enough
    hint = str(raised.value.hint)
    for remedy in ("32x16", "a policy with fewer BF16 layers", "--offload text-encoder"):
        assert remedy in hint


def test_everything_of_the_attempt_is_given_back(pipeline: Pipeline) -> None:
    """While the error itself is still held, as a server holds it until it has answered."""
    pipeline.denoiser = denoiser = FullOnce(pipeline)
    with pytest.raises(OutOfMemory) as raised:
        pipeline.generate(REQUEST)
    assert raised.value.__context__ is None
    assert denoiser.activation is not None
    assert denoiser.activation() is None
    assert denoiser.released == 1
    assert pipeline.captions.get(REQUEST.prompt) is None


def test_the_next_picture_is_drawn_as_if_nothing_had_happened(pipeline: Pipeline) -> None:
    expected = pipeline.generate(REQUEST).pixels
    pipeline.denoiser = FullOnce(pipeline)
    with pytest.raises(OutOfMemory):
        pipeline.generate(REQUEST)
    again = pipeline.generate(REQUEST)
    same_bits(torch.from_numpy(again.pixels), torch.from_numpy(expected))
    assert again.nfe == 2


def test_a_prompt_is_encoded_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = type(pipeline.text).encode

    def counted(self: PromptEncoder, prompt: str) -> Tensor:
        encoded.append(prompt)
        return encode(self, prompt)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(pipeline.text), "encode", counted)
    first = pipeline.generate(REQUEST).pixels
    again = pipeline.generate(REQUEST).pixels
    assert (first == again).all()
    assert encoded == [REQUEST.prompt]
    assert (pipeline.captions.hits, pipeline.captions.misses) == (1, 1)
    pipeline.generate(ImageRequest("a red apple ", 64, 48, steps=1))  # a space is another prompt
    assert len(encoded) == 2


def test_positive_and_negative_captions_are_kept_alike(pipeline: Pipeline) -> None:
    pipeline.generate(ImageRequest("a", 64, 48, negative_prompt="b", steps=1, guidance=1.0))
    misses = pipeline.captions.misses
    pipeline.generate(ImageRequest("b", 64, 48, negative_prompt="a", steps=1, guidance=1.0))
    assert pipeline.captions.misses == misses == 2


def test_the_least_recently_used_caption_is_forgotten() -> None:
    cache = CaptionCache(capacity=2)
    captions = {name: torch.full((1,), float(index)) for index, name in enumerate("abc")}
    cache.put("a", captions["a"])
    cache.put("b", captions["b"])
    assert cache.get("a") is captions["a"]
    cache.put("c", captions["c"])
    assert cache.get("b") is None
    assert cache.get("a") is captions["a"]
    assert cache.get("c") is captions["c"]
    cache.clear()
    assert cache.get("a") is None


@pytest.mark.gpu
def test_a_gpu_that_is_really_full_draws_again_afterwards() -> None:
    """A cap on this process's memory below what a large picture needs."""
    pipeline = load_pipeline("nano", dtype="bfloat16", device="cuda")
    small = ImageRequest("a red apple on a teal background", 128, 128, steps=1)
    expected = pipeline.generate(small).pixels
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + 512 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with pytest.raises(OutOfMemory, match="2048x2048 does not fit"):
            pipeline.generate(ImageRequest(small.prompt, 2048, 2048, steps=1))
        assert (pipeline.generate(small).pixels == expected).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


FULL_AND_AGAIN = """
import torch
from zimage_fp8.engine import EngineOptions, load_pipeline
from zimage_fp8.errors import OutOfMemory
from zimage_fp8.model.request import ImageRequest

pipeline = load_pipeline("nano", options=EngineOptions("fused"), device="cuda")
small = ImageRequest("a red apple on a teal background", 128, 128, steps=1)
expected = pipeline.generate(small).pixels
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
try:
    pipeline.generate(ImageRequest(small.prompt, 2048, 2048, steps=1))
except OutOfMemory:
    print((pipeline.generate(small).pixels == expected).all())
print(any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("grow", [False, True])
def test_the_engine_draws_again_after_a_full_gpu(grow: bool) -> None:
    """Graphs and their pool given up and captured anew, with PyTorch's segments of either kind,
    which are chosen once per process."""
    environment = os.environ | {"PYTORCH_ALLOC_CONF": f"expandable_segments:{grow}"}
    command = [sys.executable, "-c", FULL_AND_AGAIN]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.stdout.split() == ["True", str(grow)], ended.stderr
