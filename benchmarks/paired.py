"""Many variants of nano against one reference, prompt by prompt: what several benchmarks share.

Prompts are drawn in batches of captions of one length, and every variant draws a batch before the
next batch is begun: whenever a run ends, or is ended, all variants have drawn the same prompts. A
later run with more prompts goes on where the file ends.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gpu import gpu_facts
from zimage_fp8.evaluate import (
    Difference,
    Drawn,
    Workload,
    Wrap,
    difference,
    exchanged,
    load_requests,
    summarize,
)
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import denoise, schedule, transformer_time
from zimage_fp8.model.source import find_model
from zimage_fp8.model.z_image import TOKEN_MULTIPLE, Block, pad_captions
from zimage_fp8.provenance import commit, machine, versions

HERE = Path(__file__).parent
PROMPTS = HERE / "nano-prompts.txt"
BATCH = 4  # pictures; on two cores 4 take a third less time each than 1, 8 no less than 4
ENTRIES = 64  # compiled versions of one block, one per format of its layers

Cells = dict[str, dict[str, object]]  # of a result file: variant -> summary and pictures


@dataclass(frozen=True)
class Variant:
    """What is drawn: `pipeline` with `layers` in the places of their names.

    around: entered with the transformer while it draws. wrap: changes the velocity field. limit:
    prompts, where not all of them.
    """

    pipeline: Pipeline
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    around: Callable[[nn.Module], AbstractContextManager[object]] | None = None
    wrap: Wrap | None = None
    limit: int | None = None


# By any key: the cells that a variant's pictures go to, under which name.
Variants = Mapping[tuple[object, ...], tuple[Cells, str, Variant]]


@dataclass(frozen=True)
class Batch:
    """Prompts, by their place in the file, whose captions have one padded length."""

    places: list[int]
    captions: list[Tensor]
    noise: Tensor
    steps: int


def all_requests() -> list[ImageRequest]:
    """Of the whole file, whatever is drawn of it: so batches are always the same."""
    return load_requests(find_model("nano"), Workload(PROMPTS))


def batches(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> list[Batch]:
    """In the order in which they complete, so that short and long captions keep their shares."""
    with torch.inference_mode():
        captions = [pipeline.text.encode(request.prompt) for request in requests]
    buckets: dict[int, list[int]] = {}
    for place, caption in enumerate(captions):
        buckets.setdefault(-(-len(caption) // TOKEN_MULTIPLE), []).append(place)
    groups = [group for bucket in buckets.values() for group in _groups(bucket)]
    return [
        Batch(
            group,
            [captions[place].to(pipeline.dtype) for place in group],
            torch.cat([pipeline.draw_latent(requests[place]) for place in group]),
            requests[0].steps,
        )
        for group in sorted(groups, key=max)
    ]


def _groups(places: list[int]) -> Iterator[list[int]]:
    """Of BATCH; what is left over joins the last, since a batch of one would compile anew."""
    whole = max(1, len(places) // BATCH)
    for index in range(whole):
        yield places[index * BATCH : (index + 1) * BATCH if index < whole - 1 else None]


@torch.inference_mode()
def draw_together(pipeline: Pipeline, batch: Batch, wrap: Wrap | None = None) -> list[Drawn]:
    """One picture per prompt of the batch, as `evaluate.draw` draws each by itself."""
    refined = pipeline.denoiser.refine_caption(*pad_captions(batch.captions))

    def velocity(latent: Tensor, sigma: float) -> Tensor:
        t = transformer_time(sigma).expand(len(latent))
        return -pipeline.denoiser.forward(latent, t, refined)

    sigmas = schedule(batch.steps, pipeline.shift)
    latents = denoise(wrap(velocity) if wrap else velocity, batch.noise, sigmas)
    return [Drawn(latent[None], pipeline.decoder.decode(latent[None])) for latent in latents]


def measure(
    variants: Variants,
    reference: Pipeline,
    prompts: int,
    found: dict[str, object],
    write: Callable[[], None],
) -> None:
    """Extend the cells of every variant to so many prompts, or its limit, rounded up to a batch;
    `found["order"]` keeps the places of prompts in the order of the pictures."""
    order: list[int] = []
    for batch in batches(reference, all_requests()):
        done = len(order)
        if done >= prompts:
            return
        order += batch.places
        references: list[Drawn] = []
        for cells, name, variant in variants.values():
            known = pictures_of(cells, name)
            if len(known) > done or done >= (variant.limit or prompts):
                continue
            if not references:
                references = draw_together(reference, batch)
            around = variant.around or (lambda _: nullcontext())
            transformer = variant.pipeline.transformer
            with exchanged(transformer, variant.layers), around(transformer):
                drawn = draw_together(variant.pipeline, batch, variant.wrap)
            known += [difference(*pair) for pair in zip(drawn, references, strict=True)]
            cells[name] = as_json(known)
            found["order"] = max(order, found.get("order", []), key=len)
            write()
        print(f"{len(order)} prompts", flush=True)


EAGER = Block.forward


def compile_blocks() -> None:
    """Blocks as one kernel per stretch of elementwise work: half the time, on a CPU.

    Sums round in another order, so single codes come out as their neighbours, and these single
    codes end as another picture of the same quality. A block with hooks, which would be compiled
    for each of them anew, runs as it is.
    """
    torch._dynamo.config.cache_size_limit = ENTRIES
    torch._dynamo.config.accumulated_cache_size_limit = 4 * ENTRIES
    compiled = torch.compile(EAGER, dynamic=True)

    def forward(block: Block, *inputs: Tensor) -> Tensor:
        has_hooks = any(module._forward_pre_hooks for module in block.modules())
        return (EAGER if has_hooks else compiled)(block, *inputs)

    Block.forward = forward


def pictures_of(cells: Cells, name: str) -> list[Difference]:
    pictures = cells.get(name, {}).get("pictures", [])
    return [Difference(**it) for it in pictures]


def as_json(known: list[Difference]) -> dict[str, object]:
    summary = {
        k: None if math.isnan(v) else round(v, 4) for k, v in asdict(summarize(known)).items()
    }
    return {"summary": summary, "pictures": [asdict(it) for it in known]}


def parser(doc: str, prompts: int, out: Path) -> argparse.ArgumentParser:
    """The options that these benchmarks share."""
    found = argparse.ArgumentParser(description=doc.partition("\n")[0])
    found.add_argument("--prompts", type=int, default=prompts)
    found.add_argument("--compile", action="store_true", help="compile blocks: half the time")
    found.add_argument("--out", type=Path, default=out)
    return found


def begin(file: Path, **facts: object) -> dict[str, object]:
    """What `file` holds, or the head of a new result. Ends the program where the device differs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if file.exists():
        found = json.loads(file.read_text())
        if found["device"] != device:
            sys.exit(f"{file} was measured on {found['device']}, this is {device}: remove it first")
        return found
    return {
        "schema": 2,
        "model": "nano",
        "size": "256x256",
        "steps": 8,
        "dtype": "float32",
        "device": device,
        "prompts": PROMPTS.name,
        **facts,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        **gpu_facts(),
        "versions": versions(),
        "commit": commit(),
    }


def write(found: dict[str, object], file: Path) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)
