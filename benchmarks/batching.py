"""Where step-level batching pays: what one picture's step costs when several share the forward.

    python benchmarks/batching.py --out benchmarks/results/batching.json
    python benchmarks/batching.py --model z-image-random --policies full bf16_base \
        --sizes 512x512 1024x512 1024x1024

Pictures of different prompts and seeds, each at its own step, as the server mixes them. Batches are
timed in turns, so that a machine that slows down slows them all; the figure is the median time of a
step divided by the batch.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from zimage_fp8.engine import EngineOptions, load_pipeline
from zimage_fp8.model.drawing import Drawing
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import MAX_STEPS, ImageRequest
from zimage_fp8.protocol import parse_size
from zimage_fp8.provenance import commit, machine, versions

HERE = Path(__file__).parent
PROMPTS = ("a red apple", "an owl on a teal background", "a blue car", "a sleeping cat")
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--policies", nargs="+", default=["bf16_base", "online_fp8"])
    parser.add_argument("--sizes", nargs="+", default=["64x64", "128x128", "256x256"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batching.json")
    given = parser.parse_args()
    rows = []
    for policy in given.policies:
        pipeline = load_pipeline(
            given.model, options=EngineOptions(), policy=policy, device=given.device
        )
        for size in given.sizes:
            found = measure(pipeline, size, given.batches, given.runs)
            rows += [{"policy": policy, "size": size, **row} for row in found]
            print(policy, size, *(f"{row['picture_ms']:.1f}" for row in found), "ms", flush=True)
    report = {
        "model": pipeline.model,
        "device": pipeline.describe()["device"],
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/batching.py", *sys.argv[1:]]),
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(pipeline: Pipeline, size: str, batches: list[int], runs: int) -> list[dict[str, float]]:
    """One row per batch: what a picture's step takes in it, in milliseconds."""
    width, height = parse_size(size)
    most = max(batches)
    drawings = [
        pipeline.begin(
            ImageRequest(PROMPTS[n % len(PROMPTS)], width, height, seed=n, steps=MAX_STEPS)
        )
        for n in range(most)
    ]
    for late in range(most):  # nobody is at the same step as another
        for drawing in drawings[late:]:
            pipeline.step([drawing])
    laps: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(WARM_UP + runs):
        for batch in batches:
            laps[batch].append(step_s(pipeline, drawings[:batch]) / batch)
    return [
        {"batch": batch, "picture_ms": statistics.median(laps[batch][WARM_UP:]) * 1000}
        for batch in batches
    ]


def step_s(pipeline: Pipeline, drawings: list[Drawing]) -> float:
    """Seconds of one step; drawings start again before they are done."""
    for drawing in drawings:
        drawing.done %= drawing.total - 1
    began = time.perf_counter()
    pipeline.step(drawings)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
