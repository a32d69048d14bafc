"""`python -m recipes.nano STEP`: fetch, tokenizer, vae, train, evaluate, export, or all of them."""

import argparse
import shlex
import sys
from pathlib import Path

STEPS = ("fetch", "tokenizer", "vae", "train", "evaluate", "export")
HERE = Path(__file__).parent


def main() -> None:
    options = parse()
    # Imported here: options must answer at once, and worker processes import this module too.
    import torch

    from recipes.nano.shape import NANO, TINY
    from recipes.nano.team import Team
    from recipes.nano.workspace import Workspace

    team = Team()
    work = Workspace(
        options.work, options.data or options.work / "data", options.export_dir, team.rank > 0
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        options.dtype or ("bf16" if team.device.type == "cuda" else "fp32")
    ]
    shape = TINY if options.tiny else NANO
    for step in STEPS if options.step == "all" else (options.step,):
        run(step, options, work, shape, team, dtype)
    team.leave()


def run(step, options, work, shape, team, dtype) -> None:
    work.begin_stage()
    work.log(f"--- {step}")
    if step == "fetch":
        from recipes.nano.fetch import fetch

        fetch(work)
    elif step == "tokenizer":
        from recipes.nano.tokenizer import train_tokenizer

        train_tokenizer(work)
    elif step == "vae":
        from recipes.nano.autoencoder import train_autoencoder

        seconds = options.seconds or options.vae_seconds
        train_autoencoder(work, shape, team, seconds, dtype=dtype, compiled=options.compile)
    elif step == "train":
        from recipes.nano.training import train_denoiser

        seconds = options.seconds or options.train_seconds
        total = options.total_seconds or seconds
        train_denoiser(
            work, shape, team, seconds, total, dtype=dtype, compiled=options.compile,
            start_from=options.start_from,
        )  # fmt: skip
    elif step == "evaluate":
        from recipes.nano.evaluate import evaluate

        command = shlex.join(["python", "-m", "recipes.nano", *sys.argv[1:]])
        weights = options.weights or work.weights
        evaluate(work, shape, weights, team.device, dtype, command=command)
    elif step == "export":
        from recipes.nano.export import export

        export(work, shape, options.weights or work.weights, options.model or work.model)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--work", type=Path, default=HERE / "work", help="everything written")
    parser.add_argument("--data", type=Path, help="prepared pictures and tokenizer [WORK/data]")
    parser.add_argument("--export-dir", type=Path, help="also copy a stage's results here")
    parser.add_argument("--weights", type=Path, help="BF16 pieces to read [WORK/weights]")
    parser.add_argument("--model", type=Path, help="the diffusers folder to write [WORK/model]")
    parser.add_argument("--start-from", type=Path, help="BF16 pieces to go on from, if no state")
    parser.add_argument("--seconds", type=float, help="wall time of this run of vae or train")
    parser.add_argument("--total-seconds", type=float, help="of the whole training [SECONDS]")
    parser.add_argument("--vae-seconds", type=float, default=300, help="used by `all`")
    parser.add_argument("--train-seconds", type=float, default=1000, help="used by `all`")
    parser.add_argument("--tiny", action="store_true", help="a smoke test: minutes on a CPU")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
