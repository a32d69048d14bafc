"""Tables and pictures of docs/quality.md, from benchmarks/results/.

python benchmarks/quality.py        redraw docs/images/*.svg; render.py writes the tables
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from zimage_fp8.bench.table import markdown_table
from zimage_fp8.evaluate import psnr_db
from zimage_fp8.heatmap import svg
from zimage_fp8.sensitivity.report import heat_maps
from zimage_fp8.sensitivity.result import read

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
OUTLIERS, GEMM, SENSITIVITY = "nano-outliers.json", "gemm-error.json", "nano-sensitivity.json"
OUTLIERS_CPU, QUALITY = "nano-outliers-cpu.json", ("nano-quality.json", "nano-quality-gpu.json")
PLANS, POLICIES = "nano-plans.json", "nano-outliers-policies.json"
DEVICES = "nano-devices.json"
ATTENTION, ATTENTION_RUN = "nano-attention-bits.json", "nano-attention-gpu.json"
SEARCH, ROUNDINGS, STEPS = "nano-search.json", "nano-roundings.json", "nano-steps.json"

MEANINGS = {
    "full": "`full`: static E4M3, per tensor",
    "full[!context_refiner]": "the same, context refiner in BF16",
    "full-folded": "`full`, channel scales folded",
    "full-folded, no headroom": "the same without headroom, on a CPU",
    "fp8-row": "`fp8-row`: E4M3 per row and token",
    "int8-row": "INT8 per row and token",
    "int8-row-folded": "INT8, channel scales folded",
    "online_int8-rot": "`online_int8-rot`: rotated",
    "int8-rot": "**`int8-rot`: folded, then rotated**",
}
PROMISED = ("full-folded", "int8-rot")
COLORS = (
    "#0069a8",
    "#00a08a",
    "#56a0d3",
    "#9fc5e8",
    "#5a5f66",
    "#8a6d00",
    "#c9a227",
    "#a3487e",
    "#b8460e",
)
WIDTH, HEIGHT, LEFT, TOP, LEGEND = 720, 300, 46, 20, 250


def outlier_table(results: Path) -> str:
    """Mean PSNR of every variant at every ratio, with its interval."""
    found = json.loads((results / OUTLIERS).read_text())
    ratios = list(found["ratios"])
    most = max(
        len(cell["pictures"]) for cells in found["ratios"].values() for cell in cells.values()
    )
    on_cpu = json.loads((results / OUTLIERS_CPU).read_text())
    rows = []
    for name, meaning in MEANINGS.items():
        of = found if name in found["ratios"][ratios[0]] else on_cpu
        cells = [of["ratios"][ratio].get(name) for ratio in ratios]
        if any(cells):
            beside = _paired(cells[0], of["ratios"][ratios[0]].get("full"))
            rows.append([meaning, *(_counted(cell, most) for cell in cells), beside])
    head = ["mean PSNR, dB", *(_ratio(float(ratio)) for ratio in ratios), "first, minus `full`"]
    return "\n\n".join(
        [
            markdown_table(head, rows),
            f"{most} pictures of {found['size']}, {found['steps']} steps, where no smaller number "
            "stands in parentheses; drawn in pairs against the unquantized model in FP32. ± is "
            "half the 95 % interval of the mean. The last column is the mean of the differences "
            "picture by picture, without outliers.",
            _made(found),
        ]
    )


def policy_table(results: Path) -> str:
    """Every policy on planted channels: all layers of a part in E4M3, few prompts."""
    found = json.loads((results / POLICIES).read_text())
    ratios = list(found["ratios"])
    cells = {
        name: [found["ratios"][ratio][name] for ratio in ratios] for name in found["ratios"]["1"]
    }
    rows = [[f"`{name}`", *(_counted(cell, 0) for cell in of)] for name, of in cells.items()]
    head = ["mean PSNR, dB", *(_ratio(float(ratio)) for ratio in ratios)]
    count = len(next(iter(cells.values()))[0]["pictures"])
    return "\n\n".join([markdown_table(head, rows), f"{count} prompts.", _made(found)])


def outlier_losses(results: Path) -> str:
    """What outliers cost the formats that are to stand them: paired with the same without."""
    found = json.loads((results / OUTLIERS).read_text())
    none, *ratios = found["ratios"]
    rows = []
    for name in PROMISED:
        without = found["ratios"][none][name]
        beside = [_paired(found["ratios"][ratio].get(name), without) for ratio in ratios]
        rows.append([MEANINGS[name], f"{without['summary']['mean']:.1f}", *beside])
    head = ["dB", "without", *(_ratio(float(ratio)) for ratio in ratios)]
    return markdown_table(head, rows)


def token_table(results: Path) -> str:
    """Loud tokens, beside the same prompts without."""
    found = json.loads((results / OUTLIERS).read_text())
    ratios = list(found["tokens"])
    rows, counts = [], set()
    for name in MEANINGS:
        cells = [found["tokens"][ratio].get(name) for ratio in ratios]
        if not all(cells):
            continue
        counts |= {len(cell["pictures"]) for cell in cells}
        values = _values(found["ratios"]["1"][name])[: min(counts)]
        rows.append(
            [MEANINGS[name], f"{fmean(values):.1f}"]
            + [f"{cell['summary']['mean']:.1f}" for cell in cells]
        )
    head = ["mean PSNR, dB", *map(_ratio, (1.0, *map(float, ratios)))]
    count = " to ".join(map(str, sorted(counts)))
    return f"{markdown_table(head, rows)}\n\n{count} prompts.\n\n{_made(found)}"


def rounding_table(results: Path) -> str:
    """One policy in several roundings, plain and folded, and how far they lie apart."""
    found = json.loads((results / ROUNDINGS).read_text())
    factors = list(found["factors"])
    rows = []
    for name in ("full", "full-folded"):
        means = [found["factors"][factor][name]["summary"]["mean"] for factor in factors]
        spread = f"{fmean(means):.1f} ± {1.96 * stdev(means) / math.sqrt(len(means)):.1f}"
        cells = (f"{mean:.1f}" for mean in means)
        rows.append([MEANINGS[name], *cells, spread, f"{stdev(means):.1f}"])
    columns = [f"scales × {factor}" for factor in factors]
    count = found["factors"][factors[0]]["full"]["summary"]["pictures"]
    table = markdown_table(["mean PSNR, dB", *columns, "all", "their spread"], rows)
    note = (
        f"{count} prompts, the same for all; ± is half the 95 % interval over roundings, the "
        "spread their standard deviation."
    )
    return f"{table}\n\n{note}\n\n{_made(found)}"


def step_table(results: Path) -> str:
    """Steps left unquantized, and steps with static scales of their own: paired differences."""
    found = json.loads((results / STEPS).read_text())
    rows = []
    for policy, cells in found["unquantized"].items():
        for name in (name for name in cells if name != "none"):
            change = _paired(cells[name], cells["none"])
            rows.append([f"`{policy}`, steps {name.replace(',', ' and ')} unquantized", change])
    for ratio, cells in found["scales"].items():
        where = "" if ratio == "1" else f", outliers {_ratio(float(ratio))}"
        change = _paired(cells["by step"], cells["one"])
        rows.append([f"`full`, scales by step{where}", change])
    return f"{markdown_table(['', 'gain, dB'], rows)}\n\n{_made(found)}"


def agreement_table(results: Path) -> str:
    """The same formats on a CPU and on a GPU, prompt by prompt where both drew the prompt."""
    rows = []
    cpu, gpu = (json.loads((results / name).read_text()) for name in QUALITY)
    for name in cpu["bfloat16"]:
        pair = [found["bfloat16"][name]["psnr_db"] for found in (cpu, gpu)]
        rows.append([name, "BF16, no outliers", *_agreement(*pair)])
    cpu, gpu = (json.loads((results / name).read_text()) for name in (OUTLIERS_CPU, OUTLIERS))
    places = [found["order"] for found in (cpu, gpu)]
    for ratio in cpu["ratios"]:
        for name in PROMISED:
            values = [
                dict(zip(place, _values(found["ratios"][ratio][name]), strict=False))
                for place, found in zip(places, (cpu, gpu), strict=True)
            ]
            both = sorted(values[0].keys() & values[1].keys())
            pair = [[of[place] for place in both] for of in values]
            rows.append([name, f"FP32, {_ratio(float(ratio))}", *_agreement(*pair)])
    head = ["", "the rest of the model", "prompts", "CPU, dB", f"{gpu['gpu']['name']}, dB"]
    return markdown_table([*head, "GPU minus CPU"], rows)


def _agreement(cpu: Sequence[float], gpu: Sequence[float]) -> list[str]:
    gains = [b - a for a, b in zip(cpu, gpu, strict=True)]
    spread = 1.96 * stdev(gains) / math.sqrt(len(gains))
    difference = f"{fmean(gains):+.1f} ± {spread:.1f}"
    return [f"{len(gains)}", f"{fmean(cpu):.1f}", f"{fmean(gpu):.1f}", difference]


def device_table(results: Path) -> str:
    """Pictures of the fast engine on a GPU beside the plain model's on a CPU."""
    found = json.loads((results / DEVICES).read_text())
    keys = ("between_devices_db", "gpu_to_exact_db", "cpu_to_exact_db")
    rows = [
        [f"`{row['policy']}`", row["dtype"]]
        + [f"{row[key]['mean']:.1f} ({row[key]['least']:.1f})" for key in keys]
        for row in found["rows"]
    ]
    head = ["policy", "dtype", "GPU to CPU, dB", "GPU to exact, dB", "CPU to exact, dB"]
    note = (
        f"Means over {found['prompts']} prompts, the lowest in parentheses. Exact: the unquantized "
        "model in FP32 on the CPU."
    )
    return "\n\n".join([markdown_table(head, rows), note, _made(found)])


def attention_table(results: Path, name: str = ATTENTION) -> str:
    """What attention in 8 bits costs: simulated, or run on a GPU."""
    found = json.loads((results / name).read_text())
    forms = list(dict.fromkeys(row["attention"] for row in found["rows"]))
    by = {(row["policy"], row["attention"]): row for row in found["rows"]}
    rows = []
    for policy in dict.fromkeys(row["policy"] for row in found["rows"]):
        cells = []
        for form in forms:
            row = by[policy, form]
            if above := row.get("above_16_bits"):
                low, high = above["mean_ci95"]
                cells.append(f"{above['mean']:+.1f} ({low:+.1f} to {high:+.1f})")
            else:
                cells.append(f"{row['mean']:.1f}")
        rows.append([f"`{policy}`", *cells])
    head = ["mean PSNR, dB; then changes", *forms]
    note = f"{found['prompts']} prompts, paired, with 95 % intervals."
    return "\n\n".join([markdown_table(head, rows), note, _made(found)])


def _made(found: dict) -> str:
    command = found["command"]
    if isinstance(command, list):  # as `gpu.envelope` writes it
        command = f"python benchmarks/{' '.join(command)}"
    facts = [found["gpu"]["name"] if "gpu" in found else found["machine"]["cpu"]]
    facts += [f"{name} {version}" for name, version in found["versions"].items()]
    facts += ["blocks compiled"] if found.get("compiled") else []
    facts += [f"commit {found['commit']}", f"`{command}`"]
    return f"<sub>{' · '.join(facts)}</sub>"


def _values(cell: dict) -> list[float]:
    return [psnr_db(picture["mse"]) for picture in cell["pictures"]]


def _counted(cell: dict | None, most: int) -> str:
    if not cell:
        return ""
    summary = cell["summary"]
    fewer = f" ({summary['pictures']})" if summary["pictures"] < most else ""
    return f"{summary['mean']:.1f} ± {summary['ci95']:.1f}{fewer}"


def _paired(ours: dict | None, theirs: dict | None) -> str:
    """How much better the first draws the prompts that both have drawn."""
    if not ours or not theirs or ours is theirs:
        return ""
    gains = [a - b for a, b in zip(_values(ours), _values(theirs), strict=False)]
    if len(gains) < 2:
        return ""
    return f"{fmean(gains):+.1f} ± {1.96 * stdev(gains) / math.sqrt(len(gains)):.1f}"


def _ratio(ratio: float) -> str:
    return "no outliers" if ratio == 1 else f"× {ratio:,.0f}"


def gemm_table(results: Path) -> str:
    """The relative error of one product, by input and format."""
    found = json.loads((results / GEMM).read_text())
    formats = list(next(iter(found["errors"].values())))
    rows = [
        [name, *(_percent(errors[format]) for format in formats)]
        for name, errors in found["errors"].items()
    ]
    facts = [f"{name} {version}" for name, version in found["versions"].items()]
    made = f"<sub>{' · '.join([*facts, '`' + found['command'] + '`'])}</sub>"
    return "\n\n".join([markdown_table(["input", *formats], rows), made])


def methods_table(results: Path) -> str:
    """Ways of choosing codes and scales, over many prompts: paired differences to plain `full`."""
    found = json.loads((results / "nano-quality.json").read_text())
    body = []
    for name, row in found["bfloat16"].items():
        above = row["above_baseline"]
        low, high = above["mean_ci95"]
        difference = f"{above['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
        body.append(
            [
                name,
                *(f"{row[key]:.2f}" for key in ("mean", "median", "p10")),
                "" if name == found["baseline"] else difference,
            ]
        )
    head = ["", "mean PSNR, dB", "median", "10th percentile", "above plain `full`, 95 % interval"]
    versions = " · ".join(f"{package} {number}" for package, number in found["versions"].items())
    facts = (
        f"{found['prompts']} held-out prompts, paired by prompt and seed, in BF16 · {versions} · "
        f"commit {found['commit']} · `{found['command']}`"
    )
    return f"{markdown_table(head, body)}\n\n<sub>{facts}</sub>"


def _percent(error: float) -> str:
    return f"{error:.2%}" if error < 1 else "lost"


def sensitivity_table(results: Path) -> str:
    """What quantizing one part alone costs: kinds of layer, steps, text encoder."""
    found = read(results / SENSITIVITY)
    prompts = found.settings["prompts"]
    assert isinstance(prompts, list)
    rows = [["everything", f"{psnr_db(found.mse('all')):.1f}", f"{found.latent_error('all'):.2%}"]]
    for scan, title in (("kinds", "all {}"), ("steps", "step {}"), ("text", "text encoder, {}")):
        for key in found.of(scan):
            name = title.format(key.partition(":")[2])
            name = name.replace("step caption", "context refiner")
            rows.append([name, f"{psnr_db(found.mse(key)):.1f}", f"{found.latent_error(key):.2%}"])
    table = markdown_table(["only this in 8 bits", "PSNR, dB", "error of the latent"], rows)
    added = psnr_db(sum(found.mse(key) for key in found.of("kinds")))
    return (
        f"{table}\n\nPolicy `{found.settings['policy']}`, {len(prompts)} prompts; PSNR of the mean "
        f"squared error. Adding up the four kinds predicts {added:.1f} dB for everything together; "
        f"drawn, it is {psnr_db(found.mse('all')):.1f} dB."
    )


def search_table(results: Path) -> str:
    """Plans that the search drew, with what it had predicted."""
    found = json.loads((results / SEARCH).read_text())
    chosen = found["chosen"]["point"]
    rows = []
    for tried in sorted(found["verified"], key=lambda it: it["point"]["cost"]):
        point, quality = tried["point"], tried["quality"]
        counts = {spec: point["specs"].count(spec) for spec in dict.fromkeys(point["specs"])}
        mark = "**" if point == chosen else ""
        rows.append(
            [
                ", ".join(f"{count} × {spec}" for spec, count in sorted(counts.items())),
                f"{mark}{point['cost'] / 1e6:.1f} MB{mark}",
                f"{point['predicted_psnr']:.1f}" if point["predicted_psnr"] else "∞",
                f"{mark}{quality['mean']:.1f}{mark}" if quality["mean"] else "∞",
            ]
        )
    head = [f"formats of the {len(found['parts'])} parts", "weights", "predicted, dB", "drawn, dB"]
    count = found["chosen"]["quality"]["pictures"]
    note = (
        f"Goal: {found['goal']['min_psnr']:g} dB at the least {found['cost']}; every plan drawn "
        f"with {count} prompts. Bold: the plan that was written."
    )
    return "\n\n".join([markdown_table(head, rows), note, *_elsewhere(found)])


def _elsewhere(found: dict) -> list[str]:
    """What was chosen beside what it was to surpass, on prompts of the search and on others."""
    if not (baseline := found.get("baseline")):
        return []
    both = {"prompts of the search": ("seen", found["chosen"]["quality"])}
    both["other prompts"] = ("held_out", found["held_out"]["quality"])
    rows = []
    for title, (key, chosen) in both.items():
        alone = baseline[key]
        gain = f"{chosen['mean'] - alone['mean']:+.1f}"
        shown = [f"{it['mean']:.1f} ± {it['ci95']:.1f}" for it in (alone, chosen)]
        rows.append([f"{chosen['pictures']} {title}", *shown, gain])
    kept = _kept_share(found)
    text = (
        f"The plan leaves {kept:.0%} of what `{baseline['policy']}` quantizes, by weights, in BF16."
    )
    head = ["mean PSNR, dB", f"`{baseline['policy']}` alone", "the plan", "gain"]
    return [markdown_table(head, rows), text]


def plans_table(results: Path) -> str:
    """The search's plans on prompts that it has not seen: paired gains over `int8-rot`."""
    found, searched = (json.loads((results / name).read_text()) for name in (PLANS, SEARCH))
    seen = {f"{it['point']['cost']:.0f}": it["quality"]["mean"] for it in searched["verified"]}
    before = searched["baseline"]["seen"]["mean"]
    alone, rows = found["plans"]["int8-rot"], []
    for name, cell in found["plans"].items():
        if name != "int8-rot":
            gain, mean = _paired(cell, alone), f"{cell['summary']['mean']:.1f}"
            rows.append([f"{float(name) / 1e6:.1f} MB", f"{seen[name] - before:+.1f}", gain, mean])
    count = f"{alone['summary']['pictures']} unseen prompts"
    head = ["plan", "gain on the prompts of the search, dB", f"gain on {count}", "mean there"]
    note = f"`int8-rot` alone draws {alone['summary']['mean']:.1f} dB there."
    return "\n\n".join([markdown_table(head, rows), note, _made(found)])


def _kept_share(found: dict) -> float:
    """Of the bytes that can be quantized, the share that stays, as they weigh in BF16."""
    weights = [
        next(it["cost"] for it in part["options"] if it["spec"] == "keep")
        for part in found["parts"]
    ]
    specs = found["chosen"]["point"]["specs"]
    kept = sum(w for w, spec in zip(weights, specs, strict=True) if spec == "keep")
    return kept / sum(weights)


def outlier_plot(found: dict) -> str:
    """PSNR over the ratio, one line per variant, as SVG on white."""
    ratios = list(found["ratios"])
    lines = {
        name: [
            found["ratios"][ratio].get(name, {}).get("summary", {}).get("mean") for ratio in ratios
        ]
        for name in MEANINGS
    }
    highest = max(value for values in lines.values() for value in values if value is not None)
    top = 10 * math.ceil(highest / 10)
    xs = [
        LEFT + place * (WIDTH - LEGEND - LEFT - 20) / (len(ratios) - 1)
        for place in range(len(ratios))
    ]

    def y(value: float) -> float:
        return TOP + (HEIGHT - 50 - TOP) * (1 - value / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui,sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for level in range(0, top + 1, 10):
        parts.append(
            f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - LEGEND - 20}" stroke="#e3e7eb"/>'
            f'<text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{level}</text>'
        )
    for x, ratio in zip(xs, ratios, strict=True):
        label = _ratio(float(ratio))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 30}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - LEGEND - 20) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">size of the planted channel '
        "outliers; mean PSNR, dB</text>"
    )
    shown = [name for name, values in lines.items() if any(v is not None for v in values)]
    for index, name in enumerate(shown):
        parts += _line(xs, [None if v is None else y(v) for v in lines[name]], COLORS[index])
        label = MEANINGS[name].replace("`", "").replace("*", "")
        height = TOP + 14 + 22 * index
        parts.append(
            f'<path d="M{WIDTH - LEGEND} {height - 4}h18" stroke="{COLORS[index]}" '
            'stroke-width="3"/>'
            f'<text x="{WIDTH - LEGEND + 24}" y="{height}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(xs: Sequence[float], ys: Sequence[float | None], color: str) -> list[str]:
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>', *dots]


def main() -> int:
    found = json.loads((RESULTS / OUTLIERS).read_text())
    (IMAGES / "outliers.svg").write_text(outlier_plot(found))
    (IMAGES / "sensitivity.svg").write_text(svg(heat_maps(read(RESULTS / SENSITIVITY))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
