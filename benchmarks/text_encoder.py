"""Time the engine's text encoder on a GPU: whole prompts in every mode, and every matrix product.

    python benchmarks/fake_model.py fake-random --parts text_encoder,tokenizer
    python benchmarks/text_encoder.py fake-random --out text.json [--choices FILE]

Per mode: seconds to load, milliseconds per prompt of 32 to 128 tokens (wall time from token ids to
a finished caption, median), bytes held, and the time that reading the weights once would need at
the bandwidth of a large copy. Per product: microseconds and GB/s of every
implementation; one whose result is wrong gets no time. `--choices` adds the fastest to the table
that the engine reads.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu import envelope, sampled_gpu
from kernels import (
    Candidate,
    _tile_text,
    best_choices,
    copy_bandwidth,
    median_us,
    operands,
    relative_error,
)
from zimage_fp8.engine.qwen3 import LINEARS, layer_shapes, read_qwen3_config
from zimage_fp8.engine.text import FastTextEncoder, few_rows_tile
from zimage_fp8.kernels.matmul import matmul, refusal
from zimage_fp8.kernels.tile import Tile

TOKENS = (32, 64, 96, 128)
MODES: tuple[dict[str, Any], ...] = (
    {"precision": "bf16"},
    {"precision": "fp8"},
    {"precision": "bf16", "offload": True},
    {"precision": "fp8", "offload": True},
)
CACHE_BYTES = 2**28  # operands are rotated among sets that together exceed the L2 cache by far
SECONDS = 2.0


def prompt_rows(encoder: FastTextEncoder, copy_gbs: float) -> list[dict[str, Any]]:
    rows = []
    for tokens in TOKENS:
        ids = list(range(5, 5 + tokens))
        encoder.tokens = lambda _prompt, ids=ids: ids  # type: ignore[assignment,misc]
        started = time.perf_counter()
        encoder.encode("")
        torch.cuda.synchronize()
        first_s = time.perf_counter() - started
        times: list[float] = []
        with sampled_gpu() as sampled:
            while sum(times) < SECONDS:
                started = time.perf_counter()
                encoder.encode("")
                torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        read_ms = encoder.device_bytes / copy_gbs / 1e6
        row = {"tokens": tokens, "ms": 1e3 * median(times), "runs": len(times)}
        row |= {"first_s": first_s, "weights_at_copy_bandwidth_ms": read_ms, **sampled}
        rows.append(row)
        share = "" if encoder.offload else f" ({read_ms / row['ms']:4.0%} of copy bandwidth)"
        print(f"  {tokens:4} tokens {row['ms']:7.2f} ms{share}, first {first_s:.2f} s", flush=True)
    return rows


def encoder_rows(folder: Path, copy_gbs: float) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        started = time.perf_counter()
        encoder = FastTextEncoder(folder, torch.bfloat16, torch.device("cuda"), **mode)
        torch.cuda.synchronize()
        load_s = time.perf_counter() - started
        held = {"device_bytes": encoder.device_bytes, "host_bytes": encoder.host_bytes}
        print(f"{mode}: loaded in {load_s:.1f} s, {held['device_bytes'] / 2**30:.2f} GiB")
        prompts = prompt_rows(encoder, copy_gbs)
        rows.append({**mode, "load_s": load_s, **held, "prompts": prompts})
        del encoder
        torch.cuda.empty_cache()
    return rows


def candidates(kind: str, rows: int) -> list[Candidate]:
    if kind == "bf16":
        return [Candidate("cublas")]
    m = few_rows_tile(rows).m
    tiles = [Tile(m=m, n=n, k=128, warps=4, stages=s) for n in (32, 64, 128) for s in (3, 5)]
    tiles += [Tile(m=m, n=n, k=256, warps=4, stages=3) for n in (16, 32, 64)]
    return [
        Candidate("cublas-row"),
        *(Candidate("triton", tile) for tile in tiles),
        *(Candidate("triton-tma", tile) for tile in tiles if tile.n >= 32),
    ]


def product_rows(folder: Path) -> list[dict[str, Any]]:
    shapes = layer_shapes(read_qwen3_config(folder / "text_encoder"))
    rows = []
    for field, members in LINEARS.items():
        columns, depth = sum(shapes[name][0] for name in members), shapes[members[0]][1]
        for kind in ("bf16", "e4m3-vector"):
            for tokens in (32, 64, 128):
                rows += product_row(field, kind, tokens, columns, depth)
    return rows


def product_row(
    layer: str, kind: str, tokens: int, columns: int, depth: int
) -> list[dict[str, Any]]:
    weight_bytes = columns * depth * (2 if kind == "bf16" else 1)
    count = max(4, -(-CACHE_BYTES // weight_bytes))
    sets = operands(kind, tokens, columns, depth, count)
    x, weight, scale = sets[0]
    exact = x.values.double() @ weight.double().T
    if x.scale is not None and scale is not None:
        exact = exact * x.scale * scale
    results = []
    for candidate in candidates(kind, tokens):
        if refusal(candidate.implementation, x, scale):
            continue
        row: dict[str, Any] = {
            "layer": layer,
            "kind": kind,
            "rows": tokens,
            "columns": columns,
            "depth": depth,
            "implementation": candidate.implementation,
            "tile": asdict(candidate.tile) if candidate.tile else None,
        }
        row |= _timed(lambda i, c=candidate: _run(sets[i], c), exact, count)  # type: ignore[misc]
        results.append(row)
        speed = (
            f"{row['us']:6.1f} us {weight_bytes / row['us'] / 1e3:5.0f} GB/s"
            if "us" in row
            else row
        )
        print(f"{layer:8} {kind:11} {tokens:4} {candidate.implementation:10} "
              f"{_tile_text(candidate.tile):24} {speed}", flush=True)  # fmt: skip
    return results


def _run(operands: Any, candidate: Candidate) -> Tensor:
    x, weight, scale = operands
    return matmul(x, weight, scale, torch.bfloat16, candidate.implementation, candidate.tile)


def _timed(run: Callable[[int], Tensor], exact: Tensor, count: int) -> dict[str, Any]:
    try:
        error = relative_error(run(0), exact)
        if error > 5e-3:
            return {"relative_error": error, "wrong": True}
        return {"relative_error": error, "us": median_us(run, sets=count)}
    except Exception as reason:  # noqa: BLE001  a tile may not fit the GPU's shared memory
        return {"refused": str(reason).strip().partition("\n")[0][:200]}


def merge_choices(path: Path, found: list[dict[str, Any]]) -> None:
    """Put `found` into the engine's table, in place of what was measured there for their shapes."""
    parts = ("capability", "kind", "rows", "columns", "depth")

    def key(choice: dict[str, Any]) -> str:
        return json.dumps([choice[part] for part in parts])

    table = {key(choice): choice for choice in json.loads(path.read_text())["choices"]}
    table |= {key(choice): choice for choice in found}
    path.write_text(json.dumps({"choices": list(table.values())}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a pipeline folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--choices", type=Path, help="add the fastest products to this table")
    arguments = parser.parse_args()
    record = envelope()
    record["products"] = product_rows(arguments.model)
    if arguments.choices:
        merge_choices(arguments.choices, best_choices(record["products"]))
        from zimage_fp8.engine import gemm

        gemm.measured.cache_clear()
        gemm.choose.cache_clear()
    record["copy_gb_per_s"] = copy_bandwidth()  # read and written bytes; reading alone is no slower
    record["encoder"] = encoder_rows(arguments.model, record["copy_gb_per_s"])
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
