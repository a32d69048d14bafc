"""The transformer and its text encoder: built, run together, sampled from.

The transformer is this package's own class, equal to diffusers'. The text encoder is transformers'
Qwen3Model; training reads `hidden_states[-2]`, so `encode_text` runs all layers but the last.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from recipes.nano.shape import SHIFT, STEPS, Shape
from recipes.nano.tokenizer import PAD
from zimage_fp8.kernels import rms_norm
from zimage_fp8.model.z_image import Block, ContextBlock, ZImageTransformer

STEM = "denoiser"
TRANSFORMER, TEXT = "transformer.", "text_encoder."


def build_text_encoder(shape: Shape, vocab_size: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.text_dim,
        intermediate_size=shape.text_ffn,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_dim // shape.head_dim,
        num_key_value_heads=1,
        head_dim=shape.head_dim,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3Model(config)


def build_transformer(shape: Shape) -> ZImageTransformer:
    """adaLN and the final layer start at zero: every block is at first the identity."""
    model = ZImageTransformer(shape.transformer)
    for parameter in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(parameter, std=0.02)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        for packed, parts in ((block.attention.to_qkv, 3), (block.feed_forward.w13, 2)):
            for part in packed.weight.data.chunk(parts):
                nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(block.attention.to_out[0].weight)
        nn.init.xavier_uniform_(block.feed_forward.w2.weight)
    modulated = [block.adaLN_modulation[0] for block in (*model.noise_refiner, *model.layers)]
    final = model.all_final_layer["2-1"]
    for linear in (*modulated, final.linear, final.adaLN_modulation[1]):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


class Denoiser(nn.Module):
    """Token ids, noisy latents and times in; the transformer's raw output out."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.transformer = build_transformer(shape)
        self.text_encoder = build_text_encoder(shape, vocab_size)

    def forward(self, latent: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """latent: fp32 [batch, 16, 32, 32]; t: fp32 [batch], 1 - sigma; ids: int64 [batch, 32n]."""
        return self.transformer(latent, t, self.caption(ids))

    def caption(self, ids: Tensor) -> Tensor:
        return self.transformer.refine_caption(encode_text(self.text_encoder, ids), ids == PAD)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All that a 256-pixel picture reaches: no image padding, no last text layer."""
        last = len(self.text_encoder.layers) - 1
        unreached = (f"{TEXT}layers.{last}.", f"{TEXT}norm.", f"{TRANSFORMER}x_pad_token")
        return [(name, p) for name, p in self.named_parameters() if not name.startswith(unreached)]

    def compile_blocks(self) -> None:
        """One compilation per kind of block and token count, shared by all blocks of the kind."""
        run_block = torch.compile(_run_block, dynamic=False)
        run_context = torch.compile(_run_context_block, dynamic=False)
        for block in (*self.transformer.noise_refiner, *self.transformer.layers):
            block.forward = partial(run_block, block)
        for block in self.transformer.context_refiner:
            block.forward = partial(run_context, block)
        self.text_encoder.run_layer = torch.compile(run_text_layer, dynamic=False)

    def run_eagerly(self) -> None:
        transformer = self.transformer
        for block in (
            *transformer.noise_refiner, *transformer.context_refiner, *transformer.layers,
        ):  # fmt: skip
            block.__dict__.pop("forward", None)
        self.text_encoder.__dict__.pop("run_layer", None)


def _run_block(block: Block, x: Tensor, rope: Tensor, time: Tensor) -> Tensor:
    return Block.forward(block, x, rope, time)


def _run_context_block(block: ContextBlock, x: Tensor, rope: Tensor) -> Tensor:
    return ContextBlock.forward(block, x, rope)


def encode_text(model: Qwen3Model, ids: Tensor) -> Tensor:
    """`hidden_states[-2]` of right-padded prompts, [batch, tokens, dim].

    Attention is causal, so what follows a prompt cannot change it and no mask is needed.
    """
    run_layer = model.__dict__.get("run_layer", run_text_layer)
    x = F.embedding(ids, model.embed_tokens.weight)
    cos, sin = _text_rope(model, ids.shape[1], x)
    for layer in model.layers[:-1]:
        x = run_layer(layer, x, cos, sin)
    return x


def _text_rope(model: Qwen3Model, tokens: int, x: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens, device=x.device, dtype=torch.float32)
    angle = torch.outer(positions, model.rotary_emb.inv_freq.float()).repeat(1, 2)
    return angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]


def run_text_layer(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One Qwen3 decoder layer."""
    heads, mlp, dim = layer.self_attn, layer.mlp, layer.self_attn.head_dim
    h = _norm(layer.input_layernorm, x)
    q = _rotate(_norm(heads.q_norm, heads.q_proj(h).unflatten(-1, (-1, dim))), cos, sin)
    k = _rotate(_norm(heads.k_norm, heads.k_proj(h).unflatten(-1, (-1, dim))), cos, sin)
    v = heads.v_proj(h).unflatten(-1, (-1, dim))
    k, v = k.expand_as(q), v.expand_as(q)  # one key-value head for all
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    x = x + heads.o_proj(mixed.transpose(1, 2).flatten(2))
    h = _norm(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def sample_times(batch: int, device: torch.device) -> Tensor:
    """Noise levels to train on: logit-normal, three in ten uniform, shifted like the sampler's."""
    sigma = torch.sigmoid(torch.randn(batch, device=device))
    is_uniform = torch.rand(batch, device=device) < 0.3
    return shifted(torch.where(is_uniform, torch.rand(batch, device=device), sigma))


def shifted(sigma: Tensor) -> Tensor:
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def flow_loss(model: Denoiser, latent: Tensor, ids: Tensor) -> Tensor:
    """Rectified flow: on the way x0 -> noise the raw output is x0 - noise, minus the velocity."""
    sigma = sample_times(len(latent), latent.device)
    noise = torch.randn_like(latent)
    between = torch.lerp(latent, noise, sigma[:, None, None, None])
    out = model(between, 1 - sigma, ids)
    return F.mse_loss(out.float(), latent - noise)


@torch.no_grad()
def sample(model: Denoiser, ids: Tensor, noise: Tensor, steps: int = STEPS) -> Tensor:
    """Euler steps without guidance: fp32 latents from fp32 noise, captions of one bucket."""
    levels = [*shifted(torch.linspace(1, 1 / steps, steps)).tolist(), 0.0]
    caption = model.caption(ids)
    latent = noise
    for sigma, following in pairwise(levels):
        t = torch.full((len(latent),), 1 - sigma, device=latent.device)
        latent = latent - (following - sigma) * model.transformer(latent, t, caption).float()
    return latent
