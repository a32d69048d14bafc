"""What attention in 8 bits costs nano's pictures: simulated on any device, or run on a GPU.

    python benchmarks/attention_bits.py
    python benchmarks/attention_bits.py --run fa3 fa3-fp8 --out nano-attention-gpu.json

Simulated, each form rounds what a kernel of that form rounds, and computes the rest in FP32:

e4m3       q, k, v with one scale a head, and the probabilities times 2^8: FlashAttention-3's FP8.
e4m3-qk    q and k alone, probabilities and v in 16 bits.
int8-qk    q and k in INT8 with a scale per token, k less its mean: SageAttention's idea.

With `--run` the fused engine draws with each of these attention backends, in BF16. Every form is
drawn under several policies, from the latents of the unquantized FP32 model, and compared with the
first form under the same policy, prompt by prompt.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import quality_nano
from gpu import envelope, write_rows
from zimage_fp8.engine.loading import EngineOptions
from zimage_fp8.engine.loading import load_pipeline as load_fast_pipeline
from zimage_fp8.kernels.attention import attention
from zimage_fp8.model import z_image
from zimage_fp8.model.calibration import read_prompts
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.numerics import amax, dequantize, quantize, scale_of

RESULT = quality_nano.HERE / "results" / "nano-attention-bits.json"
POLICIES = (None, "full", "int8-rot")
P_SCALE = 2.0**8  # of the largest probability; FlashAttention-3 shifts by as much

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def rounded(x: Tensor, format: str, *, per_token: bool) -> Tensor:
    """x [batch, heads, tokens, head_dim] through 8 bits: a scale per head, or one per token too."""
    flat = x.float().flatten(0, 2) if per_token else x.float().flatten(0, 1).flatten(1)
    scale = scale_of(amax(flat, per_row=True), format)
    return dequantize(quantize(flat, scale, format), scale).reshape(x.shape)


def e4m3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rounded(x.transpose(1, 2), "e4m3", per_token=False) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * P_SCALE
    total = weights.sum(-1, keepdim=True)
    mixed = weights.to(torch.float8_e4m3fn).float() @ v / total
    return mixed.transpose(1, 2).flatten(2)


def e4m3_qk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q8, k8 = (rounded(x.transpose(1, 2), "e4m3", per_token=False).transpose(1, 2) for x in (q, k))
    return attention(q8, k8, v.float())


def int8_qk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.float() - k.float().mean(1, keepdim=True)  # softmax does not see what all keys share
    q8, k8 = (rounded(x.transpose(1, 2), "int8", per_token=True).transpose(1, 2) for x in (q, k))
    return attention(q8, k8, v.float())


FORMS: dict[str, Attention | None] = {
    "16 bits": None,
    "e4m3": e4m3,
    "e4m3-qk": e4m3_qk,
    "int8-qk": int8_qk,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, default=48, help="prompts")
    parser.add_argument("--device")
    parser.add_argument("--run", nargs="+", metavar="BACKEND", help="attention backends of a GPU")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    requests = quality_nano.requests_of(read_prompts(quality_nano.PROMPTS)[: given.limit])
    exact_model = load_pipeline("nano", dtype="float32", device=given.device)
    exact = quality_nano.draw(exact_model, requests)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            variant = quality_nano.Variant(policy or "bf16_base", policy)
            made = quality_nano.make(variant, Path(folder), given.device)
            drawn = ran(made, given) if given.run else simulated(made, given)
            plain: np.ndarray | None = None
            for name, draw in drawn:
                values = quality_nano.psnr_db(draw(requests), exact)
                row = {"policy": variant.name, "attention": name} | quality_nano.summary(values)
                if plain is None:
                    plain = values
                else:
                    row["above_16_bits"] = quality_nano.paired(values, plain)
                rows.append(row)
                print(f"{variant.name:10} {name:8} {values.mean():6.2f} dB", flush=True)
    size = f"{quality_nano.SIZE}x{quality_nano.SIZE}"
    facts = envelope() | {"prompts": len(requests), "size": size, "steps": quality_nano.STEPS}
    write_rows(given.out, facts, "rows", rows)
    return 0


Draw = Callable[[Sequence[ImageRequest]], np.ndarray]


def simulated(made: str, given: argparse.Namespace) -> Iterator[tuple[str, Draw]]:
    """The plain model, with each form in the place of its attention."""
    pipeline = load_pipeline(made, device=given.device)

    def draw(form: Attention | None, requests: Sequence[ImageRequest]) -> np.ndarray:
        with patch.object(z_image, "attention", in_dtype(form) if form else attention):
            pipeline.captions.clear()
            return quality_nano.draw(pipeline, requests)

    for name, form in FORMS.items():
        yield name, partial(draw, form)


def ran(made: str, given: argparse.Namespace) -> Iterator[tuple[str, Draw]]:
    """The fused engine with each backend."""
    for name in given.run:
        options = EngineOptions(engine="fused", attention_backend=name)
        pipeline = load_fast_pipeline(made, options=options, device=given.device)
        yield name, partial(quality_nano.draw, pipeline)


def in_dtype(form: Attention) -> Attention:
    return lambda q, k, v: form(q, k, v).to(q.dtype)


if __name__ == "__main__":
    sys.exit(main())
