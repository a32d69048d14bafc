"""What each way to 8 bits, and each way of choosing codes and scales, costs nano's pictures.

    python benchmarks/quality_nano.py                     200 prompts, BF16 and FP32
    python benchmarks/quality_nano.py --limit 24 --prompts benchmarks/nano-prompts-development.txt

Every variant draws the same prompts from the same latents as the unquantized model; PSNR is of the
8-bit pictures, one value per prompt, and differences to plain `full` are paired. In BF16 the rest
of the network rounds as well, and any change of a layer, however small, ends some 50 dB away. In
FP32, where `bf16_base` shows how far BF16 itself is from it, what is left is the 8-bit layers' own.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpu import gpu_facts
from zimage_fp8.bench.statistics import mean_interval
from zimage_fp8.model.calibration import read_prompts
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.provenance import commit, machine, versions
from zimage_fp8.quant.method import Method
from zimage_fp8.quantize import CalibrationOptions, quantize

HERE = Path(__file__).parent
RESULT = HERE / "results" / "nano-quality.json"
PROMPTS = HERE / "nano-prompts.txt"
FIRST_SEED = 5000
SIZE, STEPS = 256, 8
BATCH = 8
WHITE = 255.0


@dataclass(frozen=True)
class Variant:
    """A checkpoint to make and draw with; without a policy, the unquantized model."""

    name: str
    policy: str | None = None
    method: Method = Method()  # noqa: RUF009 - frozen
    dtype: str | None = None  # None: the reference's


VARIANTS = (
    Variant("full", "full"),
    Variant("full, headroom 2", "full", Method(headroom=2)),
    Variant("full, gptq", "full", Method(rounding="gptq")),
    Variant("full, gptq, headroom 2", "full", Method(rounding="gptq", headroom=2)),
    Variant("full, fold, gptq, headroom 2", "full", Method(True, "gptq", 2)),
    Variant("fp8-row", "fp8-row"),
    Variant("fp8-row, gptq", "fp8-row", Method(rounding="gptq")),
    Variant("int8-rot", "int8-rot"),
    Variant("int8-rot, gptq", "int8-rot", Method(rounding="gptq")),
    Variant("bf16_base", dtype="bfloat16"),
)
BASELINE = VARIANTS[0].name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--variants", nargs="*", default=[v.name for v in VARIANTS])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    prompts = read_prompts(given.prompts)[: given.limit]
    report: dict[str, object] = {
        "command": shlex.join(["python", "benchmarks/quality_nano.py", *sys.argv[1:]]),
        "prompts_file": given.prompts.name,
        "prompts": len(prompts),
        "seeds_from": FIRST_SEED,
        "size": f"{SIZE}x{SIZE}",
        "steps": STEPS,
        "baseline": BASELINE,
        "versions": versions(),
        "machine": machine(),
        **gpu_facts(),
        "commit": commit(),
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted = [variant for variant in VARIANTS if variant.name in given.variants]
        made = {v.name: make(v, Path(folder), given.device) for v in wanted}
        for dtype in given.dtypes:
            report[dtype] = measure(wanted, made, prompts, dtype, given.device, report, given.out)
    write(report, given.out)
    return 0


def make(variant: Variant, folder: Path, device: str | None) -> str:
    """The model to load: nano, or a checkpoint made of it. One calibration serves all."""
    if variant.policy is None:
        return "nano"
    file = folder / "calibration.json"
    needs = variant.policy != "fp8-row" or variant.method != Method()
    fresh = None if file.exists() else device
    options = CalibrationOptions(file=file, device=fresh) if needs else CalibrationOptions()
    out = folder / variant.name.replace(", ", "-").replace(" ", "")
    quantize("nano", [variant.policy], out, calibration=options, method=variant.method)
    return str(out)


def measure(
    variants: Sequence[Variant],
    made: dict[str, str],
    prompts: Sequence[str],
    dtype: str,
    device: str | None,
    report: dict[str, object],
    out: Path,
) -> dict[str, object]:
    """Every variant against the unquantized model of the same dtype; written as it grows."""
    base = load_pipeline("nano", dtype=dtype, device=device)
    requests = requests_of(prompts)
    exact = draw(base, requests)
    found: dict[str, dict[str, object]] = {}
    report[dtype] = found
    for variant in variants:
        start = time.perf_counter()
        of = variant.dtype or dtype
        if variant.policy is None and of == dtype:
            continue  # the reference itself
        pipeline = load_pipeline(made[variant.name], dtype=of, device=device, share=base)
        values = psnr_db(draw(pipeline, requests), exact)
        found[variant.name] = {"method": asdict(variant.method), **summary(values)}
        if (plain := found.get(BASELINE)) is not None:
            found[variant.name]["above_baseline"] = paired(values, np.array(plain["psnr_db"]))
        write(report, out)
        mean, seconds = values.mean(), time.perf_counter() - start
        print(f"{dtype:9} {variant.name:32} {mean:6.2f} dB  ({seconds:.0f} s)", flush=True)
    return dict(found)


def requests_of(prompts: Sequence[str]) -> list[ImageRequest]:
    return [
        ImageRequest(prompt, SIZE, SIZE, steps=STEPS, seed=FIRST_SEED + index)
        for index, prompt in enumerate(prompts)
    ]


def draw(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> np.ndarray:
    """uint8 [prompts, height, width, 3]. Those of one shape are drawn several at a time."""
    shapes: dict[Hashable, list[int]] = {}
    for index, request in enumerate(requests):
        shapes.setdefault(pipeline.shape(request), []).append(index)
    pictures: dict[int, np.ndarray] = {}
    for alike in shapes.values():
        for start in range(0, len(alike), BATCH):
            chosen = alike[start : start + BATCH]
            drawings = [pipeline.begin(requests[index]) for index in chosen]
            while not drawings[0].is_done:
                pipeline.step(drawings)
            finished = (pipeline.finish(drawing).pixels for drawing in drawings)
            pictures.update(zip(chosen, finished, strict=True))
    return np.stack([pictures[index] for index in range(len(requests))])


def psnr_db(pictures: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[prompts]; equal pictures count as if one level of one pixel differed."""
    mse = ((pictures.astype(np.float64) - exact) ** 2).mean((1, 2, 3))
    return 10 * np.log10(WHITE**2 / np.maximum(mse, 1 / exact[0].size))


def summary(values: np.ndarray) -> dict[str, object]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p10": float(np.percentile(values, 10)),
        "mean_ci95": interval(values),
        "psnr_db": [round(float(value), 3) for value in values],
    }


def paired(values: np.ndarray, baseline: np.ndarray) -> dict[str, object]:
    difference = values - baseline
    return {"mean": float(difference.mean()), "mean_ci95": interval(difference)}


def interval(values: np.ndarray) -> list[float | None]:
    found = mean_interval(values.tolist())
    return [found.low, found.high]


def write(report: dict[str, object], out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out)


if __name__ == "__main__":
    sys.exit(main())
