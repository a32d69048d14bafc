"""What a Z-Image transformer's checkpoint contains: its config, its tensors' names and shapes.

Names are diffusers'. Tensors that share an input are separate on disk and fused at load; their
members and order are stated here once (`FUSED`), for the policy, the writer and the model.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zimage_fp8.errors import ModelError

PATCH = 2
PATCH_KEY = "2-1"  # diffusers' key for patch size 2, one frame
ADALN_DIM = 256
TIME_HIDDEN_DIM = 1024

FUSED: dict[str, tuple[str, ...]] = {
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
}

# What loaded linear layers of a block are called in tables.
KINDS: dict[str, str] = {
    "attention.to_qkv": "qkv",
    "attention.to_out.0": "out",
    "feed_forward.w13": "w13",
    "feed_forward.w2": "w2",
}

Shape = tuple[int, ...]

COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")


@dataclass(frozen=True)
class ZImageConfig:
    """The shape of a Z-Image transformer; field names are those of its config.json."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    in_channels: int = 16
    norm_eps: float = 1e-5
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        return min(self.dim, ADALN_DIM)

    @property
    def patch_dim(self) -> int:
        return PATCH * PATCH * self.in_channels


def read_object(path: Path) -> dict[str, Any]:
    """A model's JSON file that holds an object. Raises ModelError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path} is missing", hint="copy the whole folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", hint="copy it again") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def read_config(folder: Path) -> tuple[ZImageConfig, dict[str, object]]:
    """The config of the transformer in `folder`, and config.json as it stands.

    Raises ModelError when the file is missing, damaged, or of an architecture this program does
    not run.
    """
    path = folder / "config.json"
    raw = read_object(path)
    if (found := raw.get("_class_name")) != "ZImageTransformer2DModel":
        raise ModelError(
            f"{path} describes {found or 'no class'}, expected ZImageTransformer2DModel",
            hint="this program runs the Z-Image transformer only",
        )
    for key, expected in UNSUPPORTED.items():
        if raw.get(key, expected) != expected:
            raise ModelError(f"{path}: {key} is {raw[key]!r}, only {expected!r} is supported")
    if raw.get("n_kv_heads", raw.get("n_heads")) != raw.get("n_heads"):
        raise ModelError(f"{path}: n_kv_heads differs from n_heads, which is not supported")
    known = {field.name for field in fields(ZImageConfig)}
    try:
        config = CONFIG.validate_python({k: v for k, v in raw.items() if k in known})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path}: {where} is {first['input']!r}: {first['msg']}") from None
    _check_geometry(path, config)
    return config, raw


UNSUPPORTED: dict[str, object] = {
    "siglip_feat_dim": None,
    "qk_norm": True,
    "all_patch_size": [2],
    "all_f_patch_size": [1],
}


CONFIG = TypeAdapter(ZImageConfig)


def _check_geometry(path: Path, config: ZImageConfig) -> None:
    sizes = (config.dim, config.n_heads, config.cap_feat_dim, config.in_channels, *config.axes_lens)
    if min(sizes) < 1 or min(config.n_layers, config.n_refiner_layers) < 0:
        raise ModelError(f"{path}: a size is zero or negative: {config}")
    if config.dim % config.n_heads or sum(config.axes_dims) != config.head_dim:
        raise ModelError(
            f"{path}: axes_dims {list(config.axes_dims)} must add up to the head dimension, "
            f"{config.dim} / {config.n_heads} heads"
        )
    if len(config.axes_dims) != 3 or len(config.axes_lens) != 3:
        raise ModelError(f"{path}: axes_dims and axes_lens need three entries each")


def tensor_shapes(config: ZImageConfig) -> dict[str, Shape]:
    """Every tensor of an unquantized transformer: name -> shape, in reading order."""
    dim, time = config.dim, config.time_dim
    shapes: dict[str, Shape] = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **_linear("t_embedder.mlp.0", ADALN_DIM, TIME_HIDDEN_DIM),
        **_linear("t_embedder.mlp.2", TIME_HIDDEN_DIM, time),
        **_linear(f"all_x_embedder.{PATCH_KEY}", config.patch_dim, dim),
        "cap_embedder.0.weight": (config.cap_feat_dim,),
        **_linear("cap_embedder.1", config.cap_feat_dim, dim),
        **_linear(f"all_final_layer.{PATCH_KEY}.linear", dim, config.patch_dim),
        **_linear(f"all_final_layer.{PATCH_KEY}.adaLN_modulation.1", time, dim),
    }
    for block in block_names(config):
        shapes |= {f"{block}.{name}": shape for name, shape in _block_shapes(config).items()}
        if not block.startswith("context_refiner."):
            shapes |= _linear(f"{block}.adaLN_modulation.0", time, 4 * dim)
    return shapes


def linear_shapes(config: ZImageConfig) -> dict[str, Shape]:
    """Every linear layer: module name -> [out, in]."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensor_shapes(config).items()
        if name.endswith(".weight") and len(shape) == 2
    }


def product_shapes(config: ZImageConfig) -> dict[str, Shape]:
    """The matrix products of a block once it is loaded: name -> [out, in]."""
    dim, ffn = config.dim, config.ffn_dim
    return {
        "to_qkv": (3 * dim, dim),
        "to_out": (dim, dim),
        "w13": (2 * ffn, dim),
        "w2": (dim, ffn),
    }


def block_names(config: ZImageConfig) -> list[str]:
    """Every transformer block: both refiners, then the layers."""
    refiners = range(config.n_refiner_layers)
    return [
        *(f"noise_refiner.{index}" for index in refiners),
        *(f"context_refiner.{index}" for index in refiners),
        *(f"layers.{index}" for index in range(config.n_layers)),
    ]


def fused_name(layer: str) -> str:
    """The module that holds a linear once loaded: `….attention.to_q` -> `….attention.to_qkv`."""
    for fused, members in FUSED.items():
        for member in members:
            if layer.endswith("." + member):
                return layer.removesuffix(member) + fused
    return layer


def members_of(module: str) -> tuple[str, ...]:
    """The linears on disk behind a loaded module, in the order their rows are stacked."""
    for fused, members in FUSED.items():
        if module.endswith("." + fused):
            return tuple(module.removesuffix(fused) + member for member in members)
    return (module,)


def kind_of(module: str) -> str:
    """What a loaded linear layer is: `layers.7.attention.to_qkv` -> `qkv`."""
    return next(kind for suffix, kind in KINDS.items() if module.endswith(f".{suffix}"))


def block_of(module: str) -> str:
    """The block of a layer: `layers.7.feed_forward.w2` -> `layers.7`."""
    return ".".join(module.split(".")[:2])


def _block_shapes(config: ZImageConfig) -> dict[str, Shape]:
    dim, ffn = config.dim, config.ffn_dim
    return {
        "attention.to_q.weight": (dim, dim),
        "attention.to_k.weight": (dim, dim),
        "attention.to_v.weight": (dim, dim),
        "attention.to_out.0.weight": (dim, dim),
        "attention.norm_q.weight": (config.head_dim,),
        "attention.norm_k.weight": (config.head_dim,),
        "feed_forward.w1.weight": (ffn, dim),
        "feed_forward.w2.weight": (dim, ffn),
        "feed_forward.w3.weight": (ffn, dim),
        "attention_norm1.weight": (dim,),
        "attention_norm2.weight": (dim,),
        "ffn_norm1.weight": (dim,),
        "ffn_norm2.weight": (dim,),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
