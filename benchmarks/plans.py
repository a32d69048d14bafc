"""Do the search's plans keep their promise on prompts it has not seen? Paired with `int8-rot`.

    python benchmarks/plans.py --compile --prompts 48

Every plan that the search of results/nano-search.json drew, and that is heavier than `int8-rot`
alone, draws the first of the 200 prompts; the search chose by others.
"""

import json
import sys
import tempfile
from pathlib import Path

import outliers
import paired
from zimage_fp8.evaluate import quantized_modules
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.quant.policy import Policy, find_policy
from zimage_fp8.search.policy_file import policy_toml
from zimage_fp8.search.stretches import Stretch

RESULT = paired.HERE / "results" / "nano-plans.json"
SEARCH = paired.HERE / "results" / "nano-search.json"
BASELINE = "int8-rot"


def main() -> int:
    given = paired.parser(__doc__, 48, RESULT).parse_args()
    found = paired.begin(given.out, compiled=given.compile, plans={})
    source, pipeline = find_model("nano"), load_pipeline("nano", dtype="float32")
    calibration = outliers.calibrate(pipeline, source)
    variants = {}
    for name, policy in plans(json.loads(SEARCH.read_text())).items():
        layers = quantized_modules(source, policy, pipeline, calibration)
        variants[(name,)] = (found["plans"], name, paired.Variant(pipeline, layers))
    if given.compile:
        paired.compile_blocks()
    paired.measure(variants, pipeline, given.prompts, found, lambda: paired.write(found, given.out))
    return 0


def plans(searched: dict) -> dict[str, Policy]:
    """`int8-rot`, and by their bytes the plans that were drawn."""
    parts = [
        Stretch(part["name"], tuple(part["blocks"]), part["name"].split()[-1])
        for part in searched["parts"]
    ]
    found = {BASELINE: find_policy(BASELINE)}
    for tried in sorted(searched["verified"], key=lambda it: it["point"]["cost"]):
        specs = tried["point"]["specs"]
        if "keep" not in specs:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "plan.toml"
            file.write_text(policy_toml("plan", "Drawn by the search.", parts, specs))
            found[f"{tried['point']['cost']:.0f}"] = find_policy(str(file))
    return found


if __name__ == "__main__":
    sys.exit(main())
