"""The report: `report.html`, `report.md` and their plots and pictures, from a record and pictures.

Both say the same: they are made of the same sections.
"""

from collections.abc import Iterator
from pathlib import Path

from zimage_fp8.bench.details import (
    FLOOR_NAMES,
    guidance_table,
    latency_table,
    load_table,
    memory_table,
    power_table,
    quality_table,
    rival_of,
    stage_table,
    strata_table,
    warnings_of,
)
from zimage_fp8.bench.grid import (
    HEAT_RULE,
    as_webp,
    draw_difference,
    draw_grid,
    grid_name,
    grid_prompts,
    worst_pictures,
)
from zimage_fp8.bench.html import render_page
from zimage_fp8.bench.notes import attention_text, machine_table, notes, parameter_table
from zimage_fp8.bench.plots import Bar, Curve, Dot, curves, pareto, stacked_bars
from zimage_fp8.bench.record import Pass, Record
from zimage_fp8.bench.sections import (
    PLOTS,
    Block,
    Notes,
    Picture,
    Plot,
    Section,
    render_markdown,
)
from zimage_fp8.bench.statistics import MIN_SAMPLES, percentile_interval, summarize
from zimage_fp8.bench.summary import (
    first_pictures,
    goodput_per_s,
    images_per_s,
    metric_rows,
    stage_means_s,
)
from zimage_fp8.bench.table import main_table, quality_text, rows


def write_report(record: Record, folder: Path) -> Path:
    """Write report.html, report.md, plots/ and comparison pictures to the record's folder.

    `folder` holds the pictures; a record that came without any is reported without comparisons.
    Returns the path of report.md; report.html lies beside it. Raises ZImageError naming a picture
    that cannot be read.
    """
    sections = build_sections(record, folder)
    (folder / PLOTS).mkdir(exist_ok=True)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                (folder / PLOTS / f"{block.name}.svg").write_text(block.svg)
    path = folder / "report.md"
    path.write_text(render_markdown(title_of(record), sections))
    path.with_suffix(".html").write_text(render_page(title_of(record), sections))
    return path


def title_of(record: Record) -> str:
    parameters = record.parameters
    return f"{record.model}: every policy at {parameters.steps} steps, {parameters.size}"


def build_sections(record: Record, folder: Path) -> list[Section]:
    """Everything a report says, in its order; comparison pictures are written to `folder`."""
    alone = is_alone(record, folder)
    return [
        Section("", [*_warnings(record, is_alone=alone), *_main_tables(record)]),
        *_sections_if(
            ("How sure", list(_certainty(record))),
            ("Quality against latency", list(_pareto(record))),
            ("Worst pictures", [] if alone else list(_worst(record, folder))),
            ("Comparisons", [] if alone else list(_comparisons(record, folder))),
            ("Where the time goes", list(_stages(record))),
            ("Under load", list(_load(record))),
            ("Memory", [memory_table(one) for one in record.passes if one.variants]),
            ("Energy and clocks", list(_power(record))),
            ("Guidance", list(_guidance(record))),
        ),
        Section("Parameters", [parameter_table(record)]),
        Section("Machine and versions", [machine_table(record)]),
    ]


def _sections_if(*found: tuple[str, list[Block]]) -> Iterator[Section]:
    yield from (Section(title, blocks) for title, blocks in found if blocks)


def is_alone(record: Record, folder: Path) -> bool:
    """Whether none of the run's pictures lies beside its record. One that is missing among others
    is an error; a record that was passed on alone is not."""
    drew = [request for it in record.variants for request in first_pictures(it).values()]
    return bool(drew) and not any((folder / request.picture).exists() for request in drew)


def _warnings(record: Record, *, is_alone: bool) -> Iterator[Block]:
    lines = list(warnings_of(record))
    if is_alone:
        lines.append("The pictures of this run are not beside its record: none are compared here.")
    if lines:
        yield Notes(lines, "warning")


def _main_tables(record: Record) -> Iterator[Block]:
    """The card's table for every pass and size; the first is the main one."""
    several = len(record.passes) * len(record.parameters.sizes) > 1
    for place, one in enumerate(record.passes):
        for size in record.parameters.sizes:
            if several:
                yield Notes([f"Pass {one.name}, {size}, attention {attention_text(one)}."])
            yield main_table(record, one, size)
            if place == 0 and size == record.parameters.size:
                yield Notes(list(notes(record)))


def _certainty(record: Record) -> Iterator[Block]:
    for one, size in _passes_and_sizes(record):
        yield Notes([f"Latency, pass {one.name}, {size}: percentiles with 95 % intervals."])
        yield latency_table(one, size)
    for one in record.passes:
        quality, strata = quality_table(record, one), strata_table(record, one)
        rival = rival_of(one)
        if quality is None or rival is None:
            continue
        yield Notes(
            [
                f"Quality, pass {one.name}: means with 95 % intervals over prompts, then the "
                f"worst tenth. The last columns compare with {rival.name} picture by picture; "
                "`not distinguishable` means that the interval of the difference holds zero, or "
                f"that fewer than {MIN_SAMPLES} prompts give none. "
                "Noise floors are BF16 against itself: what lies above one is as close as BF16."
            ]
        )
        yield quality
        if strata:
            yield strata


def _passes_and_sizes(record: Record) -> Iterator[tuple[Pass, str]]:
    for one in record.passes:
        for size in record.parameters.sizes if one.variants else ():
            yield one, size


def _pareto(record: Record) -> Iterator[Block]:
    one, size = record.passes[0], record.parameters.size
    if record.no_quality or len(one.variants) < 2:
        return
    best = {row.name for row in rows(record) if row.is_best}
    dots = []
    for variant in one.variants:
        median = percentile_interval(variant.latencies_s(size), 50)
        found = metric_rows(variant, "psnr_db", record.parameters)
        mean = summarize(found).mean if found else None
        if variant is not one.reference and mean is None:
            continue  # every picture is identical: no decibels to draw
        name, note = variant.name, f"{variant.name}: {median.value:.3f} s"
        note += f", {mean.value:.2f} dB" if mean else ""
        dots.append(Dot(name, median, mean, name in best, note))
    svg = pareto(
        dots, _floor_levels(record, one), "median latency (s), less is better",
        "PSNR against BF16 (dB), more is better", "Latency against PSNR",
    )  # fmt: skip
    caption = (
        "Lines through the dots are 95 % intervals; a grey line joins the best choices where there "
        "are several."
    )
    yield Plot("pareto", svg, caption)


def _floor_levels(record: Record, one: Pass) -> dict[str, float]:
    """Another attention backend's PSNR. The next seed's is off every useful scale."""
    floor = next((floor for floor in one.floors if floor.floor == "attention"), None)
    values = metric_rows(floor, "psnr_db", record.parameters) if floor else {}
    mean = summarize(values).mean if values else None
    return {FLOOR_NAMES["attention"]: mean.value} if mean else {}


def _worst(record: Record, folder: Path) -> Iterator[Block]:
    found = worst_pictures(record)
    if not found:
        return
    yield Notes(
        [
            "The worst picture of every variant by SSIM, worst first: BF16, the variant, and where "
            "they differ. " + HEAT_RULE
        ]
    )
    for variant, case in found:
        request = first_pictures(variant)[case]
        prompt = record.parameters.prompts[case[0]]
        text = f"{variant.name}: {quality_text(request.quality)}; {prompt}"
        yield Picture(request.picture, draw_difference(record, variant, case, folder), text)


def _comparisons(record: Record, folder: Path) -> Iterator[Block]:
    yield Notes([f"The same prompt and seed, drawn by every variant. {HEAT_RULE}"])
    for prompt in grid_prompts(record):
        grid = draw_grid(record, prompt, folder)
        grid.save(folder / grid_name(prompt), optimize=True)
        yield Picture(grid_name(prompt), as_webp(grid), record.parameters.prompts[prompt])


def _stages(record: Record) -> Iterator[Block]:
    for one, size in _passes_and_sizes(record):
        best = {row.name for row in rows(record, one, size) if row.is_best}
        bars = []
        for variant in one.variants:
            parts = {stage: s * 1000 for stage, s in stage_means_s(variant, size).items()}
            if parts:
                end = f"{sum(parts.values()):.0f} ms"
                bars.append(Bar(variant.name, parts, end, variant.name in best))
        if bars:
            title = f"Pass {one.name}, {size}: where the time goes"
            yield Plot(f"stages-{one.name}-{size}", stacked_bars(bars, "ms", title), title)
        yield stage_table(one, size)
    yield Notes(
        [
            "Means in milliseconds. `outside` is the rest of the latency: HTTP, base64, the "
            "client. `load` is the time from starting the process to its first health."
        ]
    )


def _load(record: Record) -> Iterator[Block]:
    for one in record.passes:
        yield from _load_plots(one)
        if table := load_table(one):
            yield table


def _load_plots(one: Pass) -> Iterator[Block]:
    sizes = dict.fromkeys(load.size for variant in one.variants for load in variant.load)
    for size in sizes:
        closed, opened = [], []
        for variant in one.variants:
            tests = [load for load in variant.load if load.size == size]
            by_clients = [(float(t.concurrency), images_per_s(t)) for t in tests if t.concurrency]
            by_rate = [
                (t.rate_per_s, good)
                for t in tests
                if t.rate_per_s and (good := goodput_per_s(t)) is not None
            ]
            closed += [Curve(variant.name, sorted(by_clients))] if by_clients else []
            opened += [Curve(variant.name, sorted(by_rate))] if by_rate else []
        where = f"Pass {one.name}, {size}"
        if closed:
            title = f"{where}: throughput against concurrent requests"
            svg = curves(closed, "requests at a time", "images per second", title)
            yield Plot(f"throughput-{one.name}-{size}", svg, title)
        if opened:
            title = f"{where}: answers in time against Poisson arrivals"
            svg = curves(
                opened, "requests per second", "answers in time per second", title,
                diagonal="all in time",
            )  # fmt: skip
            yield Plot(f"goodput-{one.name}-{size}", svg, title)


def _power(record: Record) -> Iterator[Block]:
    for one, size in _passes_and_sizes(record):
        if table := power_table(one, size):
            yield Notes([f"Pass {one.name}, {size}."])
            yield table


def _guidance(record: Record) -> Iterator[Block]:
    for one in record.passes:
        if table := guidance_table(one):
            yield table
