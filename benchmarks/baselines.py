"""What users run today, on the same machine: diffusers' ZImagePipeline in BF16, eager and compiled.

    python benchmarks/fake_model.py /data/z-image-random
    python benchmarks/baselines.py /data/z-image-random --out baselines.json [--modes eager]

Times the denoise loop, the text encoder, the VAE and the whole call from prompt to PIL picture, at
8 steps, guidance 0, batch 1. Loop, encoder and VAE run back to back for `--seconds`, with SM clock
and power, as benchmarks/engine.py runs ours. Forwards of the transformer are counted, not assumed.
`compiled` is torch.compile on the transformer's blocks, as diffusers recommends, for each shape by
itself, with cuDNN's attention on a GPU; the first loop, which compiles, is timed apart.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import nn

from engine import SIZES, STEPS, reset_peak
from gpu import DEVICE, RANDOM_WEIGHTS, elapsed_ms, envelope, sustained, write_rows
from request import prompt

MODES = ("eager", "compiled")
CALLS = 7  # whole calls, of which the median is taken


class Forwards:
    """Counts the forwards of a module, through a hook."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1

    def during(self, run: Callable[[], object]) -> int:
        before = self.count
        run()
        return self.count - before


def baselines(
    folder: Path, modes: list[str], scale: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row per mode and size."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    forwards = Forwards(pipe.transformer)
    for mode in modes:
        if mode == "compiled":
            compile_transformer(pipe)
        for name, (height, width) in SIZES[scale].items():
            reset_peak()
            row = {"what": f"diffusers, BF16, {mode}", "mode": mode, "size": name}
            row |= measure(pipe, forwards, height, width, seconds)
            shown = " ".join(f"{part} {row[part]['ms']:.1f}" for part in PARTS)
            print(f"{row['what']:28} {name:10} {shown} ms, {row['nfe']} forwards", flush=True)
            yield row


def compile_transformer(pipe: ZImagePipeline) -> None:
    if DEVICE.type == "cuda":
        pipe.transformer.set_attention_backend("_native_cudnn")
    torch._dynamo.config.recompile_limit = 64  # beyond it blocks run eagerly, without an error
    pipe.transformer.compile_repeated_blocks(dynamic=False)


PARTS = ("loop", "encode", "decode", "call")


@torch.inference_mode()
def measure(
    pipe: ZImagePipeline, forwards: Forwards, height: int, width: int, seconds: float
) -> dict[str, Any]:
    rng = Random(0)
    text = prompt(rng)
    (caption,), _ = pipe.encode_prompt(text, DEVICE, do_classifier_free_guidance=False)
    settings = {
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": 0.0,
    }

    def loop() -> Any:
        return pipe(prompt_embeds=[caption], output_type="latent", **settings).images

    first_ms = elapsed_ms(loop)
    latent = loop().to(pipe.vae.dtype)
    row: dict[str, Any] = {
        "caption_tokens": len(caption),
        "nfe": forwards.during(loop),
        "first_loop_ms": first_ms,
        "loop": sustained(loop, seconds),
        "encode": sustained(
            lambda: pipe.encode_prompt(text, DEVICE, do_classifier_free_guidance=False), seconds / 4
        ),
        "decode": sustained(lambda: pipe.vae.decode(latent, return_dict=False), seconds / 4),
    }
    calls = sorted(elapsed_ms(lambda: pipe(prompt=prompt(rng), **settings)) for _ in range(CALLS))
    row["call"] = {"ms": calls[CALLS // 2], "times_ms": calls}
    if DEVICE.type == "cuda":
        row["torch_allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--scale", choices=SIZES, default="full", help="tiny: a dry run")
    arguments = parser.parse_args()
    facts = envelope() | {"weights": RANDOM_WEIGHTS, "steps": STEPS}
    rows = baselines(arguments.model, arguments.modes, arguments.scale, arguments.seconds)
    write_rows(arguments.out, facts, "baselines", rows)


if __name__ == "__main__":
    main()
