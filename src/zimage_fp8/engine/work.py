"""What drawing a picture has to compute and to move, and how fast this device could: the arithmetic
behind the rates of `engine.profile`.

A multiplication and an addition count as two operations. Bytes are those that a kernel must read
and write, each once; what it finds in the cache makes its rate look better than memory allows.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from zimage_fp8.engine.transformer import FusedTransformer
from zimage_fp8.engine.vae import FastDecoder
from zimage_fp8.kernels.activation import Output
from zimage_fp8.kernels.hopper_row import program_for
from zimage_fp8.layout import PATCH, PATCH_KEY, linear_shapes
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.z_image import TOKEN_MULTIPLE
from zimage_fp8.numerics import QuantSpec

GEMM, ATTENTION, CONVOLUTION = "GEMM", "attention", "convolution"
NORM, ENCODE = "_norm_kernel", "_encode_kernel"
DOUBLING = re.compile(r"\.upsamplers\.\d+\.conv$")  # the convolutions of doubled pictures


@dataclass(frozen=True)
class Work:
    """flops: operations by the format they are computed in (bf16, e4m3, int8, fp32)."""

    flops: Mapping[str, float] = field(default_factory=dict)
    num_bytes: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """The most a device does: operations per second by format, memory traffic, and who says so."""

    tflops: Mapping[str, float]
    gb_per_s: float
    source: str

    def least_ms(self, work: Work) -> float | None:
        """How long the work takes at the ceiling; None where a format's rate is not known."""
        if any(format not in self.tflops for format in work.flops):
            return None
        computing = sum(count / self.tflops[format] for format, count in work.flops.items()) / 1e9
        return max(computing, work.num_bytes / self.gb_per_s / 1e6)


# NVIDIA's data sheets: dense rates, at clocks that a power limit may not allow.
DATA_SHEETS: dict[str, Ceilings] = {
    name: Ceilings(rates, bandwidth, f"data sheet of {name}, dense")
    for name, rates, bandwidth in (
        ("NVIDIA H200", {"bf16": 989.0, "e4m3": 1979.0, "int8": 1979.0}, 4800.0),
        ("NVIDIA H100 80GB HBM3", {"bf16": 989.0, "e4m3": 1979.0, "int8": 1979.0}, 3350.0),
        ("NVIDIA H100 PCIe", {"bf16": 756.0, "e4m3": 1513.0, "int8": 1513.0}, 2000.0),
        ("NVIDIA A100-SXM4-80GB", {"bf16": 312.0, "int8": 624.0}, 2039.0),
        ("NVIDIA L40S", {"bf16": 362.0, "e4m3": 733.0, "int8": 733.0}, 864.0),
    )
}


def ceilings(device: torch.device) -> Ceilings | None:
    """What was measured on this kind of GPU, else its data sheet, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return measured_ceilings(name) or DATA_SHEETS.get(name)


@lru_cache
def measured_ceilings(gpu: str) -> Ceilings | None:
    """What `benchmarks/kernels.py --ceilings` found on this GPU, if it was ever run there."""
    table = json.loads((resources.files("zimage_fp8.engine") / "ceilings.json").read_text())
    if gpu not in table:
        return None
    found = table[gpu]
    source = f"measured on {gpu}: the best product of each format, and a device copy"
    return Ceilings(found["tflops"], found["gb_per_s"], source)


def denoise_work(pipeline: Pipeline, request: ImageRequest) -> dict[str, Work]:
    """The denoise loop's work by group of kernels: products, attention, each fused kernel."""
    prompts = [request.prompt, *([request.negative_prompt] if request.guidance else [])]
    total: dict[str, Work] = {}
    for prompt in prompts:
        caption = _padded(pipeline.num_tokens(prompt))
        for group, work in _forward_work(pipeline, request.height, request.width, caption).items():
            known = total.get(group, Work())
            flops = Counter(known.flops)
            flops.update({f: n * request.steps_to_run for f, n in work.flops.items()})
            num_bytes = known.num_bytes + work.num_bytes * request.steps_to_run
            total[group] = Work(dict(flops), num_bytes)
    return total


def decode_work(pipeline: Pipeline, request: ImageRequest) -> dict[str, Work]:
    """The convolutions of the decoder, counted while the plain one runs on tensors without values.

    The fast one needs 4/9 of the operations of those that double a picture, edges aside.
    """
    vae = pipeline.decoder.vae
    shape = (1, pipeline.transformer.config.in_channels, request.height // 8, request.width // 8)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
    ):
        vae.decode(torch.empty(shape, dtype=vae.dtype, device=vae.device))
    by_module = {
        name: float(sum(count for op, count in counts.items() if "convolution" in str(op)))
        for name, counts in counter.get_flop_counts().items()
    }
    flops = by_module["Global"]
    if isinstance(pipeline.decoder, FastDecoder):
        doubling = (count for name, count in by_module.items() if DOUBLING.search(name))
        flops -= (1 - 4 / 9) * sum(doubling)
    return {CONVOLUTION: Work({plain_format(vae.dtype): flops})}


def plain_format(dtype: torch.dtype) -> str:
    """What products of unquantized values are called: `bf16` or `fp32`."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _done_at_once(pipeline: Pipeline, stack: str, index: int, tokens: int) -> tuple[bool, bool]:
    """Whether w13's gate, and the norm and rotation of to_qkv's heads, are a part of their product
    and no kernel of their own."""
    denoiser = pipeline.denoiser
    if not isinstance(denoiser, FusedTransformer):
        return False, False
    block = {"noise_refiner": denoiser.refiner, "layers": denoiser.layers}[stack][index]
    turns = denoiser.attention.run_codes is None and block.to_qkv.turns_at_once(tokens) is not None
    return block.w13.gates_at_once(tokens) is not None, turns


def _attention_writes(pipeline: Pipeline) -> bool:
    """Whether attention writes E4M3 codes under a static scale itself."""
    denoiser = pipeline.denoiser
    return isinstance(denoiser, FusedTransformer) and denoiser.attention.write is not None


def _writer(pipeline: Pipeline, spec: QuantSpec | None, width: int, elsewhere: str) -> str:
    """The kernel that writes what a layer of this spec reads: NORM behind a residual or ENCODE
    `elsewhere`, one for both on Hopper."""
    device, residual = pipeline.device, elsewhere == NORM
    by_rows = program_for(Output(spec), width, pipeline.dtype, device, residual=residual)
    return "row_kernel" if by_rows else elsewhere


def _written(spec: QuantSpec | None, wide: int) -> int:
    """Bytes of a value as a layer of this spec reads it."""
    return 1 if spec else wide


def _padded(tokens: int) -> int:
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _forward_work(pipeline: Pipeline, height: int, width: int, caption: int) -> dict[str, Work]:
    """One forward of the transformer. The timestep's own products have one row: not counted."""
    config, plan = pipeline.transformer.config, pipeline.plan
    wide, plain = pipeline.dtype.itemsize, plain_format(pipeline.dtype)
    pixels = (height // 8 // PATCH) * (width // 8 // PATCH)
    stacks = {"noise_refiner": _padded(pixels), "layers": _padded(pixels) + caption}
    kept = {f"all_x_embedder.{PATCH_KEY}": pixels, f"all_final_layer.{PATCH_KEY}.linear": pixels}

    denoiser = pipeline.denoiser
    codes = isinstance(denoiser, FusedTransformer) and denoiser.attention.run_codes is not None
    flops: Counter[str] = Counter()
    attended = 0.0
    kernels: Counter[str] = Counter()
    for name, (columns, depth) in linear_shapes(config).items():
        stack = name.partition(".")[0]
        rows = kept.get(name, 0 if "adaLN" in name else stacks.get(stack, 0))
        spec = plan.spec(name) if name in plan.entries else None
        flops[spec.format if spec else plain] += 2 * rows * columns * depth
    for stack, blocks in (("noise_refiner", config.n_refiner_layers), ("layers", config.n_layers)):
        tokens = stacks[stack]
        attended += blocks * 4 * tokens**2 * config.dim
        for index in range(blocks):
            to_q, to_out, w1, w2 = (
                plan.spec(f"{stack}.{index}.{kind}")
                for kind in (
                    *("attention.to_q", "attention.to_out.0"),
                    *("feed_forward.w1", "feed_forward.w2"),
                )
            )
            dim, ffn = tokens * config.dim, tokens * config.ffn_dim
            # Two gated residuals read x and h and write x, and what is multiplied next; the first
            # norm of a stack has no residual in front of it, the last residual no norm behind it.
            first = NORM if index == 0 else _writer(pipeline, to_q, config.dim, NORM)
            kernels[first] += dim * ((3 if index else 1) * wide + _written(to_q, wide))
            second = _writer(pipeline, w1, config.dim, NORM)
            kernels[second] += dim * (3 * wide + _written(w1, wide))
            if index == blocks - 1:
                kernels[NORM] += dim * 3 * wide
            gates, turns = _done_at_once(pipeline, stack, index, tokens)
            if not turns:
                # q and k, read and written; for attention on codes v too, written in 8 bits.
                kernels["_qk_norm_rope_kernel"] += dim * (3 * wide + 3 if codes else 4 * wide)
            if not gates:
                kernels["_gated_kernel"] += ffn * (2 * wide + _written(w2, wide))
            elif w2 and not w2.is_static:
                kernels[_writer(pipeline, w2, config.ffn_dim, ENCODE)] += ffn * (wide + 1)
            if to_out and not (to_out.is_static and _attention_writes(pipeline)):
                kernels[_writer(pipeline, to_out, config.dim, ENCODE)] += dim * (wide + 1)
    return {
        GEMM: Work({format: float(count) for format, count in flops.items() if count}),
        ATTENTION: Work({"e4m3" if codes else plain: attended}),
        **{name: Work(num_bytes=float(count)) for name, count in kernels.items()},
    }
