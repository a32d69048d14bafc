"""A real pipeline behind the server, on a device that runs full once."""

from pathlib import Path

import httpx2
import pytest
import torch
from torch import Tensor

from live_server import live
from zimage_fp8.engine import load_pipeline
from zimage_fp8.serve import build_app

PATH = "/v1/images/generations"
BODY = {"prompt": "a red apple", "size": "64x48", "num_inference_steps": 2}


def test_the_server_answers_clearly_and_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(tiny_model), dtype="float32", device="cpu")
    forward = pipeline.denoiser.forward
    left = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And more")]

    def full_once(latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        if left:
            raise left.pop()
        return forward(latent, t, caption)

    monkeypatch.setattr(pipeline.denoiser, "forward", full_once)
    with live(build_app(pipeline)) as server, httpx2.Client(trust_env=False) as client:
        refused = client.post(f"{server.url}{PATH}", json=BODY, timeout=60)
        drawn = client.post(f"{server.url}{PATH}", json=BODY, timeout=60)
        health = client.get(f"{server.url}/health")
    assert refused.status_code == 500
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "out_of_memory")
    assert error["message"].startswith("64x48 does not fit into the memory of cpu")
    assert "hint: try 32x16" in error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert drawn.status_code == 200
    assert drawn.json()["data"][0]["b64_json"]
    assert health.status_code == 200
