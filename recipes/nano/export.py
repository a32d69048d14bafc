"""The diffusers folder, and the proof that diffusers draws from it what our sampler draws."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.nano import captions
from recipes.nano.autoencoder import Codec, psnr_db
from recipes.nano.captions import Scene
from recipes.nano.denoiser import Denoiser, sample
from recipes.nano.evaluate import load_denoiser
from recipes.nano.shape import LATENT_CHANNELS, LATENT_SIZE, LONG, SHIFT, SHORT, SIZE, STEPS, Shape
from recipes.nano.tokenizer import CHAT, CHAT_TEMPLATE, Captioner
from recipes.nano.workspace import Workspace
from zimage_fp8.layout import FUSED

HERE = Path(__file__).parent
COMPANIONS = ("NOTICE", "calibration-prompts.txt")  # travel with the weights
MAX_BYTES = 39_800_000
SHARD = "14MB"
SAME_PSNR_DB = 60.0  # fp32 on both sides: rounding of another order of sums, nothing else


def export(work: Workspace, shape: Shape, folder: Path, target: Path) -> None:
    """Write `target` from the BF16 pieces; raises when it is too big or draws otherwise."""
    device, dtype = torch.device("cpu"), torch.float32
    things = captions.load_things(work.data, shape.num_objects)
    captioner = Captioner(work.data, things)
    model, _ = load_denoiser(shape, captioner.vocab_size, folder, device, dtype)
    codec = Codec(folder, shape, device, dtype)
    _write(work, shape, model, codec, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    work.log(f"{target}: {size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        raise ValueError(f"{target} holds {size} bytes, more than {MAX_BYTES}")
    _check_configs(target)
    _check_pictures(work, captioner, model, codec, target)


def _write(work: Workspace, shape: Shape, model: Denoiser, codec: Codec, target: Path) -> None:
    bf16 = torch.bfloat16
    transformer = ZImageTransformer2DModel(**transformer_config(shape))
    transformer.load_state_dict(unpack(model.transformer.state_dict()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work.data / "tokenizer.json"),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="right",
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False
    )
    parts = {"transformer": transformer, "text_encoder": model.text_encoder, "vae": codec.vae}
    # Casting back is exact: these are BF16 numbers computing in FP32.
    saved = {name: _cast_copy(part, bf16) for name, part in parts.items()}
    if target.exists():
        shutil.rmtree(target)
    pipeline = ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer, **saved)
    pipeline.save_pretrained(target, max_shard_size=SHARD)
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    for name in COMPANIONS:
        shutil.copyfile(HERE / name, target / name)


def _cast_copy(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype, memory_format=torch.contiguous_format)
    return copied


def transformer_config(shape: Shape) -> dict:
    """Our configuration in the words of diffusers' config.json."""
    config = shape.transformer
    return {
        "in_channels": config.in_channels,
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "norm_eps": config.norm_eps,
        "cap_feat_dim": config.cap_feat_dim,
        "rope_theta": config.rope_theta,
        "t_scale": config.t_scale,
        "axes_dims": list(config.axes_dims),
        "axes_lens": list(config.axes_lens),
    }


def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections that share an input, split into diffusers' separate matrices."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for packed, parts in FUSED.items():
            if f"{packed}." in name:
                pieces = tensor.chunk(len(parts))
                names = [name.replace(packed, part) for part in parts]
                split |= dict(zip(names, pieces, strict=True))
                break
        else:
            split[name] = tensor
    return split


def _check_configs(target: Path) -> None:
    """No trace of the machine that wrote them."""
    for file in target.rglob("*.json"):
        config = json.loads(file.read_text())
        found = [key for key in config if key.startswith("_name_or_path")]
        if found or str(target.resolve()) in file.read_text():
            raise ValueError(f"{file} names a local path: {found}")


@torch.no_grad()
def _check_pictures(
    work: Workspace, captioner: Captioner, model: Denoiser, codec: Codec, target: Path
) -> None:
    """diffusers from the folder and our sampler from the pieces, same noise, both in FP32."""
    pipeline = ZImagePipeline.from_pretrained(target, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(3)
    scenes = [Scene(0, 7), Scene(1, 12, 2)]
    cases = [(captioner.short(scene, rng)[0], SHORT) for scene in scenes]
    cases += [(captioner.long(scene, rng), LONG) for scene in scenes]
    for number, (prompt, bucket) in enumerate(cases):
        ids = torch.from_numpy(captioner.encode([prompt], bucket)).long()
        _check_tokens(pipeline.tokenizer, prompt, ids)
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        ours = codec.decode(sample(model, ids, noise))
        theirs = pipeline(
            prompt=prompt, height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=0.0,
            latents=noise.clone(), output_type="pt",
        ).images  # fmt: skip
        agreement = psnr_db(ours, theirs * 2 - 1).item()
        work.log(f"diffusers and our sampler agree to {agreement:.1f} dB: {prompt}")
        if agreement < SAME_PSNR_DB:
            raise ValueError(f"diffusers draws another picture ({agreement:.1f} dB): {prompt}")


def _check_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str, ids: Tensor) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False, add_generation_prompt=True, enable_thinking=True,
    )  # fmt: skip
    if text != CHAT.format(prompt=prompt) or tokenizer(text).input_ids != ids[ids != 0].tolist():
        raise ValueError(f"the exported tokenizer reads the prompt differently: {text!r}")
