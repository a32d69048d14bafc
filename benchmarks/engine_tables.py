"""Tables of docs/engine.md: a block's arithmetic, and what was measured of the engine on a GPU."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from zimage_fp8.bench.table import markdown_table
from zimage_fp8.engine.gemm import HEADS
from zimage_fp8.engine.profile import group_of
from zimage_fp8.layout import ZImageConfig, product_shapes

NOT_YET = "Not measured yet."
TOKENS = 2048 + 64  # 1024x512, and a caption of 64 tokens
GIB = 2**30


def block_table(_: Path) -> str:
    """The eight or nine launches of one block at 1024x512: operations, and bytes by format."""
    config = ZImageConfig()
    dim, ffn = config.dim, config.ffn_dim
    rows = {
        name: [
            f"`{name}`: [{TOKENS:,}, {depth:,}] × [{depth:,}, {columns:,}]",
            f"{2 * TOKENS * columns * depth / 1e9:.0f}",
            *(
                _megabytes((TOKENS + columns) * depth * width + 2 * TOKENS * columns)
                for width in (2, 1)
            ),
        ]
        for name, (columns, depth) in product_shapes(config).items()
    }
    x = TOKENS * dim
    body = [
        rows["to_qkv"],
        ["q, k norm and rotation, in place", "", *[_megabytes(8 * x)] * 2],
        ["attention", f"{4 * TOKENS**2 * dim / 1e9:.0f}", *[_megabytes(8 * x)] * 2],
        ["attention's output → codes", "", "not launched", _megabytes(3 * x)],
        rows["to_out"],
        ["gated residual, norm × scale → input of `w13`", "", _megabytes(8 * x), _megabytes(7 * x)],
        rows["w13"],
        [
            "`silu(w1 x) · (w3 x)` → input of `w2`",
            "",
            *(_megabytes(TOKENS * ffn * width) for width in (6, 5)),
        ],
        rows["w2"],
        [
            "gated residual, norm × scale → the next block's `to_qkv`",
            "",
            _megabytes(8 * x),
            _megabytes(7 * x),
        ],
    ]
    return markdown_table(["launch", "GFLOP", "MB in BF16", "MB in 8 bits"], body)


def loops_table(results: Path) -> str:
    """The denoise loop per policy and size, sustained."""
    found = _read(results / "engine.json")
    if found is None:
        return NOT_YET
    body = []
    for row in found["loops"]:
        gemm = ", ".join(f"{name} {what}" for name, what in row["gemm"].items())
        body.append(
            [
                f"`{row['policy']}`",
                row["size"].replace("x", "×"),
                f"{row['ms']:.0f}",
                f"{row['ms_p10']:.0f} to {row['ms_p90']:.0f}",
                f"{row['sm_clock_mhz']:.0f}",
                f"{row['power_w']:.0f}",
                f"{row['attention']}; {gemm}",
            ]
        )
    head = ["policy", "size", "ms", "10 to 90 %", "SM clock, MHz", "W", "runs"]
    what = f"{found['steps']} forwards, batch 1, a caption of {found['caption_tokens']} tokens"
    return _with_facts(found, markdown_table(head, body), f"The denoise loop: {what}")


def profile_table(results: Path) -> str:
    """Where the denoise loop's time goes, by kind of kernel."""
    found = _read(results / "engine-profile.json")
    if found is None:
        return NOT_YET
    spent: dict[str, list[float]] = {}
    for column, table in enumerate(found["tables"]):
        for kernel in table["kernels"]:
            of_group = spent.setdefault(group_of(kernel["name"]), [0.0] * len(found["tables"]))
            of_group[column] += kernel["ms"]
    totals = [sum(column) for column in zip(*spent.values(), strict=True)]
    body = [
        [group, *(f"{ms:.1f} ({ms / all_ms:.1%})" for ms, all_ms in zip(row, totals, strict=True))]
        for group, row in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    body.append(["all kernels", *(f"{ms:.1f}" for ms in totals)])
    head = (f"`{of['policy']}`, {of['size'].replace('x', '×')}, ms" for of in found["tables"])
    table = markdown_table(["kernels", *head], body)
    return _with_facts(found, table, "One denoise loop")


def kernels_table(results: Path) -> str:
    """The best product of every shape and format, and every fused kernel."""
    found = _read(results / "kernels.json")
    if found is None:
        return NOT_YET
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in found["gemm"]:
        key = (row["layer"], row["kind"], row["rows"])
        if "us" in row and (key not in best or _times(row) < _times(best[key])):
            best[key] = row
    products = [
        [
            f"`{layer}`",
            kind,
            f"{rows:,}",
            row["implementation"],
            f"{row['us']:.0f}",
            f"{row['tflops']:,.0f}",
            f"{row['sustained_us']:.0f}" if "sustained_us" in row else "",
        ]
        for (layer, kind, rows), row in best.items()
    ]
    head = ["product", "format", "rows", "fastest", "µs", "TFLOP/s", "sustained, µs"]
    table = markdown_table(head, products)
    table += (
        "\n\nOne kernel at a time, in short bursts; the three fastest of a shape then again, back "
        "to back, at the clock that leaves, which decides. `w13, gate` is the product and what "
        "makes the input of `w2` of it."
    )
    if "fused" in found:  # they come last: a run that ended early has none
        table += f"\n\n{_fused_table(found['fused'])}"
    return _with_facts(found, table, "Single kernels on random data", random=False)


def heads_table(results: Path) -> str:
    """to_qkv with norm and rotation of its heads, in one kernel and in two."""
    found = _read(results / "kernels.json")
    of_heads = [row for row in found["gemm"] if row["kind"].endswith(HEADS)] if found else []
    if found is None or not of_heads:
        return NOT_YET
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for row in of_heads:
        of_shape = rows.setdefault((row["kind"].removesuffix(HEADS), row["rows"]), {})
        name = f"{row['tile']['m']} × {row['tile']['n']}" if row["tile"] else "two kernels"
        if "us" in row:
            sustained = f"{row['sustained_us']:.0f}" if "sustained_us" in row else "–"
            of_shape[name] = f"{row['us']:.0f}, {sustained}"
    names = list(dict.fromkeys(name for of_shape in rows.values() for name in of_shape))
    body = [
        [kind, f"{count:,}", *(of_shape.get(name, "") for name in names)]
        for (kind, count), of_shape in rows.items()
    ]
    head = ["format", "rows", *(f"{name}, µs" for name in names)]
    table = markdown_table(head, body)
    table += (
        "\n\nIn bursts, and back to back at the power limit; tiles of one kernel by their size."
    )
    return _with_facts(found, table, "`to_qkv`, norm and rotation, on random data", random=False)


def turns_table(results: Path) -> str:
    """What products that are nearly as fast alone do to the running loop."""
    found = _read(results / "engine-turns.json")
    if found is None:
        return NOT_YET
    of_loop: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in found["turns"]:
        kind = row["what"] if row["what"] in ("table", "together") else "rivals"
        of_loop.setdefault((row["policy"], row["size"]), {}).setdefault(kind, []).append(row)
    body = []
    for (policy, size), rows in of_loop.items():
        rivals = sorted(rows.get("rivals", []), key=_change)
        ends = [_exchange(rivals[0]), _exchange(rivals[-1])] if rivals else ["", ""]
        body.append(
            [
                f"`{policy}`",
                size.replace("x", "×"),
                f"{median(rows['table'][0]['ms']):.1f}",
                f"{len(rivals)}",
                *ends,
                ", ".join(
                    f"{', '.join(map(_product, row['choices']))}: {_change(row):+.2%}"
                    for row in rows.get("together", [])
                    if row["taken"]
                ),
            ]
        )
    head = ["policy", "size", "loop, ms", "rivals", "fastest", "slowest", "taken"]
    return _with_facts(found, markdown_table(head, body), "One product of a loop for another")


def _exchange(row: dict[str, Any]) -> str:
    return f"{_product(row['choices'][0])}: {_change(row):+.2%}"


def _product(choice: dict[str, Any]) -> str:
    names = {shape: name for name, shape in product_shapes(ZImageConfig()).items()}
    name = f"`{names[choice['columns'], choice['depth']]}` by {choice['implementation']}"
    tile = choice["tile"]
    return f"{name} {tile['m']} × {tile['n']} in {tile['group']}" if tile else name


def _change(row: dict[str, Any]) -> float:
    return median(row["ms"]) / median(row["table_ms"]) - 1


def _times(row: dict[str, Any]) -> tuple[float, float]:
    return row.get("sustained_us", float("inf")), row["us"]


def _fused_table(rows: list[dict[str, Any]]) -> str:
    copy = next(row["gb_per_s"] for row in rows if row["kernel"] == "device copy")
    body = [
        [f"`{row['kernel']}`", row["output"], f"{row['rows']:,}", *_speed(row)]
        for row in rows
        if row["kernel"] != "device copy"
    ]
    head = ["fused kernel", "writes", "rows", "µs", "GB/s", "of a copy", "PyTorch, µs"]
    return (
        f"{markdown_table(head, body)}\n\nA device copy moves {copy:,.0f} GB/s; a kernel that "
        "finds its input in the L2 cache can be faster."
    )


def request_table(results: Path) -> str:
    """Whole requests over HTTP."""
    found = _read(results / "gpu-request.json")
    if found is None:
        return NOT_YET
    body = []
    for row in found["requests"]:
        for size, at in row["sizes"].items():
            stages = ", ".join(f"{name} {ms:.0f}" for name, ms in at["stages_ms"].items())
            body.append(
                [
                    f"`{row['variant']}`",
                    size.replace("x", "×"),
                    f"{at['p50_ms']:.0f}",
                    f"{at['p90_ms']:.0f}" if "p90_ms" in at else "",
                    stages,
                    f"{at['peak_bytes'] / GIB:.2f}",
                    f"{row['start_to_first_picture_s']:.1f}",
                    f"{row['new_size_first_picture_s']:.2f}",
                ]
            )
    head = ["variant", "size", "p50, ms", "p90, ms", "stages, ms", "peak, GiB"]
    head += ["start to first picture, s", "first of a new size, s"]
    return _with_facts(found, markdown_table(head, body), "Requests over HTTP, base64 PNG")


def baselines_table(results: Path) -> str:
    """diffusers' pipeline on the same kind of machine, eager and compiled."""
    records = [_read(results / name) for name in ("baselines.json", "baselines-compiled.json")]
    found = [record for record in records if record is not None]
    if not found:
        return NOT_YET
    body = [
        [
            row["what"],
            row["size"].replace("x", "×"),
            *(f"{row[part]['ms']:.0f}" for part in ("loop", "encode", "decode", "call")),
            f"{row['nfe']}",
            f"{row['first_loop_ms'] / 1000:.1f}",
            f"{row['loop']['sm_clock_mhz']:.0f}",
        ]
        for record in found
        for row in record["baselines"]
    ]
    head = ["", "size", "denoise loop, ms", "encode, ms", "decode, ms", "prompt to picture, ms"]
    head += ["forwards", "first loop, s", "SM clock, MHz"]
    return _with_facts(found[0], markdown_table(head, body), "diffusers' ZImagePipeline, batch 1")


# What the engine set out for, on an H100 80GB: milliseconds or GiB at 1024x512 and 1024x1024.
LOOP_TARGETS_MS = {
    "full": (195, 425),
    "online_fp8": (205, 450),
    "fp8-row": (205, 450),
    "int8-rot": (215, 470),
    "bf16_base": (325, 690),
}
PEAK_TARGETS_GIB = {"full": (14.0, 14.5), "full-te8": (11.0, 11.5), "full-offload": (8.0, 8.5)}
REQUEST_TARGET_MS = (230, 490)
STAGE_TARGETS_MS = {"encode": (6, 6), "decode": (17, 33), "picture": (10, 20)}
START_TARGET_S, NEW_SIZE_TARGET_S = 20, 2
SIZES = ("1024x512", "1024x1024")
# Loops and requests of each kind of GPU, the last measured in the end.
MACHINES = (
    ("engine-h100.json", "gpu-request-h100.json"),
    ("engine.json", "gpu-request.json"),
)
WARM = "full-again"  # the second server on a machine: nothing was compiled for its requests


def targets_table(results: Path) -> str:
    """Every target beside what was measured on each kind of GPU; misses are marked."""
    found = [(_read(results / loops), _read(results / asked)) for loops, asked in MACHINES]
    machines = [
        (loops, {row["variant"]: row for row in asked["requests"]})
        for loops, asked in found
        if loops and asked
    ]
    if not machines:
        return NOT_YET
    loop_ms = [
        {(row["policy"], row["size"]): row["ms"] for row in loops["loops"]} for loops, _ in machines
    ]
    full = [asked.get(WARM, asked["full"])["sizes"] for _, asked in machines]
    body = []
    for policy, targets in LOOP_TARGETS_MS.items():
        ms = [[one.get((policy, size)) for one in loop_ms] for size in SIZES]
        body.append(_target(f"denoise loop, `{policy}`", "ms", ms, targets))
    ms = [[one[size]["p50_ms"] for one in full] for size in SIZES]
    body.append(_target("request over HTTP, `full`, p50", "ms", ms, REQUEST_TARGET_MS))
    for stage, targets in STAGE_TARGETS_MS.items():
        ms = [[one[size]["stages_ms"][stage] for one in full] for size in SIZES]
        body.append(_target(f"of which {stage}", "ms", ms, targets))
    for variant, targets in PEAK_TARGETS_GIB.items():
        gib = [[_peak(asked, variant, size) / GIB for _, asked in machines] for size in SIZES]
        body.append(_target(f"peak GPU memory, `{variant}`", "GiB", gib, targets))
    for what, part, target in (
        ("start to first picture", "start_to_first_picture_s", START_TARGET_S),
        ("first picture of a new size", "new_size_first_picture_s", NEW_SIZE_TARGET_S),
    ):
        seconds = [[row[part] for row in _targeted(asked)] for _, asked in machines]
        cells = [
            f"{min(of):.1f} to {max(of):.1f}{'' if max(of) <= target else ' ✗'}" for of in seconds
        ]
        body.append([what, "s", *cells, f"{target}", *[""] * (len(machines) + 1)])
    names = [loops["gpu"]["name"].split()[1] for loops, _ in machines]  # NVIDIA H100 80GB HBM3
    of_size = [[f"{size.replace('x', '×')}, {name}" for name in names] for size in SIZES]
    return markdown_table(["", "", *of_size[0], "target", *of_size[1], "target"], body)


def _targeted(asked: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Servers of a quantized checkpoint: the others quantize, or calibrate, when they start."""
    return [row for name, row in asked.items() if name.removesuffix("-again") in PEAK_TARGETS_GIB]


def _peak(asked: dict[str, dict[str, Any]], variant: str, size: str) -> float:
    """Bytes at most, of all servers of a variant that were asked for a size."""
    servers = (row["sizes"] for name, row in asked.items() if name in (variant, f"{variant}-again"))
    return max(sizes[size]["peak_bytes"] for sizes in servers if size in sizes)


def _target(
    what: str, unit: str, found: Sequence[Sequence[float | None]], targets: Sequence[float]
) -> Sequence[str]:
    """found: per size, what each machine did; None where it was not measured."""
    cells: list[str] = []
    for values, target in zip(found, targets, strict=True):
        for value in values:
            if value is None:
                cells.append("")
                continue
            digits = 2 if unit == "GiB" else 1
            cells.append(f"{value:.{digits}f}{'' if value <= target else ' ✗'}")
        cells.append(f"{target:g}")
    return (what, unit, *cells)


def attention_table(results: Path) -> str:
    """The same loops with attention in 16 and in 8 bits, one after the other."""
    found = _read(results / "engine-attention.json")
    if found is None:
        return NOT_YET
    ms = {(row["policy"], row["size"], row["attention"]): row["ms"] for row in found["loops"]}
    names = list(dict.fromkeys(row["attention"] for row in found["loops"]))
    pairs = dict.fromkeys((row["policy"], row["size"]) for row in found["loops"])
    body = []
    for policy, size in pairs:
        of = [ms[policy, size, name] for name in names]
        changes = (f"{value:.1f} ({value / of[0] - 1:+.1%})" for value in of[1:])
        body.append([f"`{policy}`", size.replace("x", "×"), f"{of[0]:.1f}", *changes])
    head = ["policy", "size", *(f"`{name}`, ms" for name in names)]
    return _with_facts(found, markdown_table(head, body), "The denoise loop by attention")


def _speed(row: dict[str, Any]) -> Sequence[str]:
    if row.get("wrong"):
        return ("wrong", "", "", "")
    if "tflops" in row:  # computes more than it moves
        rate = (f"{row['tflops']:,.0f} TFLOP/s", f"{row['share_of_product']:.0%} of a product")
    else:
        rate = (f"{row['gb_per_s']:,.0f}", f"{row['share_of_copy']:.0%}")
    return (f"{row['us']:.0f}", *rate, f"{row['reference_us']:.0f}")


def _with_facts(found: dict[str, Any], table: str, what: str, *, random: bool = True) -> str:
    """The GPU and its weights above the numbers, versions and command below."""
    weights = f"; weights {found['weights']}" if random else ""
    versions: Iterable[str] = (f"{name} {version}" for name, version in found["versions"].items())
    facts = " · ".join([*versions, _facts(found)])
    return f"{what}, on one **{found['gpu']['name']}**{weights}.\n\n{table}\n\n<sub>{facts}</sub>"


def _facts(found: dict[str, Any]) -> str:
    return f"commit {found['commit']} · `python benchmarks/{shlex.join(found['command'])}`"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f}"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
