"""Everything that a GPU has to measure, what matters most first, within a budget of minutes.

    python benchmarks/campaign.py OUT --work DIR --minutes 28
    python benchmarks/campaign.py OUT --work DIR --only model "full-size gpu"
    python benchmarks/campaign.py OUT --work DIR --minutes 10 --scale tiny    a dry run, anywhere

Each step is a script of this folder in a process of its own. Scripts write their results after
every row, so a step that is stopped at its limit, or when the time is up, keeps what it has; one
that fails costs nothing but itself. OUT gets the results, each step's log, and campaign.json, which
says what ran and for how long; DIR needs room for the models: 28 GB at full size. What is kept in
benchmarks/results/ is copied there by hand, after a look.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
LEAST_S = 20  # less is not worth a start
TO_END_S = 30  # for a stopped script to end its server


@dataclass(frozen=True)
class Step:
    """A command and the minutes it may take at most."""

    name: str
    minutes: float
    command: list[str]
    record: Path | None = None  # what it leaves elsewhere; copied to OUT as NAME.json


@dataclass(frozen=True)
class Outcome:
    name: str
    command: list[str]
    seconds: float
    outcome: str  # done, failed, stopped, not started


def steps(out: Path, work: Path, scale: str) -> list[Step]:
    """In the order of what is missing; the models first, which others need."""
    model, static = work / "z-image-random", work / "full-random"
    is_full = scale == "full"
    scaled = ["--scale", scale]
    sizes = [] if is_full else ["--sizes", "64x32", "64x64", "48x48", "--count", "2"]
    seconds = ["--seconds", "8" if is_full else "0"]
    few_seconds = ["--seconds", "4" if is_full else "0"]

    def script(name: str, minutes: float, file: str, *words: object) -> Step:
        return Step(name, minutes, [sys.executable, str(HERE / file), *map(str, words)])

    def bench(name: str, minutes: float, *words: str) -> Step:
        out = work / name.replace(" ", "-")
        command = [sys.executable, "-m", "zimage_fp8", "bench", *words, "--out", str(out)]
        return Step(name, minutes, command, out / "record.json")

    quantize = [sys.executable, "-m", "zimage_fp8", "quantize", str(model), "--policy", "full"]
    quantize += ["--size", "256x256" if is_full else "64x64", "--out", str(static)]
    variants = [f"full={static}", f"online_fp8={model},--policy,online_fp8", f"bf16_base={model}"]
    if is_full:  # both are the fused engine's
        variants[1:1] = [
            f"full-te8={static},--text-encoder,fp8",
            f"full-offload={static},--offload,text-encoder",
            f"full-again={static}",  # a start with every kernel compiled
            f"full-fa3-fp8={static},--attention-backend,fa3-fp8",
        ]
    ladder, loops, profile = (
        out / f"{name}.json" for name in ("engine-ladder", "engine", "engine-profile")
    )
    attentions = ("fa3", "fa3-fp8") if is_full else ("sdpa", "math")
    quality = ["--limit", "8"] if not is_full else []
    few = ["--prompts", "8", "--few", "4"] if not is_full else []
    eager, compiled = out / "baselines.json", out / "baselines-compiled.json"
    return [
        script("model", 5, "fake_model.py", model, *scaled),
        bench(
            *("full-size gpu", 9, str(model)),
            *("--profile", str(HERE / "full-size-speed.toml") if is_full else "quick"),
            *(() if is_full else ("--size", "64x64", "--runs", "2", "--warmup", "1")),
            *("--policies", "bf16_base", "--policies", "online_fp8", "--policies", "full"),
            *("--no-quality", "random weights"),
        ),
        Step("checkpoint", 4, quantize),
        script("requests", 7, "request.py", *variants, *sizes, "--out", out / "gpu-request.json"),
        script("loops", 5, "engine.py", *scaled, *seconds, "--out", loops),
        script("ladder", 5, "engine.py", *scaled, *few_seconds, "--ladder", ladder),
        script(
            *("diffusers", 4, "baselines.py", model, *scaled, *few_seconds),
            *("--modes", "eager", "--out", eager),
        ),
        script(
            *("diffusers, compiled", 5, "baselines.py", model, *scaled, *few_seconds),
            *("--modes", "compiled", "--out", compiled),
        ),
        script(
            *("batching", 4, "batching.py", "--model", model, "--policies", "online_fp8"),
            *("--sizes", *(("256x256", "512x512", "1024x512") if is_full else ("64x32",))),
            *("--batches", 1, 2, 4, "--runs", 10, "--out", out / "batching-gpu.json"),
        ),
        bench(
            *("nano-standard gpu", 9, "nano", "--profile", "nano-standard" if is_full else "nano"),
            *("--policies", "all", "--policies", "fp8-row", "--policies", "int8-rot"),
        ),
        script(
            *("nano quality", 4, "quality_nano.py", *quality, "--dtypes", "bfloat16"),
            *("--variants", "full", "full, gptq, headroom 2", "fp8-row", "int8-rot"),
            *("int8-rot, gptq", "--out", out / "nano-quality-gpu.json"),
        ),
        script("nano devices", 4, "devices.py", "--out", out / "nano-devices.json"),
        script("nano outliers", 8, "outliers.py", *few, "--out", out / "nano-outliers.json"),
        script(
            *("attention", 3, "engine.py", *scaled, *seconds, "--policies", "full", "online_fp8"),
            *("--attention", *attentions, "--out", out / "engine-attention.json"),
        ),
        script(
            *("nano attention", 3, "attention_bits.py", "--run", *attentions),
            *(() if is_full else ("--limit", "2")),
            *("--out", out / "nano-attention-gpu.json"),
        ),
        script("profile", 3, "engine.py", *scaled, "--profile", profile, "--policies", "full"),
        script(
            *("kernels", 4, "kernels.py", *scaled, "--out", out / "kernels.json"),
            *(() if is_full else ("--kinds", "bf16")),
        ),
    ]


def run_all(todo: list[Step], out: Path, seconds: float) -> list[Outcome]:
    """Run the steps one after the other until the time is up; campaign.json grows with them."""
    end = time.monotonic() + seconds
    done: list[Outcome] = []
    for step in todo:
        limit = min(60 * step.minutes, end - time.monotonic())
        started = time.monotonic()
        outcome = run(step, out, limit) if limit >= LEAST_S else "not started"
        if step.record is not None and step.record.exists():
            shutil.copy(step.record, out / f"{_file_name(step)}.json")
        done.append(Outcome(step.name, step.command, time.monotonic() - started, outcome))
        print(f"{step.name:20} {done[-1].seconds:6.0f} s  {outcome}", flush=True)
        (out / "campaign.json").write_text(json.dumps([*map(asdict, done)], indent=1) + "\n")
    return done


def run(step: Step, out: Path, limit_s: float) -> str:
    """Run a step, its output in a log. At the limit it is interrupted, as by Ctrl-C."""
    with (out / f"{_file_name(step)}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "failed" if process.wait(limit_s) else "done"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(TO_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "stopped"


def _file_name(step: Step) -> str:
    return step.name.replace(", ", "-").replace(" ", "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, by name")
    arguments = parser.parse_args()
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    todo = steps(arguments.out, arguments.work, arguments.scale)
    if arguments.only is not None:
        known = {step.name: step for step in todo}
        if unknown := set(arguments.only) - set(known):
            parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(known)}")
        todo = [known[name] for name in arguments.only]
    done = run_all(todo, arguments.out, 60 * arguments.minutes)
    return int(any(outcome.outcome != "done" for outcome in done))


if __name__ == "__main__":
    raise SystemExit(main())
