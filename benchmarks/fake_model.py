"""Write a complete Z-Image-Turbo pipeline folder with the true shapes and RANDOM weights.

    python benchmarks/fake_model.py OUT [--scale full|tiny] [--parts transformer,vae] [--seed 0]

For measuring speed and memory where the real weights are not: sizes, types, file names and shards
are those of the original, so every code path, kernel and transfer is the real one. Pictures mean
nothing. Seconds measured with it are real; quality is not.

Weights are normal with standard deviation 1.24 / sqrt(inputs), which is 0.02 at 3840 inputs: every
layer then raises the root mean square of what it reads by about a quarter, and the norms behind it
bring it back, so activations stay of the order of one at any width. (With all 34 blocks, 384 wide,
8 forwards in BF16: the layers' outputs rise from 2.1 to 4.6 root mean square, the largest value
anywhere is 22.) Norm weights lie around 1,
biases around 0. One seed gives one model per kind of device (CUDA draws other numbers than the
CPU). On CUDA the weights are drawn there, tensor by tensor.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_fp8.checkpoint.shards import TensorInfo, write_index, write_shard
from zimage_fp8.checkpoint.writer import complete_or_nothing
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import COMPONENTS, Shape, ZImageConfig, tensor_shapes
from zimage_fp8.model.source import NANO_FOLDER

WARNING = "RANDOM WEIGHTS, for benchmarks only: pictures are meaningless"
GAIN = 1.24  # 0.02 · sqrt(3840)
SMALL = 0.02  # spread of biases around 0 and of norm weights around 1
WRITERS = 4  # shards written at once

README = f"""# {WARNING}

Made by `benchmarks/fake_model.py`. Shapes, names and types are those of Z-Image-Turbo (or of a
tiny relative, when made with `--scale tiny`); the numbers are noise. The tokenizer is that of the
embedded model `nano`. Use it to measure speed and memory, never quality.
"""


@dataclass(frozen=True)
class Scale:
    """The sizes of a pipeline: its transformer, the differences of its text encoder and VAE."""

    transformer: ZImageConfig
    text: Mapping[str, Any]
    vae_channels: tuple[int, ...]
    vae_layers: int
    shard_bytes: Mapping[str, int]  # the original's transformer has two shards, its encoder three


TEXT_FULL = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
}
TEXT_TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "vocab_size": 2944,  # what the tokenizer needs
}
SCALES = {
    "full": Scale(
        ZImageConfig(),
        TEXT_FULL,
        (128, 256, 512, 512),
        2,
        {"transformer": 10**10, "text_encoder": 4 * 10**9, "vae": 10**10},
    ),
    "tiny": Scale(
        ZImageConfig(
            dim=192,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=3,
            cap_feat_dim=128,
            axes_dims=(16, 24, 24),
        ),
        TEXT_TINY,
        (32, 32, 64, 64),
        1,
        {"transformer": 4_500_000, "text_encoder": 10**6, "vae": 10**10},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="new folder; its name must contain 'random'")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--parts", default=",".join(COMPONENTS), help="components to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = arguments.parts.split(",")
    try:
        num_bytes = write_fake_model(
            arguments.out, arguments.scale, parts=parts, seed=arguments.seed, device=device
        )
    except ZImageError as error:
        parser.error(str(error))
    print(f"{arguments.out}: {num_bytes / 1e9:.2f} GB · {WARNING}")
    return 0


def write_fake_model(
    out: Path,
    scale: str = "full",
    *,
    parts: list[str] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> int:
    """Write the folder `out`, complete or not at all; returns the bytes of its weights.

    parts: components to write, all by default. device: where numbers are drawn. Raises UsageError
    for a folder that exists or does not say in its name that it is random, and for unknown parts.
    """
    parts = list(COMPONENTS) if parts is None else parts
    if "random" not in out.name.lower():
        raise UsageError(f"{out.name!r}: the folder's name must contain 'random'")
    if out.exists():
        raise UsageError(f"{out} exists; remove it or name another folder")
    if unknown := set(parts) - set(COMPONENTS):
        raise UsageError(f"parts {sorted(unknown)}: expected some of {', '.join(COMPONENTS)}")
    sizes, device = SCALES[scale], device or torch.device("cpu")
    with complete_or_nothing(out) as partial:
        (partial / "README.md").write_text(README)
        _write_json(partial / "model_index.json", MODEL_INDEX)
        for part in ("tokenizer", "scheduler"):
            if part in parts:
                shutil.copytree(NANO_FOLDER / part, partial / part)
        jobs = []
        for part, (config, shapes, stem) in _weights(sizes).items():
            if part in parts:
                (partial / part).mkdir()
                _write_json(partial / part / "config.json", config)
                jobs += _shards(partial / part, stem, shapes, sizes.shard_bytes[part])
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda job: _write_random(*job, seed, device), jobs))
    return sum(2 * prod(shape) for _, shapes in jobs for shape in shapes.values())


def _weights(scale: Scale) -> dict[str, tuple[dict[str, Any], dict[str, Shape], str]]:
    """Per component with weights: its config, its tensors' shapes, the stem of its files."""
    vae = _vae_config(scale)
    return {
        "transformer": (
            _transformer_config(scale.transformer),
            tensor_shapes(scale.transformer),
            "diffusion_pytorch_model",
        ),
        "text_encoder": (TEXT_CONFIG | dict(scale.text), text_shapes(scale.text), "model"),
        "vae": (vae, _vae_shapes(vae), "diffusion_pytorch_model"),
    }


def text_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor of a Qwen3 for causal language modelling whose head is tied to its embedding."""
    hidden, ffn, head_dim = (
        config[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    layer = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        **{
            f"model.layers.{index}.{name}": shape
            for index in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (hidden,),
    }


def _vae_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**{k: v for k, v in config.items() if not k.startswith("_")})
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def _shards(
    folder: Path, stem: str, shapes: Mapping[str, Shape], limit: int
) -> Iterator[tuple[Path, dict[str, Shape]]]:
    """(file, its tensors) of a component, cut where diffusers would cut; writes the index."""
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if filled and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    if len(groups) == 1:
        yield folder / f"{stem}.safetensors", groups[0]
        return
    files = [f"{stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    write_index(folder, stem, weight_map, sum(2 * prod(shape) for shape in shapes.values()))
    yield from zip((folder / file for file in files), groups, strict=True)


def _write_random(path: Path, shapes: Mapping[str, Shape], seed: int, device: torch.device) -> None:
    digest = hashlib.sha256(f"{seed} {path.parent.name}/{path.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))

    def draw(name: str) -> Tensor:
        return random_tensor(name, shapes[name], generator).cpu()

    infos = {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}
    write_shard(path, infos, draw, {"format": "pt", "weights": WARNING})


def random_tensor(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """One BF16 tensor on the generator's device: a weight, a norm's weight or a bias."""
    options: dict[str, Any] = {"device": generator.device, "dtype": torch.bfloat16}
    value = torch.randn(shape, generator=generator, **options)
    if len(shape) == 1:
        return value.mul_(SMALL).add_(0.0 if name.endswith(".bias") else 1.0)
    return value.mul_(GAIN / prod(shape[1:]) ** 0.5)


def _transformer_config(config: ZImageConfig) -> dict[str, Any]:
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_name_or_path": WARNING,
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        **asdict(config),
        "n_kv_heads": config.n_heads,
        "qk_norm": True,
    }


def _vae_config(scale: Scale) -> dict[str, Any]:
    depth = len(scale.vae_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_name_or_path": WARNING,
        "act_fn": "silu",
        "block_out_channels": list(scale.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "force_upcast": False,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "layers_per_block": scale.vae_layers,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


# The original's config.json: written by an older transformers, hence rope_theta at the top.
TEXT_CONFIG: dict[str, Any] = {
    "_name_or_path": WARNING,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_name_or_path": WARNING,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "TokenizersBackend"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
