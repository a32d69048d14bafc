"""The diffusion transformer as the GPU runs it: one flat sequence of fused kernels per step.

The same mathematics as `model.z_image.ZImageTransformer`, whose weights it borrows, with three
differences:

- What does not depend on the latent is computed once. All adaLN projections of a timestep are one
  matrix product, and each norm's weight is multiplied into the scale or gate that follows it, so a
  block reads four vectors. The refined caption and the rotary tables come from outside the step.
- Per block, four matrix products, one attention and four fused kernels; each kernel writes what the
  next product reads, in 8 bits where the plan says so (`kernels.activation`).
- On CUDA a step is one graph per (batch, size, caption tokens); timestep and caption are its
  inputs, so one graph serves every step, every prompt of its bucket and every number of steps.

On the CPU the kernels are their references: the sequence itself is tested without a GPU.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_fp8.engine.gemm import Linear
from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.attention import Backend
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.hopper import Program, compile_in_background
from zimage_fp8.kernels.hopper_row import program_for
from zimage_fp8.kernels.norm import norm, residual, residual_norm
from zimage_fp8.kernels.qk_norm_rope import HeadNorms, qk_norm_rope, reach_of_norm
from zimage_fp8.kernels.rope import Rope, first_blocks
from zimage_fp8.layout import PATCH, PATCH_KEY, ZImageConfig
from zimage_fp8.model.z_image import (
    Block,
    FinalLayer,
    ZImageTransformer,
    caption_positions,
    image_positions,
    patchify,
    unpatchify,
)
from zimage_fp8.numerics import scale_of

# Vectors of a timestep: per block the scale and gate of attention and of the feed-forward.
SCALE_ATTENTION, GATE_ATTENTION, SCALE_FFN, GATE_FFN = range(4)
VECTORS = 4
KEPT_TIMESTEPS = 16  # 2 MB each at full size; two schedules of eight steps


@dataclass(frozen=True)
class FusedBlock:
    """A block's linears, and where its four vectors lie in a table of them."""

    to_qkv: Linear
    to_out: Linear
    w13: Linear
    w2: Linear
    norms: HeadNorms
    first_vector: int

    @property
    def index(self) -> int:
        """In its stack; of the modulated blocks the refiner's come first."""
        return self.first_vector // VECTORS

    @classmethod
    def stack(cls, blocks: Sequence[Block], dtype: torch.dtype) -> "list[FusedBlock]":
        return [cls.of(block, VECTORS * index, dtype) for index, block in enumerate(blocks)]

    @classmethod
    def of(cls, block: Block, first_vector: int, dtype: torch.dtype) -> "FusedBlock":
        attention, ffn = block.attention, block.feed_forward
        return cls(
            Linear(attention.to_qkv, dtype),
            Linear(attention.to_out[0], dtype),
            Linear(ffn.w13, dtype),
            Linear(ffn.w2, dtype),
            HeadNorms(attention.norm_q.weight, attention.norm_k.weight, attention.norm_q.eps),
            first_vector,
        )


class FusedTransformer:
    """A `model.denoiser.Denoiser` on the weights of a `ZImageTransformer`."""

    def __init__(
        self, transformer: ZImageTransformer, attention: Backend, graphs: GraphCache
    ) -> None:
        self.config = transformer.config
        self.transformer = transformer
        self.attention = attention
        self.graphs = graphs
        self._owner = object()  # in every key: ids are used again, and graphs hold our weights
        self.dtype = transformer.x_pad_token.dtype
        self.device = transformer.x_pad_token.device
        modulated = [*transformer.noise_refiner, *transformer.layers]
        blocks = FusedBlock.stack(modulated, self.dtype)
        self.refiner = blocks[: len(transformer.noise_refiner)]
        self.layers = blocks[len(transformer.noise_refiner) :]
        self._adaln = _pack([block.adaLN_modulation[0] for block in modulated])
        self._norms = _norm_weights(modulated)
        # A caption's blocks are the same without a timestep: their vectors are the norms' weights.
        unmodulated = [*transformer.context_refiner]
        self.context = FusedBlock.stack(unmodulated, self.dtype)
        vectors = _norm_weights(unmodulated) if unmodulated else self._norms[:0]
        self._context_vectors = vectors.flatten(0, 1)[None]
        self._reach: Tensor | None = None
        if attention.run_codes is not None:
            self._reach = torch.stack([_reach(block, self.config.head_dim) for block in blocks])
        final = transformer.all_final_layer[PATCH_KEY]
        assert isinstance(final, FinalLayer)
        self._final = final
        self._timesteps: OrderedDict[float, Tensor] = OrderedDict()
        self._last_step: torch.cuda.Event | None = None
        self._this_step: torch.cuda.Event | None = None
        compile_in_background(self.programs())

    def programs(self) -> Iterator[Program]:
        """What its products need besides Triton's kernels, for the sizes in the table."""
        in_codes = self.attention.run_codes is not None  # then a kernel of its own turns heads
        axes = None if in_codes else first_blocks(self.config.axes_dims)
        for block in (*self.refiner, *self.layers, *self.context):
            yield from block.to_qkv.programs(axes=axes)
            yield from block.to_out.programs()
            yield from block.w2.programs()
            yield from block.w13.programs(block.w2.reads)
            yield from self.attention.programs(block.to_out.reads)
            yield from self._row_programs(block)

    def _row_programs(self, block: FusedBlock) -> Iterator[Program]:
        """What writes its products' inputs: behind a residual, or on their own where the kernel
        before them, attention or the gate, does not."""
        linears = [(block.to_qkv, True), (block.w13, True)]
        if self.attention.write is None or not block.to_out.reads.is_static_e4m3:
            linears.append((block.to_out, False))
        if not block.w2.reads.is_static_e4m3:
            linears.append((block.w2, False))
        for linear, behind in linears:
            width = linear.weight.shape[1]
            program = program_for(linear.reads, width, self.dtype, self.device, residual=behind)
            if program is not None:
                yield program

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """latent: fp32 [batch, channels, height, width]; t: fp32 [1] or [batch] on the CPU;
        caption: [1 or batch, tokens, dim]. Returns fp32 of latent's shape.

        The host runs at most one step ahead of the GPU, so that whoever counts steps or cancels
        between them is not told of work that has hardly begun.
        """
        vectors = _batch([self._vectors(float(one)) for one in t])
        if self._last_step is not None:
            self._last_step.synchronize()
        key = ("step", self._owner, *(tuple(x.shape) for x in (latent, vectors, caption)))
        # Made outside the graph, which must not allocate what outlives it, and kept by it, since
        # tables may leave their cache.
        ropes = _ropes(
            self.config, latent.shape[-2], latent.shape[-1], caption.shape[1], self.device
        )
        step = partial(self._step, *ropes)
        output = self.graphs.run(key, step, latent, vectors, caption).clone()
        if self.device.type == "cuda":
            self._last_step, self._this_step = self._this_step, _event()
            self._this_step.record()
        return output

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        """`ZImageTransformer.refine_caption`: once per prompt, as one graph per bucket."""
        key = ("caption", self._owner, tuple(caption.shape))
        rope = _caption_rope(self.config, caption.shape[1], self.device)  # outside, as in `forward`
        return self.graphs.run(key, partial(self._refine, rope), caption, is_pad).clone()

    def describe(self) -> dict[str, object]:
        """What runs: attention, and the matrix product of every kind of layer."""
        gemm = {name: linear.describe() for name, linear in self.linears.items()}
        return {
            "engine": "fused",
            "attention": f"{self.attention.name} ({self.attention.summary})",
            "gemm": ", ".join(f"{name}: {what}" for name, what in gemm.items()),
        }

    def release(self) -> None:
        """Drop every captured graph; the next picture captures again."""
        self.graphs.forget()
        self._last_step = self._this_step = None

    @property
    def linears(self) -> dict[str, Linear]:
        """One of each kind of linear, for the record of what runs."""
        block = self.layers[0]
        return {"to_qkv": block.to_qkv, "to_out": block.to_out, "w13": block.w13, "w2": block.w2}

    def _vectors(self, t: float) -> Tensor:
        """Everything a timestep decides: fp32 [1, 4 · blocks + 1, dim]."""
        if t not in self._timesteps:
            self._timesteps[t] = self._form_vectors(torch.tensor([t], device=self.device))
            if len(self._timesteps) > KEPT_TIMESTEPS:
                self._timesteps.popitem(last=False)
        self._timesteps.move_to_end(t)
        return self._timesteps[t]

    def _form_vectors(self, t: Tensor) -> Tensor:
        dim = self.config.dim
        time = self.transformer.t_embedder(t * self.config.t_scale)
        table = self._adaln(time).float().reshape(-1, VECTORS, dim)  # [blocks, 4, dim]
        scales = 1 + table[:, [SCALE_ATTENTION, SCALE_FFN]]
        gates = table[:, [GATE_ATTENTION, GATE_FFN]].tanh()
        vectors = torch.stack([scales, gates], dim=2).flatten(1, 2) * self._norms
        final: Tensor = self._final.adaLN_modulation(time)
        return torch.cat([vectors.flatten(0, 1), 1 + final.float()])[None].contiguous()

    def _refine(self, rope: Rope, caption: Tensor, is_pad: Tensor) -> Tensor:
        """`ZImageTransformer.refine_caption` by the fused blocks. rope: the caption's."""
        x: Tensor = self.transformer.cap_embedder(caption)
        x = torch.where(is_pad[..., None], self.transformer.cap_pad_token, x)
        return self._blocks(self.context, x, rope, self._context_vectors, None)

    def _step(
        self,
        of_image: Rope,
        of_all: Rope,
        latent: Tensor,
        vectors: Tensor,
        caption: Tensor,
    ) -> Tensor:
        height, width = latent.shape[-2:]
        num_image = (height // PATCH) * (width // PATCH)
        x: Tensor = self.transformer.all_x_embedder[PATCH_KEY](patchify(latent.to(self.dtype)))
        if (missing := len(of_image.table) - num_image) > 0:
            x = torch.cat([x, self.transformer.x_pad_token.expand(len(x), missing, -1)], dim=1)
        scales = self._attention_scales(vectors, len(x))
        x = self._blocks(self.refiner, x, of_image, vectors, scales)
        x = torch.cat([x, caption.expand(len(x), -1, -1)], dim=1)
        x = self._blocks(self.layers, x, of_all, vectors, scales)
        scale = vectors[:, -1:]
        x = (F.layer_norm(x[:, :num_image].float(), x.shape[-1:], eps=1e-6) * scale).to(self.dtype)
        return unpatchify(self._final.linear(x), height, width).float()

    def _attention_scales(self, vectors: Tensor, batch: int) -> Tensor | None:
        """Of q, k and v for attention in E4M3: fp32 [blocks, 3, batch, heads], or None.

        No sum over tokens: a bound suffices, since E4M3, a float, keeps its precision over 15
        octaves. A normed token has length √dim at most, so |v| ≤ √dim · max |modulation| · ‖row of
        the weight‖; `_reach` holds all but the modulation. Whatever quantizing the token adds to
        its length is less than the quarter by which the bound is widened.
        """
        if self._reach is None:
            return None
        modulation = vectors[:, SCALE_ATTENTION:-1:VECTORS].abs().amax(-1).T  # [blocks, 1 or batch]
        reach = self._reach[:, :, None].repeat(1, 1, batch, 1)
        reach[:, 2] *= 1.25 * modulation[:, :, None]
        return scale_of(reach, "e4m3")

    def _blocks(
        self,
        blocks: list[FusedBlock],
        x: Tensor,
        rope: Rope,
        vectors: Tensor,
        scales: Tensor | None,
    ) -> Tensor:
        """x: [batch, tokens, dim] through a stack of blocks. scales: of `_attention_scales`."""
        if not blocks:
            return x
        eps = self.config.norm_eps
        normed = norm(x, _vector(vectors, blocks[0], SCALE_ATTENTION), eps, blocks[0].to_qkv.reads)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            of_heads = None if scales is None else scales[block.index]
            h = self._attend(block, normed, x, rope, of_heads)
            x, normed = residual_norm(
                x,
                h,
                _vector(vectors, block, GATE_ATTENTION),
                _vector(vectors, block, SCALE_FFN),
                eps,
                block.w13.reads,
            )
            h = block.w2(block.w13.gated(normed, block.w2.reads))
            gate = _vector(vectors, block, GATE_FFN)
            if following is None:
                return residual(x, h, gate, eps)
            scale = _vector(vectors, following, SCALE_ATTENTION)
            x, normed = residual_norm(x, h, gate, scale, eps, following.to_qkv.reads)
        raise AssertionError("the last block returns")

    def _attend(
        self, block: FusedBlock, normed: Activation, x: Tensor, rope: Rope, scale: Tensor | None
    ) -> Tensor:
        if scale is None:
            heads = block.to_qkv.heads(normed, block.norms, rope)
        else:
            qkv = block.to_qkv(normed).reshape(*x.shape[:2], -1)
            heads = qk_norm_rope(qkv, block.norms, rope.table, scale)
        if self.attention.write is not None:
            return block.to_out(self.attention.write(*heads, block.to_out.reads))
        run, run_codes = self.attention.run, self.attention.run_codes
        mixed = run_codes(*heads, scale) if run_codes and scale is not None else run(*heads)
        return block.to_out(encode(mixed.flatten(0, 1), block.to_out.reads))


def _reach(block: FusedBlock, head_dim: int) -> Tensor:
    """How large q, k and v of each head can be, fp32 [3, heads]; v for a normed token of length
    √dim before its modulation."""
    linear = block.to_qkv
    rows, dim = len(linear.weight) // 3, linear.weight.shape[1]
    lengths = linear.weight[-rows:].float().norm(dim=1)
    if linear.weight_scale is not None:
        every = linear.weight_scale.expand(3 * rows)
        lengths = lengths * every[-rows:]
    v = math.sqrt(dim) * lengths.reshape(-1, head_dim).amax(1)
    q, k = (
        reach_of_norm(weight).expand_as(v)
        for weight in (block.norms.weight_q, block.norms.weight_k)
    )
    return torch.stack([q, k, v])


# As `image_rope` and `caption_rope` of the plain model: once per size, on the CPU, as ordinary
# tensors.


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _ropes(
    config: ZImageConfig, height: int, width: int, caption_tokens: int, device: torch.device
) -> tuple[Rope, Rope]:
    """Of a picture's tokens, and of these with the caption behind them."""
    of_image = image_positions(height, width, caption_tokens)
    of_all = torch.cat([of_image, caption_positions(caption_tokens)])
    image, everything = (
        Rope.of(positions, config.axes_dims, config.rope_theta, device)
        for positions in (of_image, of_all)
    )
    return image, everything


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _caption_rope(config: ZImageConfig, tokens: int, device: torch.device) -> Rope:
    return Rope.of(caption_positions(tokens), config.axes_dims, config.rope_theta, device)


def _batch(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _vector(vectors: Tensor, block: FusedBlock, which: int) -> Tensor:
    return vectors[:, block.first_vector + which]


def _pack(layers: list[nn.Linear]) -> nn.Linear:
    """One linear whose outputs are all the layers' side by side. The layers' own parameters become
    views of it, so no weight is held twice."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    with torch.device("meta"):
        packed = nn.Linear(weight.shape[1], weight.shape[0])
    packed.weight = nn.Parameter(weight, requires_grad=False)
    packed.bias = nn.Parameter(bias, requires_grad=False)
    start = 0
    for layer in layers:
        end = start + len(layer.weight)
        layer.weight.data, layer.bias.data = weight[start:end], bias[start:end]
        start = end
    return packed


def _norm_weights(blocks: list[Block]) -> Tensor:
    """The norm weight that each vector is multiplied with: fp32 [blocks, 4, dim]."""
    return torch.stack(
        [
            torch.stack(
                [
                    block.attention_norm1.weight,
                    block.attention_norm2.weight,
                    block.ffn_norm1.weight,
                    block.ffn_norm2.weight,
                ]
            )
            for block in blocks
        ]
    ).float()
