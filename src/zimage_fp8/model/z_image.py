"""The Z-Image diffusion transformer.

One stream of tokens: the image's 2x2 latent patches, then the caption. Three stacks of one kind of
block: `noise_refiner` on image tokens, `context_refiner` on caption tokens (it sees no timestep, so
a caption is refined once per prompt, not once per step), `layers` on both together.

Parameters carry diffusers' names, except that projections which share an input are packed into one
matrix at load: `to_q|to_k|to_v -> to_qkv` and `w1|w3 -> w13` (`layout.FUSED`).

Padding. Image and caption are each padded to a multiple of 32 tokens with a learned token that IS
attended; nothing is masked. Captions of one padded length may share a batch, others must not.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_fp8.kernels import (
    apply_rope,
    attention,
    rms_norm,
    rms_norm_scaled,
    rope_table,
    swiglu,
)
from zimage_fp8.layout import (
    ADALN_DIM,
    PATCH,
    PATCH_KEY,
    TIME_HIDDEN_DIM,
    ZImageConfig,
)

TOKEN_MULTIPLE = 32


class Attention(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.norm_q = RMSNorm(config.head_dim, 1e-5)
        self.norm_k = RMSNorm(config.head_dim, 1e-5)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        qkv = self.to_qkv(x).reshape(*x.shape[:2], 3, self.n_heads, -1)
        q, k, v = qkv.unbind(2)  # each [batch, tokens, heads, head_dim]
        q = apply_rope(self.norm_q(q), rope)
        k = apply_rope(self.norm_k(k), rope)
        mixed: Tensor = self.to_out[0](attention(q, k, v))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w13(x)))
        return out


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm times adaLN's `1 + scale`, rounded once."""
        return rms_norm_scaled(x, self.weight, scale, self.eps)


class Block(nn.Module):
    """Attention and feed-forward, each normalized before and after; gated and scaled by adaLN."""

    def __init__(self, config: ZImageConfig, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            adaln = nn.Linear(config.time_dim, 4 * config.dim, bias=True)
            self.adaLN_modulation = nn.ModuleList([adaln])

    def forward(self, x: Tensor, rope: Tensor, time: Tensor) -> Tensor:
        """x: [batch, tokens, dim]; rope: [tokens, head_dim / 2, 2]; time: [batch, ≤256]."""
        modulation = self.adaLN_modulation[0](time).unsqueeze(1)  # [batch, 1, 4 · dim]
        scale_attn, gate_attn, scale_ffn, gate_ffn = modulation.chunk(4, dim=2)
        h = self.attention(self.attention_norm1.scaled(x, 1 + scale_attn), rope)
        x = x + gate_attn.tanh() * self.attention_norm2(h)
        h = self.feed_forward(self.ffn_norm1.scaled(x, 1 + scale_ffn))
        x = x + gate_ffn.tanh() * self.ffn_norm2(h)
        return x


class ContextBlock(Block):
    """A block without modulation: what it does to a caption does not depend on the timestep."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__(config, modulated=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:  # type: ignore[override]  # no time
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope))
        x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        return x


class TimestepEmbedder(nn.Module):
    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(ADALN_DIM, TIME_HIDDEN_DIM, bias=True),
            nn.SiLU(),
            nn.Linear(TIME_HIDDEN_DIM, out_dim, bias=True),
        )

    def forward(self, t: Tensor) -> Tensor:
        """t: fp32 [batch], already multiplied by `t_scale`."""
        half = ADALN_DIM // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t[:, None] * torch.exp(-math.log(10_000) * steps / half)[None]
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedded: Tensor = self.mlp(wave.to(next(self.mlp.parameters()).dtype))
        return embedded


class FinalLayer(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim, bias=True)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.time_dim, config.dim, bias=True)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(time).unsqueeze(1)
        out: Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)
        return out


class ZImageTransformer(nn.Module):
    """Latents, timestep and refined caption in, the model's raw output (minus velocity) out."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        self.t_embedder = TimestepEmbedder(config.time_dim)
        self.all_x_embedder = nn.ModuleDict({PATCH_KEY: nn.Linear(config.patch_dim, config.dim)})
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps),
            nn.Linear(config.cap_feat_dim, config.dim),
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nn.ModuleList([Block(config, modulated=True) for _ in refiners])
        self.context_refiner = nn.ModuleList([ContextBlock(config) for _ in refiners])
        self.layers = nn.ModuleList([Block(config, modulated=True) for _ in range(config.n_layers)])
        self.all_final_layer = nn.ModuleDict({PATCH_KEY: FinalLayer(config)})

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        """Embed and refine captions; the result holds for every step of the denoise loop.

        caption: [batch, tokens, cap_feat_dim], tokens a multiple of 32; is_pad: bool
        [batch, tokens], True where the learned padding token goes. Returns [batch, tokens, dim].
        """
        x: Tensor = self.cap_embedder(caption)
        x = torch.where(is_pad[..., None], self.cap_pad_token, x)
        rope = caption_rope(self.config, caption.shape[1], x.device)
        for block in self.context_refiner:
            x = block(x, rope)
        return x

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """One forward of the diffusion transformer.

        latent: [batch, channels, height, width]; t: fp32 [batch], 1 − sigma; caption: what
        `refine_caption` returned. Returns latent's shape, in the parameters' dtype.
        """
        height, width = latent.shape[-2:]
        num_image, num_caption = (height // PATCH) * (width // PATCH), caption.shape[1]
        time: Tensor = self.t_embedder(t * self.config.t_scale)

        x: Tensor = self.all_x_embedder[PATCH_KEY](patchify(latent.to(caption.dtype)))
        rope = image_rope(self.config, height, width, num_caption, x.device)
        if (missing := len(rope) - num_image) > 0:
            x = torch.cat([x, self.x_pad_token.expand(len(x), missing, -1)], dim=1)
        for block in self.noise_refiner:
            x = block(x, rope, time)

        x = torch.cat([x, caption], dim=1)
        rope = torch.cat([rope, caption_rope(self.config, num_caption, x.device)])
        for block in self.layers:
            x = block(x, rope, time)

        # Only image tokens are read, so only they pass the final layer.
        x = self.all_final_layer[PATCH_KEY](x[:, :num_image], time)
        return unpatchify(x, height, width)


# Rotary tables are the same for every step and every picture of one size. They are formed on the
# CPU, so that all machines rotate alike, and copied once: a copy per forward would stall the GPU.
# As ordinary tensors even under inference mode, since a later training step may meet them.


@cache  # lengths are few, and CUDA graphs know the tables by their addresses
@torch.inference_mode(False)
def caption_rope(config: ZImageConfig, tokens: int, device: torch.device) -> Tensor:
    return rope_table(caption_positions(tokens), config.axes_dims, config.rope_theta).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def image_rope(
    config: ZImageConfig, height: int, width: int, caption_tokens: int, device: torch.device
) -> Tensor:
    positions = image_positions(height, width, caption_tokens)
    return rope_table(positions, config.axes_dims, config.rope_theta).to(device)


def caption_positions(tokens: int) -> Tensor:
    """Caption tokens, padding included, sit at (1, 0, 0), (2, 0, 0), …: [tokens, 3]."""
    positions = torch.zeros(tokens, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, tokens + 1)
    return positions


def image_positions(height: int, width: int, caption_tokens: int) -> Tensor:
    """Patches sit at (caption_tokens + 1, row, column); padding up to 32 tokens at the origin."""
    rows, columns = height // PATCH, width // PATCH
    grid = torch.cartesian_prod(
        torch.tensor([caption_tokens + 1]), torch.arange(rows), torch.arange(columns)
    )
    padding = torch.zeros(-len(grid) % TOKEN_MULTIPLE, 3, dtype=torch.int64)
    return torch.cat([grid, padding])


def patchify(latent: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, patches, 2 · 2 · channels]."""
    batch, channels, height, width = latent.shape
    x = latent.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels)


def unpatchify(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `patchify`."""
    batch = len(x)
    x = x.reshape(batch, height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def pad_captions(captions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack captions of one 32-token bucket.

    captions: each [tokens, dim]. Returns the batch [batch, padded, dim] and its bool padding
    mask [batch, padded]. Raises ValueError when the captions belong to different buckets.
    """
    buckets = {-(-len(caption) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for caption in captions}
    if len(buckets) != 1:
        raise ValueError(f"captions of different 32-token buckets in one batch: {sorted(buckets)}")
    (padded,) = buckets
    batch = torch.stack([F.pad(caption, (0, 0, 0, padded - len(caption))) for caption in captions])
    is_pad = torch.arange(padded)[None] >= torch.tensor([[len(caption)] for caption in captions])
    # The host does not wait: on a GPU the captions may still be being encoded.
    return batch, is_pad.to(batch.device, non_blocking=True)
