"""The text encoder of the engine: Qwen3 as a flat sequence of fused kernels over packed weights.

Same computation as `model.text`, on the prompt's real tokens and up to the layer that is read, but
without a framework in between: per layer four matrix products, one attention and four fused
kernels, replayed as one CUDA graph per 32 tokens. Padding up to the bucket follows the prompt, and
the encoder is causal, so the caption does not depend on it.

The embedding table stays in host memory, as pages of its file: a prompt reads a few of its rows.
With `offload` the layers stay in pinned host memory too, and stream through two buffers on the GPU
while the prompt is encoded: one is filled while the other is computed with.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.engine.gemm import choose
from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.engine.pinned import host_buffers
from zimage_fp8.engine.qwen3 import (
    Layer,
    LayerLayout,
    Precision,
    Weight,
    check_tensors,
    read_qwen3_config,
)
from zimage_fp8.errors import ModelError
from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.add_norm import add_norm
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.hopper import compile_in_background
from zimage_fp8.kernels.hopper_row import program_for
from zimage_fp8.kernels.language import next_power_of_2, runs_triton
from zimage_fp8.kernels.matmul import matmul
from zimage_fp8.kernels.qwen_rope import half_rope_table, qwen_norm_rope
from zimage_fp8.kernels.swiglu import gated
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.model.text import MAX_TOKENS, PromptEncoder

BUCKET = 32  # tokens


class FastTextEncoder(PromptEncoder):
    """Prompts in, captions out, as `model.text.TextEncoder`. Not thread-safe: one thread encodes.

    precision: "bf16" keeps weights in `dtype`; "fp8" quantizes the linear layers per output row
    while loading, and activations per token. offload: layers stay in host memory between and
    during requests. graphs: the cache to keep CUDA graphs in, its own when left out. Raises
    ModelError and CheckpointError for a folder it cannot run exactly.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        precision: Precision = "bf16",
        offload: bool = False,
        graphs: GraphCache | None = None,
    ) -> None:
        super().__init__(folder)
        self.dtype, self.device = dtype, device
        self.precision, self.offload = precision, offload
        weights = folder / "text_encoder"
        self.config = read_qwen3_config(weights)
        if len(self.tokenizer) > self.config.vocab_size:
            raise ModelError(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens, the text encoder's "
                f"embedding {self.config.vocab_size}; they belong to different models"
            )
        self._layout = LayerLayout(self.config, precision, dtype)
        self._output = Output(self._layout.spec)
        with ShardReader(weights) as reader:
            prefix = check_tensors(reader, self.config)
            self._embedding = reader.read(f"{prefix}embed_tokens.weight")
            names = [f"{prefix}layers.{i}." for i in range(self.config.num_hidden_layers - 1)]
            source = _Streamed if offload else _Resident
            self._layers: _Streamed | _Resident = source(self._layout, reader, names, device)
        table = half_rope_table(MAX_TOKENS, self.config.head_dim, self.config.rope_theta)
        self._table = table.to(device)
        heads = self.config.num_attention_heads * self.config.head_dim
        program = program_for(self._output, heads, dtype, device)
        compile_in_background([program] if program else [])
        self._graphs = GraphCache(device) if graphs is None else graphs
        self._owner = object()  # in every key: the cache may be shared

    @property
    def device_bytes(self) -> int:
        """Bytes of weights and tables held on the device, between requests too; graphs apart."""
        return self._layers.device_bytes + self._table.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory: pinned layers, and the embedding's pages, which the system
        may drop and read again."""
        return self._layers.host_bytes + self._embedding.nbytes

    def describe(self) -> str:
        return f"fused, {self.precision}" + (", offloaded" if self.offload else "")

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """The caption of one prompt, [tokens, cap_feat_dim] in the encoder's dtype."""
        ids = self.tokens(prompt)
        padded = -(-len(ids) // BUCKET) * BUCKET
        rows = self._embedding[torch.tensor(ids)].to(self.dtype)
        x = F.pad(rows, (0, 0, 0, padded - len(ids))).to(self.device)
        if self.offload:
            return self._forward(x)[: len(ids)].clone()
        return self._graphs.run(("text", self._owner, padded), self._forward, x)[: len(ids)].clone()

    def _forward(self, x: Tensor) -> Tensor:
        """x: embedded tokens [tokens, hidden] -> the last loaded layer's output."""
        table, eps = self._table[: len(x)], self.config.rms_norm_eps
        h: Tensor | None = None
        for layer in self._layers:
            x, normed = add_norm(x, h, layer.input_norm, eps, self._output)
            mixed = self._attention(_linear(normed, layer.qkv, x.dtype), layer, table)
            h = _linear(encode(mixed, self._output), layer.out, x.dtype)
            x, normed = add_norm(x, h, layer.post_norm, eps, self._output)
            w13 = _linear(normed, layer.gate_up, x.dtype)
            h = _linear(gated(w13, self._output), layer.down, x.dtype)
        return x if h is None else x + h

    def _attention(self, qkv: Tensor, layer: Layer, table: Tensor) -> Tensor:
        config = self.config
        q, k, v = qwen_norm_rope(
            qkv, layer.q_norm, layer.k_norm, table, config.num_key_value_heads, config.rms_norm_eps
        )
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)


def _linear(x: Activation, weight: Weight, dtype: torch.dtype) -> Tensor:
    values, scale, rows = weight.values, weight.scale, len(x.values)
    kind = "bf16" if scale is None else "e4m3-vector"
    if dtype == torch.bfloat16 and (found := choose(values.device, kind, rows, *values.shape)):
        return matmul(x, values, scale, dtype, found.implementation, found.tile)
    if scale is not None and runs_triton(values):
        return matmul(x, values, scale, dtype, "triton", few_rows_tile(rows))
    return matmul(x, values, scale, dtype)


def few_rows_tile(rows: int) -> Tile:
    """A tile for prompts: with so few rows a product is read, not computed, and needs narrow tiles
    to have one for every multiprocessor (2560 columns make 80)."""
    return Tile(m=min(128, max(16, next_power_of_2(rows))), n=32, k=128, warps=4, stages=5)


class _Resident:
    """All layers on the device."""

    host_bytes = 0

    def __init__(
        self, layout: LayerLayout, reader: ShardReader, names: list[str], device: torch.device
    ) -> None:
        self.layers = []
        for name in names:
            buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
            layout.fill(buffer, reader, name)
            self.layers.append(layout.views(buffer))
        self.device_bytes = layout.num_bytes * len(names)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)


class _Streamed:
    """All layers in host memory, two at a time on the device.

    A layer is copied on a stream of its own, once the computation with the layer before the last
    is done; the host runs ahead and never waits.
    """

    def __init__(
        self, layout: LayerLayout, reader: ShardReader, names: list[str], device: torch.device
    ) -> None:
        self.device = device
        size = layout.num_bytes
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.views = [layout.views(buffer) for buffer in self.buffers]
        self.host = host_buffers(len(names), size, device)
        for name, host in zip(names, self.host, strict=True):
            layout.fill(self.buffers[0], reader, name)
            host.copy_(self.buffers[0])
        self.device_bytes = 2 * size
        self.host_bytes = size * len(names)
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Layer]:
        if self.stream is None:
            for index, layer in enumerate(self.host):
                self.buffers[index % 2].copy_(layer)
                yield self.views[index % 2]
            return
        computing = torch.cuda.current_stream(self.device)
        free = [computing.record_event(), computing.record_event()]
        for index, layer in enumerate(self.host):
            slot = index % 2
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(free[slot])
                self.buffers[slot].copy_(layer, non_blocking=True)
            computing.wait_stream(self.stream)
            yield self.views[slot]
            free[slot] = computing.record_event()
