"""Qwen3's config and weights, read from a folder for `engine.text`: strict, one layer at a time.

A layer lives in one flat buffer, every tensor at an aligned offset, so that a layer moves between
host and GPU as one copy. Projections that share an input are packed: q|k|v and gate|up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import CheckpointError, ModelError
from zimage_fp8.layout import Shape, read_object
from zimage_fp8.numerics import DTYPE, E4M3_ROW
from zimage_fp8.quant.linear import quantize_weight, weight_amax, weight_scales

Precision = Literal["bf16", "fp8"]

SPECS = {"bf16": None, "fp8": E4M3_ROW}
ALIGNMENT = 256  # bytes; what cuBLAS and Triton like best, and more than any of them needs
FLOATS = ("BF16", "F16", "F32")


class Qwen3Config(BaseModel):
    """The keys of a Qwen3 config.json that shape its forward pass; others say nothing about it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    model_type: Literal["qwen3"]
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(ge=2)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    rope_scaling: None = None
    quantization_config: None = None
    layer_types: list[Literal["full_attention"]] | None = None


def read_qwen3_config(folder: Path) -> Qwen3Config:
    """The config of a text_encoder/ folder, in the form of any transformers version.

    Raises ModelError, naming the key, for what this engine does not compute.
    """
    path = folder / "config.json"
    raw = read_object(path)
    rope = raw.get("rope_parameters")  # where transformers 5 keeps what rope_theta and scaling were
    if isinstance(rope, dict):
        if rope.get("rope_type", "default") != "default":
            raise ModelError(f"{path}: rope_type is {rope['rope_type']!r}, only 'default' is run")
        raw = {"rope_theta": rope.get("rope_theta")} | {**raw, "rope_scaling": None}
    try:
        config = Qwen3Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f" is {first['input']!r}"
        raise ModelError(f"{path}: {where}{value}: {first['msg']}") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{path}: {config.num_attention_heads} heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly"
        )
    return config


@dataclass(frozen=True)
class Weight:
    """A linear layer's matrix [out, in]: plain values, or E4M3 codes with one fp32 scale a row."""

    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Layer:
    """The weights of one layer: views of one flat buffer."""

    input_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    post_norm: Tensor
    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight


NORMS = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
}
LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def layer_shapes(config: Qwen3Config) -> dict[str, Shape]:
    """The tensors of one layer on disk, named without `model.layers.N.` and `.weight`."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


class LayerLayout:
    """Where every tensor of a layer lies in its buffer."""

    def __init__(self, config: Qwen3Config, precision: Precision, dtype: torch.dtype) -> None:
        self.spec = SPECS[precision]
        self.shapes = layer_shapes(config)
        self._slots: dict[str, tuple[int, torch.dtype, Shape]] = {}
        self.num_bytes = 0
        for field, name in NORMS.items():
            self._place(field, dtype, self.shapes[name])
        for field, members in LINEARS.items():
            rows = sum(self.shapes[member][0] for member in members)
            stored = DTYPE[self.spec.format] if self.spec else dtype
            self._place(field, stored, (rows, self.shapes[members[0]][1]))
            if self.spec:
                self._place(f"{field}.scale", torch.float32, (rows,))

    def _place(self, field: str, dtype: torch.dtype, shape: Shape) -> None:
        self._slots[field] = (self.num_bytes, dtype, shape)
        size = prod(shape) * dtype.itemsize
        self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> Layer:
        """The layer inside a buffer, uint8 [num_bytes]."""
        found = {}
        for field, (start, dtype, shape) in self._slots.items():
            size = prod(shape) * dtype.itemsize
            found[field] = buffer[start : start + size].view(dtype).view(shape)

        def linear(field: str) -> Weight:
            return Weight(found[field], found.get(f"{field}.scale"))

        return Layer(
            input_norm=found["input_norm"],
            q_norm=found["q_norm"],
            k_norm=found["k_norm"],
            post_norm=found["post_norm"],
            qkv=linear("qkv"),
            out=linear("out"),
            gate_up=linear("gate_up"),
            down=linear("down"),
        )

    def fill(self, buffer: Tensor, reader: ShardReader, prefix: str) -> None:
        """Read a layer into its buffer, on the buffer's device, quantizing on the way."""
        layer = self.views(buffer)
        for field, name in NORMS.items():
            getattr(layer, field).copy_(reader.read(f"{prefix}{name}.weight", buffer.device))
        for field, members in LINEARS.items():
            target: Weight = getattr(layer, field)
            row = 0
            for member in members:
                weight = reader.read(f"{prefix}{member}.weight", buffer.device)
                rows = slice(row, row + len(weight))
                row += len(weight)
                if self.spec is None or target.scale is None:
                    target.values[rows].copy_(weight)
                    continue
                (scale,) = weight_scales([weight_amax(weight, self.spec)], self.spec)
                target.scale[rows].copy_(scale)
                target.values[rows].copy_(quantize_weight(weight, scale, self.spec))


def check_tensors(reader: ShardReader, config: Qwen3Config) -> str:
    """Compare the headers with the config; returns what names start with: `model.` or nothing.

    Every layer must be complete but the last, which is not read; the final norm and `lm_head` may
    be there or not. Raises CheckpointError naming everything missing, mis-shaped, mis-typed or
    unknown.
    """
    prefix = "model." if any(name.startswith("model.") for name in reader.infos) else ""
    layers = {
        f"{prefix}layers.{index}.{name}.weight": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    }
    table = (config.vocab_size, config.hidden_size)
    known = layers | {
        f"{prefix}embed_tokens.weight": table,
        f"{prefix}norm.weight": (config.hidden_size,),
        "lm_head.weight": table,
    }
    last = f"{prefix}layers.{config.num_hidden_layers - 1}."
    unread = (last, f"{prefix}norm.", "lm_head.")
    problems = [
        f"{name}: missing"
        for name in known
        if name not in reader.infos and not name.startswith(unread)
    ]
    for name, info in reader.infos.items():
        if name not in known:
            problems.append(f"{name}: not part of a Qwen3 model of this config")
        elif info.shape != known[name]:
            problems.append(f"{name}: shape {list(info.shape)}, expected {list(known[name])}")
        elif info.dtype not in FLOATS:
            problems.append(f"{name}: type {info.dtype}, expected one of {', '.join(FLOATS)}")
    if problems:
        raise CheckpointError(str(reader.folder), problems, hint="copy the text encoder again")
    return prefix
