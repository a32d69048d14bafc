"""Render the blocks of README.md and docs/ that hold numbers, and the command reference.

    python benchmarks/render.py            rewrite what is stale
    python benchmarks/render.py --check    change nothing; show what is stale and exit 1

A block lies between `<!-- rendered: NAME -->` and `<!-- /rendered -->`; BLOCKS says who writes it,
from which file of benchmarks/results/. docs/cli.md is made from the command line's own help.
"""

import argparse
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from enum import EnumType
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

import engine_tables
import quality
from zimage_fp8.bench.details import (
    latency_table,
    load_table,
    memory_table,
    quality_table,
    strata_table,
    warnings_of,
)
from zimage_fp8.bench.notes import hardware, notes
from zimage_fp8.bench.plots import Rung, ladder
from zimage_fp8.bench.record import Record, read_record
from zimage_fp8.bench.statistics import percentile_interval
from zimage_fp8.bench.table import markdown_table, marked_table
from zimage_fp8.cli import app

ROOT = Path(__file__).parents[1]
GIB = 2**30
OPENING = re.compile(r"<!-- rendered: (?P<name>[\w-]+) -->\n")
BLOCK = re.compile(OPENING.pattern + r"(?:(?!<!-- ).)*<!-- /rendered -->", re.DOTALL)

Renderer = Callable[[Path], str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when stale")
    is_check = parser.parse_args().check

    stale = {path: text for path, text in rendered_files(ROOT) if _read(path) != text}
    for path, text in stale.items():
        if is_check:
            sys.stdout.writelines(_diff(path, text))
        else:
            path.write_text(text)
            print(f"rendered {path.relative_to(ROOT)}")
    return 1 if is_check and stale else 0


def rendered_files(root: Path) -> Iterator[tuple[Path, str]]:
    """(path, what it should hold) of every file with a rendered part."""
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        yield path, render_blocks(path.read_text(), BLOCKS, root / "benchmarks" / "results")
    yield root / "docs" / "cli.md", command_reference()
    if plot := engine_ladder_plot(root / "benchmarks" / "results"):
        yield root / "docs" / "images" / "engine-ladder.svg", plot


def render_blocks(text: str, blocks: dict[str, Renderer], results: Path) -> str:
    """`text` with every marked block written anew.

    Raises KeyError for a name that is not in `blocks`, ValueError for a block that never ends.
    """
    opened, closed = OPENING.findall(text), BLOCK.findall(text)
    if opened != closed:
        raise ValueError(f"blocks opened: {opened}, of which closed: {closed}")
    return BLOCK.sub(lambda block: _block(block["name"], blocks, results), text)


def _block(name: str, blocks: dict[str, Renderer], results: Path) -> str:
    return f"<!-- rendered: {name} -->\n{blocks[name](results).strip()}\n<!-- /rendered -->"


def nano_record(results: Path) -> Record:
    """Every policy of nano: over many prompts or, until that was measured, over three."""
    found = results / "nano-standard.json"
    return read_record(found if found.exists() else results / "nano-bench.json")


def bench_table(results: Path) -> str:
    """The main table: every policy of nano, as `zimage-fp8 bench` measured it."""
    return _table_of(nano_record(results))


def _table_of(record: Record) -> str:
    command = " ".join(record.command)
    return "\n\n".join(
        [marked_table(record), made_with(hardware(record), record.versions, record.commit, command)]
    )


def bench_notes(results: Path) -> str:
    """How the main table was made, and what not to read into it."""
    return "\n".join(f"- {note}" for note in notes(nano_record(results)))


def reference_run(name: str) -> Renderer:
    """Renders a record that `zimage-fp8 bench` left, kept as benchmarks/results/NAME.json."""

    def render(results: Path) -> str:
        path = results / f"{name}.json"
        if not path.exists():
            return "Not measured yet."
        record = read_record(path)
        parts = [_table_of(record), *(f"> {text}" for text in warnings_of(record))]
        for one in record.passes:
            parts += [latency_table(one, size).markdown() for size in record.parameters.sizes]
            tables = (quality_table(record, one), strata_table(record, one), load_table(one))
            parts += [table.markdown() for table in tables if table]
            parts += [memory_table(one).markdown()]
        return "\n\n".join(parts)

    return render


def evaluation_table(results: Path) -> str:
    """What nano draws right, of scenes that it was not trained on."""
    found = json.loads((results / "nano-evaluation.json").read_text())
    short, long, targets = found["single_short"], found["single_long"], found["targets"]
    both = {
        "short": found["pairs_short"]["both_top5"],
        "long": found["pairs_long"]["both_top5"],
    }
    rows = [
        ("object, nearest of all", short["top1"], long["top1"], targets["top1"]),
        ("object, among the nearest five", short["top5"], long["top5"], targets["top5"]),
        ("background", short["background"], long["background"], targets["background"]),
        ("two objects, both among five", both["short"], both["long"], targets["both_top5"]),
    ]
    header = [f"of {short['count']} unseen scenes", "short caption", "long caption", "goal"]
    table = markdown_table(
        header, ([what, f"{a:.1%}", f"{b:.1%}", f"{goal:.0%}"] for what, a, b, goal in rows)
    )
    vae = (
        f"The autoencoder by itself: {found['vae']['psnr_db_float32']:.1f} dB "
        f"(goal {targets['vae_psnr_db']:.0f} dB)."
    )
    facts = (found["device"], found["versions"], found.get("commit"), found.get("command"))
    return "\n\n".join([table, vae, made_with(*facts)])


def picture_table(results: Path) -> str:
    """Encoders of PNG: CPU time and sizes of files, as benchmarks/picture.py measured them."""
    record = json.loads((results / "picture.json").read_text())
    found = {(row["encoder"], row["size"], row["content"]): row for row in record["rows"]}
    encoders, sizes, contents = (list(dict.fromkeys(key)) for key in zip(*found, strict=True))
    header = ["PNG encoder, CPU ms · MB"]
    header += [f"{size}, {content}" for content in contents for size in sizes]
    body = []
    for encoder in encoders:
        cells = (found[encoder, size, content] for content in contents for size in sizes)
        shown = (f"{it['png_cpu_ms']:.1f} · {it['file_bytes'] / 1e6:.2f}" for it in cells)
        body.append([encoder, *shown])
    machine = record["machine"]
    where = f"{machine['cpu']}, all threads' CPU time, best of {record['runs']}"
    shown_versions = ("python", "numpy", "pillow", "isal", "zlib-ng", "deflate", "fpng")
    versions = {name: it for name, it in record["versions"].items() if name in shown_versions}
    facts = (where, versions, record["commit"], f"python benchmarks/{' '.join(record['command'])}")
    return "\n\n".join([markdown_table(header, body), made_with(*facts)])


def engine_ladder(results: Path) -> str:
    """What every step of the engine won; nothing until it was measured."""
    path = results / "engine-ladder.json"
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    sizes = list(dict.fromkeys(size for rung in found["rungs"] for size in rung["ms"]))
    first = {s: next(r["ms"][s] for r in found["rungs"] if s in r["ms"]) for s in sizes}
    columns = [f"{size.replace('x', ' × ')} (ms)" for size in sizes]

    def cell(ms: dict[str, float], size: str) -> str:
        return f"{ms[size]:.1f} ({first[size] / ms[size]:.2f}×)" if size in ms else "n/a"

    body = [
        [rung["name"], rung["what"], *(cell(rung["ms"], size) for size in sizes)]
        for rung in found["rungs"]
    ]
    device = found["gpu"]["name"] if "gpu" in found else found["machine"]["cpu"]
    command = f"python benchmarks/{' '.join(found['command'])}"
    return "\n\n".join(
        [
            f"![{LADDER_TITLE}](images/engine-ladder.svg)",
            markdown_table(["step", "what it adds", *columns], body),
            made_with(device, found["versions"], found["commit"], command),
        ]
    )


def server_load(results: Path) -> str:
    """What came of 64 rude clients."""
    found = json.loads((results / "load-nano.json").read_text())
    kinds = list(found["outcomes"])
    outcomes = list(dict.fromkeys(it for kind in kinds for it in found["outcomes"][kind]))
    rows = [
        (kind.replace("_", " "), *(str(found["outcomes"][kind].get(it, "")) for it in outcomes))
        for kind in kinds
    ]
    memory, files = found["rss_bytes"], found["open_files"]
    text = (
        f"{found['clients']} clients for {found['seconds']:.0f} s against nano: "
        f"{found['requests']} requests, of which {sum(found['unexpected'].values())} were answered "
        f"otherwise than they should be. Resident memory {memory['second_quarter'] / 2**20:.0f} "
        f"MiB in the second quarter, {memory['last_quarter'] / 2**20:.0f} in the last; open files "
        f"{files['before']} before, {files['most']} at most, {files['after']} after."
    )
    made = made_with(
        f"{found['cores']} CPU cores", found["versions"], found["commit"], found["command"]
    )
    return "\n\n".join([text, markdown_table(["what clients did", *outcomes], rows), made])


def server_overhead(results: Path) -> str:
    """Everything but the model, for one picture."""
    found = json.loads((results / "server-overhead.json").read_text())
    columns = {
        "server_ms": "server, ms",
        "server_cpu_ms": "server, processor ms",
        "png_ms": "PNG, ms",
        "base64_ms": "base64, ms",
    }
    rows = [(form, *(f"{found[form][it]:.1f}" for it in columns)) for form in ("json", "raw")]
    table = markdown_table(["answer", *columns.values()], rows)
    text = (
        f"What the server itself costs, around an engine that takes no time: medians of "
        f"{found['runs']} pictures of {found['size']}. Processor time is that of the server's "
        "process without PNG and base64."
    )
    if (load := found["load_average"][0]) > found["cores"] / 2:
        text += (
            f" Other programs kept the machine busy (load {load:.0f} on {found['cores']} cores), "
            "which lengthens every wall time here."
        )
    made = made_with(
        f"{found['cores']} CPU cores", found["versions"], found["commit"], found["command"]
    )
    return "\n\n".join([text, table, made])


def server_batching(results: Path) -> str:
    """What a picture's step costs in company, and how many more are drawn per second."""
    files = [results / name for name in ("batching.json", "batching-gpu.json")]
    return "\n\n".join(batching_table(json.loads(it.read_text())) for it in files if it.exists())


def batching_table(found: dict[str, Any]) -> str:
    batches = sorted({row["batch"] for row in found["rows"]})
    took = {(it["policy"], it["size"], it["batch"]): it["picture_ms"] for it in found["rows"]}
    rows = [
        (
            policy,
            size,
            f"{took[policy, size, batches[0]]:.1f}",
            *(f"{took[policy, size, 1] / took[policy, size, batch]:.2f}" for batch in batches[1:]),
        )
        for policy, size in dict.fromkeys(key[:2] for key in took)
    ]
    heads = ["policy", "size", "step alone, ms", *(f"{batch} together" for batch in batches[1:])]
    text = (
        f"Steps of {found['model']} per second with several pictures in each forward, as a "
        "multiple of those with one."
    )
    machine, device = found["machine"], found["device"]
    if device == "cpu":
        device = f"{machine['cpu']}, {machine['cores']} cores"
    made = made_with(device, found["versions"], found["commit"], found["command"])
    return "\n\n".join([text, markdown_table(heads, rows), made])


def gpu_headline(results: Path) -> str:
    """What one GPU gives at full size, by our benchmark; beside it what users have today."""
    path = results / "full-size-gpu.json"
    if not path.exists():
        return "Not measured yet."
    record = read_record(path)
    sizes, one = record.parameters.sizes, record.passes[0]
    body = [
        [
            f"`{variant.name}`",
            *(f"{percentile_interval(variant.latencies_s(size), 50).value:.3f}" for size in sizes),
            f"{variant.cold_start_s:.1f}",
            f"{variant.peak_memory_bytes[record.memory_method] / GIB:.1f}",
        ]
        for variant in one.variants
    ]
    today = json.loads((results / "baselines.json").read_text())
    eager = {row["size"]: row for row in today["baselines"] if row["mode"] == "eager"}
    seconds = (f"{eager[size]['call']['ms'] / 1000:.3f}" for size in sizes)
    allocated = max(eager[size]["torch_allocated_peak_bytes"] for size in sizes) / GIB
    body.append(["diffusers, BF16, eager", *seconds, "", f"{allocated:.1f}"])
    heads = [f"{size.replace('x', '×')}, s" for size in sizes]
    heads = ["", *heads, "start to first picture, s", "peak GPU memory, GiB"]
    gpu = record.machine.gpus[0].name
    if today["gpu"]["name"] != gpu:
        raise ValueError(f"diffusers was measured on {today['gpu']['name']}, ours on {gpu}")
    text = (
        f"One **{gpu}**, the model at full size with **random weights**: speed and memory are "
        f"real, pictures are meaningless. {record.parameters.steps} steps, guidance 0, medians of "
        f"{len(one.variants[0].latencies_s(sizes[0]))} requests over HTTP, from prompt to PNG. "
        "diffusers ran in one process, to a picture in memory, and its memory is what PyTorch "
        "allocated."
    )
    theirs = "python benchmarks/" + " ".join(today["command"])
    made = [
        made_with(gpu, record.versions, record.commit, " ".join(record.command)),
        made_with("diffusers", {}, today["commit"], theirs),
    ]
    return "\n\n".join([text, markdown_table(heads, body), "<br>".join(made)])


LADDER_TITLE = "Milliseconds per picture after every step of the engine"


def engine_ladder_plot(results: Path) -> str | None:
    """The same as an SVG; None until it was measured."""
    path = results / "engine-ladder.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    rungs = [Rung(rung["name"], rung["what"], rung["ms"]) for rung in found["rungs"]]
    return ladder(rungs, LADDER_TITLE)


def made_with(
    machine: str, versions: dict[str, str], commit: str | None, command: str | None
) -> str:
    """One small line under a table: where its numbers come from."""
    facts = [machine, *(f"{name} {version}" for name, version in versions.items())]
    facts += [f"commit {commit}"] if commit else []
    facts += [f"`{command}`"] if command else []
    return f"<sub>{' · '.join(facts)}</sub>"


BLOCKS: dict[str, Renderer] = {
    "nano-bench": bench_table,
    "nano-bench-notes": bench_notes,
    "nano-standard": reference_run("nano-standard"),
    "nano-standard-gpu": reference_run("nano-standard-gpu"),
    "full-size-gpu": reference_run("full-size-gpu"),
    "gpu-headline": gpu_headline,
    "nano-evaluation": evaluation_table,
    "engine-attention": engine_tables.attention_table,
    "engine-block": engine_tables.block_table,
    "engine-heads": engine_tables.heads_table,
    "engine-kernels": engine_tables.kernels_table,
    "engine-baselines": engine_tables.baselines_table,
    "engine-ladder": engine_ladder,
    "engine-targets": engine_tables.targets_table,
    "engine-loops": engine_tables.loops_table,
    "engine-profile": engine_tables.profile_table,
    "engine-request": engine_tables.request_table,
    "engine-turns": engine_tables.turns_table,
    "gemm-error": quality.gemm_table,
    "nano-outliers": quality.outlier_table,
    "nano-devices": quality.device_table,
    "nano-agreement": quality.agreement_table,
    "nano-attention-bits": quality.attention_table,
    "nano-attention-gpu": partial(quality.attention_table, name=quality.ATTENTION_RUN),
    "nano-outlier-losses": quality.outlier_losses,
    "nano-roundings": quality.rounding_table,
    "nano-steps": quality.step_table,
    "nano-tokens": quality.token_table,
    "nano-outliers-policies": quality.policy_table,
    "nano-plans": quality.plans_table,
    "nano-quality": quality.methods_table,
    "nano-search": quality.search_table,
    "nano-sensitivity": quality.sensitivity_table,
    "picture": picture_table,
    "server-batching": server_batching,
    "server-load": server_load,
    "server-overhead": server_overhead,
}


def command_reference() -> str:
    """docs/cli.md, from the parameters themselves: the same for every terminal and Typer."""
    group = typer.main.get_command(app)
    head = ["# Command line", "What `--help` says, in one page; made by `make docs`."]
    return "\n\n".join([*head, *(_section(*item) for item in group.commands.items())]) + "\n"


def _section(name, command) -> str:
    arguments = [it for it in command.params if not _is_option(it)]
    options = [it for it in command.params if _is_option(it) and it.name != "help"]
    usage = " ".join(["zimage-fp8", name, *map(_argument, arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", f"    {usage}", "", _with_code(inspect.cleandoc(command.help)), ""]
    lines += [f"- `{_argument(it)}`{_meaning(it)}" for it in arguments]
    hints = get_type_hints(inspect.unwrap(command.callback))
    lines += [f"- `{_option(it, hints.get(it.name))}`{_meaning(it)}" for it in options]
    return "\n".join(lines)


def _with_code(text: str) -> str:
    """Lines that are commands, fenced."""
    return re.sub(r"^(zimage-fp8 .*)$", r"```sh\n\1\n```", text, flags=re.MULTILINE)


def _is_option(parameter) -> bool:
    return parameter.opts[0].startswith("-")


def _argument(parameter) -> str:
    name = parameter.name.upper() + ("…" if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter, hint: object) -> str:
    spelled = ", ".join(parameter.opts)
    if parameter.is_flag:
        return " / ".join([spelled, *parameter.secondary_opts])
    return f"{spelled} {'|'.join(_choices(hint)) or parameter.name.upper()}"


def _choices(hint: object) -> list[str]:
    """The values of a Literal or an Enum, optional or not; empty for any other type."""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return [str(value) for value in get_args(kind)]
        if isinstance(kind, EnumType):
            return [str(member.value) for member in kind]
    return []


def _meaning(parameter) -> str:
    says = [parameter.help] if parameter.help else []
    if parameter.required and _is_option(parameter):
        says.append("(required)")
    elif default := _default(parameter):
        says.append(f"(default: {default})")
    return ": " + " ".join(says) if says else ""


def _default(parameter) -> str:
    value = getattr(parameter.default, "value", parameter.default)
    if isinstance(value, bool):
        return ("off", "on")[value] if parameter.secondary_opts else ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None or callable(value) else str(value)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _diff(path: Path, text: str) -> Iterator[str]:
    name = str(path.relative_to(ROOT))
    old, new = _read(path).splitlines(keepends=True), text.splitlines(keepends=True)
    return difflib.unified_diff(old, new, name, f"{name} (rendered)")


if __name__ == "__main__":
    sys.exit(main())
