"""Every way to 8 bits on nano with channel outliers planted: paired PSNR against the same weights.

    python benchmarks/outliers.py --prompts 200

Pictures are drawn in FP32 but for the quantized layers: BF16's own rounding would hide INT8's
error. The reference of every ratio is one and the same, because planting changes no bit of any
latent; that is checked first. Results are written after every variant and extended by a later run
with more prompts. The 200 prompts are scenes that nano was not trained on, a third of them long.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.evaluate import (
    Difference,
    Drawn,
    Workload,
    difference,
    draw,
    exchanged,
    fitting_modules,
    load_requests,
    quantized_modules,
    summarize,
)
from zimage_fp8.model.calibration import CalibrationSettings, run_calibration
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.outliers import RATIOS, plant_outliers, write_folded
from zimage_fp8.provenance import commit, machine, versions
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.fold import channel_factors
from zimage_fp8.quant.policy import ALWAYS_KEPT, INT8_ROW, Policy, Rule, find_policy

HERE = Path(__file__).parent
RESULT = HERE / "results" / "nano-outliers.json"
PROMPTS = HERE / "nano-prompts.txt"
PROVEN_ON = 2  # latents compared bit for bit at every ratio

SHOWN = ("full", "fp8-row", "online_int8-rot", "int8-rot")  # in the strip of pictures
STRIP_RATIO, STRIP_PROMPT, GAP = 1e3, 2, 6

BLOCKS = "*.attention.*", "*.feed_forward.*"


@dataclass(frozen=True)
class Variant:
    """A policy; `is_folded`: on weights whose channel scales were folded first (`quant.fold`)."""

    policy: Policy
    is_folded: bool = False


def variants() -> dict[str, Variant]:
    """By name, from the plain to the last; INT8 without rotation is no preset."""
    rules = (Rule(pattern, INT8_ROW, "INT8 without rotation") for pattern in BLOCKS)
    rest = Rule("*", None, "not in a block")
    plain = Policy("int8-row", "INT8 without rotation.", (*ALWAYS_KEPT, *rules, rest))
    full = find_policy("full")
    return {
        "full": Variant(full),
        "full[!context_refiner]": Variant(find_policy("full[!context_refiner]")),
        "fp8-row": Variant(find_policy("fp8-row")),
        "int8-row": Variant(plain),
        "online_int8-rot": Variant(find_policy("online_int8-rot")),
        "full-folded": Variant(full, is_folded=True),
        "int8-row-folded": Variant(plain, is_folded=True),
        "int8-rot": Variant(find_policy("int8-rot")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--variants", nargs="*", default=list(variants()))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--strip", type=Path, help="only draw one prompt in some formats, as PNG")
    given = parser.parse_args()

    source = find_model("nano")
    if given.strip:
        draw_strip(source, given.strip)
        return 0
    requests = load_requests(source, Workload(PROMPTS, given.prompts))
    reference_pipeline = load_pipeline("nano", dtype="float32")
    references: list[Drawn] = []

    def reference(index: int) -> Drawn:
        while len(references) <= index:
            references.append(draw(reference_pipeline, requests[len(references)]))
        return references[index]

    found = read(given.out)
    for ratio, folder in planted(source, given.ratios):
        cells = found["ratios"].setdefault(f"{ratio:g}", {})
        pipeline = load_pipeline(str(folder), dtype="float32")
        for index in range(min(PROVEN_ON, len(requests))):
            latent = draw(pipeline, requests[index]).latent
            assert torch.equal(latent, reference(index).latent), f"ratio {ratio}: another latent"
        calibration = calibrate(pipeline, folder)
        for name in given.variants:
            known = [Difference(**it) for it in cells.get(name, {}).get("pictures", [])]
            if len(known) >= len(requests):
                continue
            layers = layers_of(variants()[name], folder, pipeline, calibration)
            with exchanged(pipeline.transformer, layers):
                for index in range(len(known), len(requests)):
                    drawn = draw(pipeline, requests[index])
                    known.append(difference(drawn, reference(index)))
                    cells[name] = as_json(known)
                    write(found, given.out)
            quality = summarize(known)
            print(f"{ratio:>8g} {name:<10} {quality.mean:6.2f} ± {quality.ci95:.2f} dB", flush=True)
    return 0


def layers_of(
    variant: Variant, folder: Path, pipeline: Pipeline, calibration: Calibration
) -> dict[str, nn.Module]:
    load = folded_modules if variant.is_folded else quantized_modules
    return load(folder, variant.policy, pipeline, calibration)


def draw_strip(source: Path, file: Path) -> None:
    """One prompt without quantization and in every format of SHOWN, outliers planted."""
    request = load_requests(source, Workload(PROMPTS, STRIP_PROMPT + 1))[STRIP_PROMPT]
    for _, folder in planted(source, [STRIP_RATIO]):
        pipeline = load_pipeline(str(folder), dtype="float32")
        calibration = calibrate(pipeline, folder)
        drawn = [draw(pipeline, request).pixels]
        for name in SHOWN:
            with exchanged(
                pipeline.transformer, layers_of(variants()[name], folder, pipeline, calibration)
            ):
                drawn.append(draw(pipeline, request).pixels)
    gap = np.full((drawn[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for pixels in drawn for part in (pixels, gap)][:-1]
    picture = Image.fromarray(np.concatenate(row, axis=1))
    picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(file, optimize=True)
    print(f"{file}: BF16, {', '.join(SHOWN)}: {request.prompt}")


def planted(source: Path, ratios: list[float]) -> Iterator[tuple[float, Path]]:
    for ratio in ratios:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "nano"
            yield plant_outliers(source, folder, ratio), folder


def folded_modules(
    folder: Path, policy: Policy, pipeline: Pipeline, calibration: Calibration
) -> dict[str, nn.Module]:
    """The layers of `policy` on the folded model, calibrated anew, fit for the model as it was."""
    names = list(calibration.channel_amax)
    with tempfile.TemporaryDirectory() as scratch, ShardReader(folder / "transformer") as reader:
        factors = channel_factors(names, reader.read, calibration.channel_amax)
        balanced = Path(scratch) / "folded"
        write_folded(folder, balanced, factors)
        again = calibrate(load_pipeline(str(balanced), dtype="float32"), balanced)
        loaded = load_transformer(
            balanced / "transformer",
            policy=policy,
            calibration=again,
            dtype=pipeline.dtype,
            device=pipeline.device,
        )
    return fitting_modules(loaded.model, factors)


def calibrate(pipeline: Pipeline, folder: Path) -> Calibration:
    settings = CalibrationSettings.default(folder, pipeline.default_size)
    return run_calibration(pipeline, folder, settings)


def as_json(known: list[Difference]) -> dict[str, object]:
    summary = {
        k: None if math.isnan(v) else round(v, 4) for k, v in asdict(summarize(known)).items()
    }
    return {"summary": summary, "pictures": [asdict(it) for it in known]}


def read(file: Path) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if file.exists():
        found = json.loads(file.read_text())
        if found["device"] != device:
            sys.exit(f"{file} was measured on {found['device']}, this is {device}: remove it first")
        return found
    return {
        "schema": 1,
        "model": "nano",
        "size": "256x256",
        "steps": 8,
        "dtype": "float32",
        "device": device,
        "prompts": PROMPTS.name,
        "reference_latents_equal": PROVEN_ON,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": "python benchmarks/outliers.py",
        "ratios": {},
    }


def write(found: dict, file: Path) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(main())
