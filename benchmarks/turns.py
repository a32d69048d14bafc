"""Which matrix products a running loop wants: what was fast alone is exchanged there, in turns.

    python benchmarks/turns.py --kernels kernels.json --out turns.json [--choices gemm.json]
    python benchmarks/turns.py --scale tiny --kernels kernels.json --out turns.json    a dry run

A product timed alone (`kernels.py`) finds another clock and another cache than in a denoise loop:
which of two is faster by some percent the loop has to say. For every format one policy's loop is
captured as the engine's table has it, and once more for every rival of one of its products: what
`kernels.py` timed within `--within` of the best. All run in turns, forth and back, on random
weights. A rival is taken that was faster in every turn and by `LEAST_GAIN`; those that were taken
have to be faster together again. `--choices` writes them into the table.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from engine import CAPTION_TOKENS, SIZES, RandomModel, Size, engine_loop, engine_of
from gpu import DEVICE, RANDOM_WEIGHTS, envelope, sustained, write_rows
from kernels import as_walked
from zimage_fp8.engine import gemm
from zimage_fp8.engine.gemm import CUBLAS_TILE, GATED, HEADS, SEPARATE, Choice
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.model.z_image import ZImageTransformer

# The policy whose loop speaks for a format: `online_fp8` runs the products of `fp8-row`.
POLICY_OF_KIND = {
    "bf16": "bf16_base",
    "e4m3-scalar": "full",
    "e4m3-vector": "fp8-row",
    "int8-vector": "int8-rot",
}
LEAST_GAIN = 0.002
Shape = tuple[str, int, int, int]  # kind, rows, columns, depth
Loop = Callable[[], Tensor]


def shape_of(choice: Choice) -> Shape:
    return choice.kind, choice.rows, choice.columns, choice.depth


def winners(kind: str, rows: int) -> list[Choice]:
    """What the table has for the shapes that a loop runs: a product alone is none of them where a
    kernel with its gate or its heads won."""
    first: dict[Shape, Choice] = {}
    for choice in gemm.measured():
        base = choice.kind.removesuffix(GATED).removesuffix(HEADS)
        if (base, choice.rows) == (kind, rows) and choice.gpu == torch.cuda.get_device_name():
            first.setdefault(shape_of(choice), choice)
    joined = {
        (choice.columns, choice.depth)
        for shape, choice in first.items()
        if shape[0] != kind and choice.implementation != SEPARATE
    }
    return [
        choice
        for shape, choice in first.items()
        if shape[0] != kind or (choice.columns, choice.depth) not in joined
    ]


def rivals(timed: Iterable[Mapping[str, Any]], taken: Choice, within: float) -> list[Choice]:
    """What was timed for the shape of `taken`, within a factor of the best, but for the same walk.
    Only finalists: a time of one launch at a cool GPU's clock is up to 15 % short of a sustained
    one."""
    parts = ("kind", "rows", "columns", "depth", "implementation")
    found = [
        replace(
            taken,
            **{part: row[part] for part in parts},
            tile=Tile(**row["tile"]) if row["tile"] else None,
            us=row["sustained_us"],
        )
        for row in timed
        if "sustained_us" in row
    ]
    found = [choice for choice in found if shape_of(choice) == shape_of(taken)]
    limit = within * min((choice.us for choice in found), default=0.0)
    return [choice for choice in found if choice.us <= limit and ran_as(choice) != ran_as(taken)]


def ran_as(choice: Choice) -> tuple[str, Tile | None]:
    """Equal for what is the same work in the same order."""
    return choice.implementation, choice.tile and as_walked(choice.tile, choice.rows)


@contextmanager
def exchanged(choices: Sequence[Choice]) -> Iterator[None]:
    """The engine's table with these as the only ones of their shapes."""
    shapes = {shape_of(choice) for choice in choices}
    kept = tuple(choice for choice in gemm.measured() if shape_of(choice) not in shapes)
    table = gemm.measured
    gemm.measured = lambda: (*kept, *choices)  # type: ignore[assignment]
    gemm.choose.cache_clear()
    try:
        yield
    finally:
        gemm.measured = table
        gemm.choose.cache_clear()


def captured(weights: ZImageTransformer, pixels: Size, choices: Sequence[Choice]) -> Loop:
    """The denoise loop with these choices exchanged, as one graph per step."""
    with exchanged(choices):
        loop = engine_loop(engine_of(weights), pixels)
        loop()
    return loop


def in_turns(loops: Mapping[str, Loop], seconds: float, turns: int) -> dict[str, list[float]]:
    """Milliseconds of every loop in every turn; every second turn goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns):
        for name in list(loops)[:: -1 if turn % 2 else 1]:
            times[name].append(sustained(loops[name], seconds)["ms"])
    return times


def is_faster(rival: Sequence[float], table: Sequence[float]) -> bool:
    """In every turn, and by enough."""
    always = all(one < other for one, other in zip(rival, table, strict=True))
    return always and median(rival) < (1 - LEAST_GAIN) * median(table)


def name_of(choice: Choice) -> str:
    tile = choice.tile
    text = f"{choice.kind} {choice.columns}x{choice.depth} {choice.implementation}"
    return text + (f" {tile.m}x{tile.n} g{tile.group} c{tile.cluster}" if tile else "")


def measure(
    model: RandomModel,
    timed: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    *,
    within: float,
    seconds: float,
    turns: int,
) -> Iterator[dict[str, Any]]:
    """A row for the table, every rival, and all that were taken, with the table's time in the same
    turns."""
    for kind in kinds:
        policy = POLICY_OF_KIND[kind]
        weights = model.transformer(policy)
        for size, pixels in model.sizes.items():
            rows = pixels[0] * pixels[1] // 256 + CAPTION_TOKENS
            taken = winners(kind, rows) if DEVICE.type == "cuda" else []
            tried = {
                name_of(choice): choice
                for winner in taken
                for choice in rivals(timed, winner, within)
            }
            loops = {"table": captured(weights, pixels, [])}
            loops |= {name: captured(weights, pixels, [choice]) for name, choice in tried.items()}
            times = in_turns(loops, seconds, turns)
            yield row_of(policy, size, "table", [], times["table"], times["table"], False)
            best: dict[Shape, tuple[float, Choice]] = {}
            for name, choice in tried.items():
                faster = is_faster(times[name], times["table"])
                yield row_of(policy, size, name, [choice], times[name], times["table"], faster)
                now = best.get(shape_of(choice))
                if faster and (now is None or median(times[name]) < now[0]):
                    best[shape_of(choice)] = median(times[name]), choice
            if not best:
                continue
            together = [choice for _, choice in best.values()]
            loops = {"table": loops["table"], "together": captured(weights, pixels, together)}
            times = in_turns(loops, seconds, 2 * turns)
            faster = is_faster(times["together"], times["table"])
            yield row_of(
                policy, size, "together", together, times["together"], times["table"], faster
            )


def row_of(
    policy: str,
    size: str,
    name: str,
    choices: Sequence[Choice],
    times: list[float],
    table: list[float],
    faster: bool,
) -> dict[str, Any]:
    change = median(times) / median(table) - 1
    print(
        f"{policy:10} {size:10} {name:62} {median(times):7.2f} ms, {change:+.2%}"
        f"{' taken' if faster else ''}",
        flush=True,
    )
    return {
        "policy": policy,
        "size": size,
        "what": name,
        "choices": [asdict(choice) for choice in choices],
        "ms": times,
        "table_ms": table,
        "taken": faster,
    }


def with_winners(
    table: Sequence[dict[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The table's choices, where those that were taken together stand in front of their shapes,
    instead of what has tiles of the same height."""

    def key(choice: Mapping[str, Any]) -> tuple[object, ...]:
        return tuple(choice[part] for part in ("gpu", "kind", "rows", "columns", "depth"))

    def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        heights = {(it["tile"] or asdict(CUBLAS_TILE))["m"] for it in (one, other)}
        return key(one) == key(other) and len(heights) == 1

    result = list(table)
    for row in rows:
        for choice in row["choices"] if row["what"] == "together" and row["taken"] else ():
            result = [other for other in result if not same(other, choice)]
            places = [place for place, other in enumerate(result) if key(other) == key(choice)]
            result.insert(places[0] if places else len(result), dict(choice))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", type=Path, required=True, help="what kernels.py has measured")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choices", type=Path, help="the table to put those that were taken into")
    parser.add_argument("--kinds", nargs="+", choices=POLICY_OF_KIND, default=[*POLICY_OF_KIND])
    parser.add_argument("--within", type=float, default=1.06, help="of the fastest alone")
    parser.add_argument("--seconds", type=float, default=1.5, help="of every loop in every turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--scale", choices=SIZES, default="full", help="tiny: a dry run")
    arguments = parser.parse_args()
    if arguments.scale == "full" and DEVICE.type == "cpu":
        parser.error("full size needs a GPU; --scale tiny proves the script without one")
    rows = measure(
        RandomModel(arguments.scale),
        json.loads(arguments.kernels.read_text())["gemm"],
        arguments.kinds,
        within=arguments.within,
        seconds=arguments.seconds,
        turns=arguments.turns,
    )
    with torch.inference_mode():
        write_rows(arguments.out, envelope() | {"weights": RANDOM_WEIGHTS}, "turns", rows)
    if arguments.choices:
        table = json.loads(arguments.choices.read_text())["choices"]
        choices = with_winners(table, json.loads(arguments.out.read_text())["turns"])
        arguments.choices.write_text(json.dumps({"choices": choices}, indent=1) + "\n")


if __name__ == "__main__":
    main()
