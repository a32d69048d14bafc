"""Every way to 8 bits on nano with outliers planted: paired PSNR against the same weights.

    python benchmarks/outliers.py --prompts 200

Channels or tokens are made loud without changing what the model computes: the latents of the first
prompts are compared bit for bit before anything is measured. Pictures are drawn in FP32 but for the
quantized layers: BF16's own rounding would hide INT8's error. The prompts are scenes that nano was
not trained on, a third of them long.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import paired
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.evaluate import (
    Workload,
    draw,
    exchanged,
    fitting_modules,
    load_requests,
    quantized_modules,
)
from zimage_fp8.model.calibration import CalibrationSettings, run_calibration
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.outliers import (
    CHANNELS,
    RATIOS,
    channel_factors,
    loud_tokens,
    multiplied,
    plant_outliers,
    power_of_two,
    write_folded,
)
from zimage_fp8.quant import fold
from zimage_fp8.quant.calibrate import FOLDED_HEADROOM, Calibration
from zimage_fp8.quant.policy import ALWAYS_KEPT, INT8_ROW, PRESETS, Policy, Rule, find_policy

RESULT = paired.HERE / "results" / "nano-outliers.json"
PROVEN_ON = 1  # pictures whose latents are compared bit for bit at every ratio

SHOWN = ("full", "fp8-row", "online_int8-rot", "int8-rot")  # in the strip of pictures
STRIP_RATIO, STRIP_PROMPT, GAP = 1e3, 2, 6

BLOCKS = "*.attention.*", "*.feed_forward.*"
ON_TOKENS = ("full", "full-folded", "fp8-row", "int8-rot")


@dataclass(frozen=True)
class Form:
    """A policy; `is_folded`: on weights whose channel scales were folded first (`quant.fold`)."""

    policy: Policy
    is_folded: bool = False


def forms() -> dict[str, Form]:
    """By name: what the story is about, from the plain to the last, then the other presets. INT8
    without rotation is no preset."""
    rules = (Rule(pattern, INT8_ROW, "INT8 without rotation") for pattern in BLOCKS)
    rest = Rule("*", None, "not in a block")
    plain = Policy("int8-row", "INT8 without rotation.", (*ALWAYS_KEPT, *rules, rest))
    full = find_policy("full")
    found = {
        "full": Form(full),
        "full[!context_refiner]": Form(find_policy("full[!context_refiner]")),
        "fp8-row": Form(find_policy("fp8-row")),
        "int8-row": Form(plain),
        "online_int8-rot": Form(find_policy("online_int8-rot")),
        "full-folded": Form(full, is_folded=True),
        "int8-row-folded": Form(plain, is_folded=True),
        "int8-rot": Form(find_policy("int8-rot")),
    }
    others = (name for name in PRESETS if name not in (*found, "bf16_base"))
    return found | {name: Form(find_policy(name)) for name in others}


def main() -> int:
    parser = paired.parser(__doc__, 200, RESULT)
    parser.add_argument("--few", type=int, default=8, help="prompts of all but what is promised")
    parser.add_argument(
        "--only", nargs="+", choices=forms(), metavar="FORM", help="these forms, on channels alone"
    )
    parser.add_argument("--strip", type=Path, help="only draw one prompt in some formats, as PNG")
    given = parser.parse_args()

    source = find_model("nano")
    if given.strip:
        draw_strip(source, given.strip)
        return 0
    found = paired.begin(
        given.out,
        reference_latents_equal=PROVEN_ON,
        compiled=given.compile,
        ratios={},
        tokens={},
    )
    pipeline = load_pipeline("nano", dtype="float32")
    calibration = calibrate(pipeline, source)
    chosen = {name: form for name, form in forms().items() if name in (given.only or forms())}
    variants = on_channels(source, pipeline, calibration, found["ratios"], given.few, chosen)
    if not given.only:
        variants |= on_tokens(source, pipeline, calibration, found["tokens"], given.few)
    if given.compile:
        paired.compile_blocks()
    paired.measure(variants, pipeline, given.prompts, found, lambda: paired.write(found, given.out))
    return 0


def on_channels(
    source: Path,
    pipeline: Pipeline,
    calibration: Calibration,
    cells: dict[str, paired.Cells],
    few: int,
    chosen: Mapping[str, Form],
) -> paired.Variants:
    """The chosen forms at every ratio, on the model with that ratio planted."""
    found = {}
    for ratio, folder in planted(source, RATIOS):
        loud = load_pipeline(str(folder), dtype="float32", share=pipeline)
        prove(pipeline, loud)
        factors = channel_factors(pipeline.transformer.config, ratio, CHANNELS, 0)
        known = multiplied(calibration, factors)  # powers of two: nothing to measure anew
        of_ratio = cells.setdefault(f"{ratio:g}", {})
        for name, form in chosen.items():
            layers = layers_of(form, folder, loud, known)
            limit = None if is_promised(ratio, name) else few
            found["channels", ratio, name] = (
                of_ratio,
                name,
                paired.Variant(loud, layers, limit=limit),
            )
    return found


def on_tokens(
    source: Path,
    pipeline: Pipeline,
    calibration: Calibration,
    cells: dict[str, paired.Cells],
    few: int,
) -> paired.Variants:
    """The forms that differ there, with loud tokens around every layer of nano as it is."""
    found, modules = {}, list(calibration.channel_amax)
    for ratio in RATIOS[2:]:
        around = louder(ratio, modules)
        with around(pipeline.transformer):
            known = calibrate(pipeline, source)
        prove(pipeline, pipeline, around)
        of_ratio = cells.setdefault(f"{power_of_two(ratio):g}", {})
        for name in ON_TOKENS:
            layers = layers_of(forms()[name], source, pipeline, known)
            variant = paired.Variant(pipeline, layers, around, limit=few)
            found["tokens", ratio, name] = (of_ratio, name, variant)
    return found


def is_promised(ratio: float, name: str) -> bool:
    """What outliers must not hurt, and what it is compared with."""
    return name in ("full-folded", "int8-rot") or (ratio == 1 and name in ("full", "fp8-row"))


Around = Callable[[nn.Module], AbstractContextManager[object]]


def louder(ratio: float, modules: Sequence[str]) -> Around:
    return lambda transformer: loud_tokens(transformer, modules, ratio)


def prove(
    pipeline: Pipeline,
    loud: Pipeline,
    around: Around = lambda _: nullcontext(),
) -> None:
    """End the program unless both draw the same latents, bit for bit."""
    for request in paired.all_requests()[:PROVEN_ON]:
        expected = draw(pipeline, request).latent
        with around(loud.transformer):
            if not torch.equal(draw(loud, request).latent, expected):
                sys.exit(f"{request.prompt!r}: outliers have changed the latent")


def layers_of(
    form: Form, folder: Path, pipeline: Pipeline, calibration: Calibration
) -> Mapping[str, nn.Module]:
    load = folded_modules if form.is_folded else quantized_modules
    return load(folder, form.policy, pipeline, calibration)


def draw_strip(source: Path, file: Path) -> None:
    """One prompt without quantization and in every format of SHOWN, outliers planted."""
    request = load_requests(source, Workload(paired.PROMPTS, STRIP_PROMPT + 1))[STRIP_PROMPT]
    for _, folder in planted(source, [STRIP_RATIO]):
        pipeline = load_pipeline(str(folder), dtype="float32")
        calibration = calibrate(pipeline, folder)
        drawn = [draw(pipeline, request).pixels]
        for name in SHOWN:
            with exchanged(
                pipeline.transformer, layers_of(forms()[name], folder, pipeline, calibration)
            ):
                drawn.append(draw(pipeline, request).pixels)
    gap = np.full((drawn[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for pixels in drawn for part in (pixels, gap)][:-1]
    picture = Image.fromarray(np.concatenate(row, axis=1))
    picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(file, optimize=True)
    print(f"{file}: BF16, {', '.join(SHOWN)}: {request.prompt}")


def planted(source: Path, ratios: Sequence[float]) -> Iterator[tuple[float, Path]]:
    for ratio in ratios:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "nano"
            yield plant_outliers(source, folder, ratio), folder


def folded_modules(
    folder: Path, policy: Policy, pipeline: Pipeline, calibration: Calibration
) -> dict[str, nn.Module]:
    """The layers of `policy` on the folded model, fit for the model as it was."""
    names = list(calibration.channel_amax)
    with tempfile.TemporaryDirectory() as scratch, ShardReader(folder / "transformer") as reader:
        factors = fold.channel_factors(names, reader.read, calibration.channel_amax)
        balanced = Path(scratch) / "folded"
        write_folded(folder, balanced, factors)
        loaded = load_transformer(
            balanced / "transformer",
            policy=policy,
            calibration=widened(multiplied(calibration, factors)),
            dtype=pipeline.dtype,
            device=pipeline.device,
        )
    return fitting_modules(loaded.model, factors)


def widened(calibration: Calibration) -> Calibration:
    """With the headroom that static scales have where channels were folded."""
    amax = {n: tuple(FOLDED_HEADROOM * v for v in it) for n, it in calibration.amax.items()}
    return replace(calibration, amax=amax)


def calibrate(pipeline: Pipeline, folder: Path) -> Calibration:
    settings = CalibrationSettings.default(folder, pipeline.default_size)
    return run_calibration(pipeline, folder, settings)


if __name__ == "__main__":
    sys.exit(main())
