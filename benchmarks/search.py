"""The search on nano: a mix that draws a given number of decibels closer than `int8-rot` alone.

    python benchmarks/search.py --work FOLDER

FOLDER keeps what was measured, so an interrupted run goes on. What is found is drawn once more with
prompts that the search has not seen, and so is `int8-rot`: the gain there is the one to quote.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import paired
from zimage_fp8.bench.workload import FIRST_SEED
from zimage_fp8.evaluate import (
    Quality,
    Subject,
    Workload,
    difference,
    draw,
    exchanged,
    load_requests,
    load_subject,
    summarize,
)
from zimage_fp8.model.calibration import read_prompts
from zimage_fp8.model.pipeline import ImageRequest
from zimage_fp8.model.source import find_model
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.search import Goal, search

RESULT = paired.HERE / "results" / "nano-search.json"
SEEN = paired.HERE / "nano-prompts-development.txt"
BASELINE = "int8-rot"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gain", type=float, default=3.0, help="decibels above int8-rot")
    parser.add_argument("--seen", type=int, default=12, help="prompts to choose by")
    parser.add_argument("--unseen", type=int, default=24, help="prompts to verify with")
    parser.add_argument("--compile", action="store_true", help="compile blocks: half the time")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.compile:
        paired.compile_blocks()
    given.work.mkdir(exist_ok=True)
    folder = find_model("nano")
    seen = first(SEEN, given.seen, given.work / "seen.txt")
    unseen = first(paired.PROMPTS, given.unseen, given.work / "unseen.txt")
    requests = load_requests(folder, Workload(seen))
    others = load_requests(folder, Workload(unseen, first_seed=FIRST_SEED + len(requests)))
    subject = load_subject("nano", folder, find_policy(BASELINE), requests)
    alone = quality(subject, requests)
    print(f"{BASELINE}: {alone.mean:.2f} dB", flush=True)
    goal = Goal(round(alone.mean + given.gain, 1))
    policy = given.work / "nano-auto.toml"
    policy.unlink(missing_ok=True)
    found = search(
        "nano",
        goal,
        policy,
        workload=Workload(seen),
        held_out=unseen,
        on_progress=lambda *at: print(*at, flush=True),
    )
    evidence = json.loads(found.evidence_file.read_text())
    evidence["baseline"] = {
        "policy": BASELINE,
        "seen": asdict(alone),
        "held_out": asdict(quality(subject, others)),
    }
    evidence["compiled"] = given.compile
    evidence["command"] = (
        f"python benchmarks/search.py --work FOLDER --gain {given.gain:g} --seen {given.seen} "
        f"--unseen {given.unseen}" + (" --compile" if given.compile else "")
    )
    evidence["policy"] = policy.read_text()
    paired.write(evidence, given.out)
    return 0


def first(source: Path, count: int, target: Path) -> Path:
    target.write_text("\n".join(read_prompts(source)[:count]) + "\n")
    return target


def quality(subject: Subject, requests: list[ImageRequest]) -> Quality:
    """Of the whole policy."""
    differences = []
    for request in requests:
        reference = draw(subject.pipeline, request)
        with exchanged(subject.pipeline.transformer, subject.quantized):
            differences.append(difference(draw(subject.pipeline, request), reference))
    return summarize(differences)


if __name__ == "__main__":
    sys.exit(main())
