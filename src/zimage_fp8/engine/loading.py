"""Which engine draws, and how it is put into a pipeline."""

import logging
from dataclasses import dataclass
from functools import partial

import torch

from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.engine.qwen3 import Precision
from zimage_fp8.engine.text import FastTextEncoder
from zimage_fp8.engine.transformer import FusedTransformer
from zimage_fp8.engine.vae import FastDecoder
from zimage_fp8.errors import UsageError
from zimage_fp8.kernels.attention import Target, choose_backend
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.model import loading
from zimage_fp8.model.calibration import OnForward
from zimage_fp8.model.loading import PLAIN, Opened, Parts
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.quant.calibrate import Calibration

log = logging.getLogger(__name__)

ENGINES = ("auto", "fused", "plain")
PRECISIONS = ("bf16", "fp8")
OFFLOADS = ("none", "text-encoder")


@dataclass(frozen=True)
class EngineOptions:
    """How pictures are drawn. engine: `fused` is the fast one, `plain` the reference in PyTorch;
    `auto` takes fused on CUDA and plain on the CPU. attention_backend: a name of
    `kernels.attention`. text_encoder: its precision. offload: what stays in host memory."""

    engine: str = "auto"
    attention_backend: str = "auto"
    text_encoder: str = "bf16"
    offload: str = "none"

    def __post_init__(self) -> None:
        for value, known, param in (
            (self.engine, ENGINES, "engine"),
            (self.text_encoder, PRECISIONS, "text_encoder"),
            (self.offload, OFFLOADS, "offload"),
        ):
            if value not in known:
                raise UsageError(
                    f"{param.replace('_', ' ')} {value!r}: expected one of {', '.join(known)}",
                    param=param,
                )


def load_pipeline(
    model: str,
    *,
    options: EngineOptions | None = None,
    policy: str | None = None,
    calibration: Calibration | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    on_calibration: OnForward | None = None,
    share: Opened | None = None,
    parts: Parts | None = None,
) -> Pipeline:
    """`model.loading.load_pipeline` with the engine that `options` choose.

    parts: of an earlier call of `fast_parts`, so that several pipelines share graphs' memory.
    """
    if parts is None:
        parts = fast_parts(options or EngineOptions(), loading.find_device(device))
    return loading.load_pipeline(
        model,
        policy=policy,
        calibration=calibration,
        dtype=dtype,
        device=device,
        on_calibration=on_calibration,
        share=share,
        parts=parts,
    )


def fast_parts(options: EngineOptions, device: torch.device) -> Parts:
    """The three models' runners on a device. Raises UsageError for options that would do nothing
    or cannot be had there."""
    is_cuda = device.type == "cuda"
    if options.engine == "plain" or (options.engine == "auto" and not is_cuda):
        _refuse_fast_options(options)
        return PLAIN
    if is_cuda and not HAS_TRITON:
        raise UsageError(
            "engine fused: it needs the package triton on a GPU, which is missing",
            param="engine",
            hint="install it, or take --engine plain",
        )
    graphs = GraphCache(device)

    def denoiser(transformer: ZImageTransformer) -> FusedTransformer:
        target = Target(device, transformer.x_pad_token.dtype, transformer.config.head_dim)
        backend, refused = choose_backend(options.attention_backend, target)
        log.info("attention: %s, asked for %s", backend.name, options.attention_backend)
        for reason in refused:
            log.info("not taken: %s", reason)
        return FusedTransformer(transformer, backend, graphs)

    precision: Precision = "fp8" if options.text_encoder == "fp8" else "bf16"
    return Parts(
        text=partial(
            FastTextEncoder,
            precision=precision,
            offload=options.offload == "text-encoder",
            graphs=graphs,
        ),
        decoder=partial(FastDecoder, graphs=graphs),
        denoiser=denoiser,
    )


def _refuse_fast_options(options: EngineOptions) -> None:
    """The plain engine has one attention and one text encoder."""
    if options.attention_backend.upper() not in ("AUTO", "SDPA", "TORCH_SDPA"):
        raise UsageError(
            f"attention backend {options.attention_backend!r}: the plain engine, which is the "
            "CPU's, runs PyTorch's own",
            param="attention_backend",
            hint="leave it out, or take --engine fused",
        )
    for value, default, param in (
        (options.text_encoder, "bf16", "text_encoder"),
        (options.offload, "none", "offload"),
    ):
        if value != default:
            raise UsageError(
                f"--{param.replace('_', '-')} {value} has no effect in the plain engine",
                param=param,
                hint="leave it out, or take --engine fused",
            )
