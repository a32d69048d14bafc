"""Every number in a report is the record's."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest
from PIL import Image

from fake_record import (
    BROKEN,
    NUMBERS,
    PROMPTS,
    changed,
    make_record,
    make_rich_record,
    save_pictures,
)
from zimage_fp8.bench import grid
from zimage_fp8.bench.details import (
    latency_table,
    load_table,
    memory_table,
    quality_table,
    stage_table,
    strata_table,
    warnings_of,
)
from zimage_fp8.bench.grid import (
    draw_grid,
    font,
    grid_prompts,
    heat_map,
    worst_pictures,
    wrapped,
)
from zimage_fp8.bench.notes import notes, parameter_table
from zimage_fp8.bench.record import Flag, Quality, Record, VariantRecord, read_record, write_record
from zimage_fp8.bench.report import is_alone, write_report
from zimage_fp8.bench.summary import first_pictures
from zimage_fp8.bench.table import BEST, Table, close_to_best, main_table, rows
from zimage_fp8.errors import ZImageError


def table_rows(markdown: str) -> dict[str, list[str]]:
    """policy -> the cells of its first row in a markdown text."""
    found: dict[str, list[str]] = {}
    for line in markdown.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("| ").split(" | ")]
        found.setdefault(cells[0].removesuffix(BEST).strip(), cells)
    return found


@pytest.mark.parametrize("policy", NUMBERS)
def test_the_table_is_the_record(policy: str) -> None:
    latencies, gib, psnr_db, ssim = NUMBERS[policy]
    mean = sum(latencies) / 2
    expected = [
        f"{mean:.3f}",
        f"{8 / mean:.2f}",
        f"{gib:.2f}",
        f"{mean / 1.1 - 1:+.1%}",
        f"{1 - gib / 20:+.1%}",
        "ref" if policy == "bf16_base" else f"{psnr_db:.2f}",
        "ref" if policy == "bf16_base" else f"{ssim:.4f}",
    ]
    assert table_rows(main_table(make_record()).markdown())[policy][1:] == expected


def test_the_star_is_the_least_latency_times_memory() -> None:
    assert [row.policy for row in rows(make_record()) if row.is_best] == ["online_fp8"]


def test_a_variant_that_ruins_pictures_gets_no_star() -> None:
    record = make_record()
    ruined = [
        request.model_copy(update={"quality": request.quality.model_copy(update={"ssim": 0.3})})
        for request in record.variants[1].requests
        if request.quality
    ]
    record = changed(record, "online_fp8", requests=ruined)
    assert [row.policy for row in rows(record) if row.is_best] == ["full"]


def test_the_reference_gets_the_star_when_nothing_beats_it() -> None:
    record = make_record()
    for policy in NUMBERS:
        if policy != "bf16_base":
            record = changed(record, policy, peak_memory_bytes={"nvml_process": 10**12})
    assert rows(record)[0].is_best


def test_an_uncertain_star_says_so() -> None:
    record = make_record()
    assert close_to_best(record) == []
    slower = [r.model_copy(update={"latency_s": 0.65}) for r in record.variants[2].requests]
    uncertain = changed(record, "full", requests=slower)
    assert close_to_best(uncertain) == ["full"]
    assert any("The star is not certain" in note for note in notes(uncertain))


def test_a_cpu_is_not_flattered() -> None:
    on_cpu = " ".join(notes(make_record(on_gpu=False, is_test_model=True)))
    assert "emulated" in on_cpu
    assert "test model" in on_cpu
    assert "peak resident main memory" in on_cpu
    assert "Peak RSS" in main_table(make_record(on_gpu=False)).markdown()
    assert "emulated" not in " ".join(notes(make_record()))


@pytest.mark.parametrize(
    ("psnrs_db", "cell"),
    [
        ((float("inf"), float("inf")), "identical"),
        ((float("inf"), 30.5), "30.50 (1 of 2 identical)"),
    ],
)
def test_identical_is_said_of_pictures_and_not_of_a_variant(
    psnrs_db: tuple[float, float], cell: str
) -> None:
    record = make_record()
    requests = [
        request.model_copy(update={"quality": Quality(psnr_db=psnr_db, ssim=1.0)})
        for request, psnr_db in zip(record.variants[1].requests, psnrs_db, strict=True)
    ]
    table = main_table(changed(record, "online_fp8", requests=requests)).markdown()
    assert table_rows(table)["online_fp8"][6] == cell


def test_no_change_has_no_minus() -> None:
    record = make_record()
    almost = [r.model_copy(update={"latency_s": 1.09999}) for r in record.variants[1].requests]
    table = main_table(changed(record, "online_fp8", requests=almost)).markdown()
    assert table_rows(table)["online_fp8"][4] == "+0.0%"


def test_a_report_is_rendered_again_from_the_record_alone(tmp_path: Path) -> None:
    record = make_record()
    save_pictures(record, tmp_path)
    write_record(record, tmp_path / "record.json")
    first = write_report(record, tmp_path).read_text()
    assert write_report(read_record(tmp_path / "record.json"), tmp_path).read_text() == first
    assert {path.name for path in tmp_path.glob("comparison-*")} == {
        "comparison-prompt0.png",
        "comparison-prompt1.png",
    }


def test_a_record_that_came_alone_is_reported_without_comparisons(tmp_path: Path) -> None:
    record = make_record()
    text = write_report(record, tmp_path).read_text()
    assert "> **Warning.** The pictures of this run are not beside its record" in text
    assert "## Comparisons" not in text
    assert "## Worst pictures" not in text
    assert "comparison-prompt" not in text
    save_pictures(record, tmp_path)
    text = write_report(record, tmp_path).read_text()
    assert "not beside its record" not in text
    assert "## Comparisons" in text


def test_a_run_that_drew_nothing_misses_no_pictures(tmp_path: Path) -> None:
    record = make_record()
    nothing = [one.model_copy(update={"variants": []}) for one in record.passes]
    assert is_alone(record, tmp_path)
    assert not is_alone(record.model_copy(update={"passes": nothing}), tmp_path)


def test_a_picture_that_is_missing_among_others_is_an_error(tmp_path: Path) -> None:
    record = make_record()
    save_pictures(record, tmp_path)
    next(tmp_path.rglob("*.png")).unlink()
    with pytest.raises(ZImageError, match="cannot read the picture"):
        write_report(record, tmp_path)


def test_a_grid_shows_every_picture_pixel_for_pixel(tmp_path: Path) -> None:
    record = make_record()
    save_pictures(record, tmp_path)
    page = draw_grid(record, 1, tmp_path).tobytes()
    for variant in record.variants:
        with Image.open(tmp_path / variant.requests[1].picture) as picture:
            first_line = picture.crop((8, 16, 56, 17)).tobytes()
        assert first_line in page


LONG = "a red fox in deep snow looks at the moon " * 5
CHINESE = "一只红色的狐狸在雪地里看着月亮，" * 6


@pytest.mark.parametrize("text", [LONG, CHINESE, "", "x" * 300])
def test_titles_fit_whatever_their_script(text: str) -> None:
    face = font(23, bold=True)
    lines = wrapped(text, face, 500)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(face.getlength(line) <= 500 for line in lines)


def test_a_title_without_letters_for_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a row of boxes. The report has the prompt as text below."""
    monkeypatch.setattr(grid, "WIDE_FONTS", ())
    drawn: list[str] = []
    monkeypatch.setattr(grid, "_draw_title", lambda draw, face, lines, facts: drawn.extend(lines))
    record = make_record()
    save_pictures(record, tmp_path)
    for prompts in ([CHINESE, "b"], ["café × 2", "b"]):
        update = {"prompts": prompts}
        parameters = record.parameters.model_copy(update=update)
        draw_grid(record.model_copy(update={"parameters": parameters}), 0, tmp_path)
    assert " ".join(drawn).startswith("Prompt 0, in a script that this machine has no letters for")
    assert drawn[-1] == "café × 2"


def test_a_heat_map_is_black_where_nothing_differs_and_bright_where_much_does() -> None:
    black = Image.new("RGB", (4, 2))
    other = black.copy()
    other.putpixel((1, 0), (64, 64, 64))
    other.putpixel((2, 0), (16, 16, 16))
    heat = heat_map(other, black)
    assert heat.getpixel((0, 0)) == (0, 0, 4)
    assert heat.getpixel((1, 0)) == (252, 255, 164)
    assert heat.getpixel((2, 0)) == (87, 16, 110)  # a quarter of the scale is its second colour


def test_pictures_of_two_sizes_have_no_difference() -> None:
    with pytest.raises(ZImageError, match=r"\(2, 4, 3\), its reference \(4, 2, 3\)"):
        heat_map(Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4)))


def test_worst_pictures_first() -> None:
    record = make_rich_record()
    found = worst_pictures(record)
    first = [first_pictures(variant).values() for variant, _ in found]
    ssims = [min(r.quality.ssim for r in rows if r.quality) for rows in first]
    assert ssims == sorted(ssims)
    assert [v.name for v, _ in found].count("bf16_base") == 0
    assert len(found) == len(record.variants) - 1
    assert len(worst_pictures(record, 2)) == 2


def test_of_many_prompts_every_kind_is_shown() -> None:
    record = make_record()
    assert grid_prompts(record) == [0, 1]
    many = record.parameters.model_copy(
        update={
            "prompts": [f"prompt {index}" for index in range(40)],
            "strata": ["people"] * 20 + ["text"] * 20,
            "seeds": list(range(40)),
        }
    )
    shown = grid_prompts(record.model_copy(update={"parameters": many}))
    assert len(shown) == 8
    assert {0, 20} <= set(shown)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    record, folder = make_rich_record(), tmp_path_factory.mktemp("rich")
    save_pictures(record, folder)
    write_report(record, folder)
    return record, folder


def test_the_page_needs_nothing_from_elsewhere(rich: tuple[Record, Path]) -> None:
    page = (rich[1] / "report.html").read_text()
    assert "<script" not in page
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>) ]+)""", page))
    assert addresses
    assert all(one.startswith(("data:image/webp;base64,", "#")) for one in addresses)
    assert "prefers-color-scheme:dark" in page


def test_the_page_is_well_formed(rich: tuple[Record, Path]) -> None:
    """Every tag that opens closes: a caption with `<` or a quote would break it."""

    class Balance(HTMLParser):
        open: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            """Of SVG: closed already."""

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed((rich[1] / "report.html").read_text())
    assert parser.open == []


def test_prompts_cannot_break_the_page(tmp_path: Path) -> None:
    record = make_record()
    parameters = record.parameters.model_copy(update={"prompts": ["<b>\"'&", "</svg>|`x`"]})
    record = record.model_copy(update={"parameters": parameters})
    save_pictures(record, tmp_path)
    write_report(record, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&quot;&#x27;&amp;" in page


def test_page_and_markdown_hold_the_same_tables(rich: tuple[Record, Path]) -> None:
    record, folder = rich
    page, markdown = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    for one in record.passes:
        for size in record.parameters.sizes:
            for row in rows(record, one, size):
                assert f"| {row.latency_s:.3f} |" in markdown
                assert f"<td>{row.latency_s:.3f}</td>" in page
    for title in ("How sure", "Worst pictures", "Under load", "Energy and clocks", "Guidance"):
        assert f"## {title}" in markdown
        assert f">{title}</h2>" in page


def test_everything_that_markdown_shows_lies_beside_it(rich: tuple[Record, Path]) -> None:
    record, folder = rich
    shown = re.findall(r"!\[[^\]]*\]\(<?([^)>]+)>?\)", (folder / "report.md").read_text())
    assert [one for one in shown if not (folder / one).is_file()] == []
    plots = {Path(one).stem for one in shown if one.startswith("plots/")}
    size = record.parameters.size
    assert {"pareto", f"stages-A-{size}", f"throughput-A-{size}", f"goodput-B-{size}"} <= plots


def test_plots_are_files_of_their_own(rich: tuple[Record, Path]) -> None:
    for path in (rich[1] / "plots").iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme" in path.read_text()


def test_warnings_and_failures_are_said_first(rich: tuple[Record, Path]) -> None:
    record, folder = rich
    before, _, after = (folder / "report.md").read_text().partition("| Variant |")
    assert "Another program used 12 % of the GPU." in before
    assert f"Pass A, {BROKEN} failed: the server ended with exit code 1" in before
    assert f"| {BROKEN} | failed: the server ended" in after
    assert "Pass A, online_fp8: Latency fell by 3.0 %" in list(warnings_of(record))[1]


def test_what_is_true_of_many_variants_is_said_once() -> None:
    flag = Flag(kind="unsettled", text="Still changing.")
    (one,) = make_record().passes
    variants = [variant.model_copy(update={"flags": [flag]}) for variant in one.variants[:3]]
    passes = [one.model_copy(update={"variants": variants})]
    record = make_record().model_copy(update={"passes": passes})
    assert list(warnings_of(record)) == ["bf16_base, online_fp8, full: Still changing."]


def cells_of(table: Table | None, name: str) -> dict[str, str]:
    assert table
    row = next(row for row in table.body if row[0] == name)
    return dict(zip(table.header, row, strict=True))


def test_latency_has_intervals_and_a_verdict() -> None:
    record = make_rich_record()
    table = latency_table(record.passes[0], record.parameters.size)
    assert cells_of(table, "bf16_base")["Verdict"] == "ref"
    assert cells_of(table, "online_fp8")["Verdict"] == "faster"
    assert cells_of(table, "attn-out-only")["Verdict"] == "slower"
    assert cells_of(table, "ffn-attn-out")["Verdict"] == "not distinguishable"
    cell = cells_of(table, "online_fp8")["p50 (s)"]
    value, low, high = map(float, re.findall(r"\d+\.\d+", cell))
    assert low <= value <= high


def test_quality_is_compared_with_a_rival_and_has_its_floors() -> None:
    record = make_rich_record()
    table = quality_table(record, record.passes[0])
    assert cells_of(table, "online_fp8")["Verdict"] == "compared with"
    assert cells_of(table, "attn-out-only")["Verdict"] == "closer"
    assert cells_of(table, "full")["Verdict"] == "not distinguishable"
    assert cells_of(table, "attn-out-only")["win / tie / loss"] == "16 / 0 / 0"
    assert cells_of(table, "noise floor: BF16 again")["PSNR mean (dB)"] == "identical"
    assert cells_of(table, "noise floor: BF16, another attention")["Verdict"] == ""
    assert "LPIPS" in (table.header if table else [])


def test_strata_stages_memory_and_load_have_their_tables() -> None:
    record = make_rich_record()
    main, size = record.passes[0], record.parameters.size
    strata = strata_table(record, main)
    assert strata
    assert strata.header[1:] == ["people", "scenes", "counting", "chinese text"]
    assert cells_of(stage_table(main, size), "full")["decode"] == "100"
    memory = cells_of(memory_table(main), "full")
    assert memory["Peak GPU, NVML (GiB)"] == "14.00 (load 11.00, steady 14.00)"
    assert memory["Peak GPU, torch allocated (GiB)"] == "12.00"
    load = load_table(main)
    assert load
    closed = next(row for row in load.body if row[:3] == ["full", size, "1 at a time"])
    assert closed[3] == "1.25"  # 16 pictures in 16 × 0.8 s
    assert any("2 × 429 overloaded" in row[-1] for row in load.body)


def test_without_quality_the_columns_say_why() -> None:
    record = make_record()

    def blind(variant: VariantRecord) -> VariantRecord:
        rows = [row.model_copy(update={"quality": None}) for row in variant.requests]
        return variant.model_copy(update={"requests": rows})

    (main,) = record.passes
    main = main.model_copy(update={"variants": [blind(variant) for variant in main.variants]})
    record = record.model_copy(update={"passes": [main], "no_quality": "random weights"})
    cells = cells_of(main_table(record), "full")
    assert cells["PSNR vs BF16 (dB)"] == cells["SSIM vs BF16"] == "n/a: random weights"
    assert quality_table(record, main) is None
    assert "Pictures were not compared: random weights." in list(notes(record))


def test_a_pass_whose_variants_all_failed_is_a_table_of_errors() -> None:
    record = make_rich_record()
    empty = record.passes[0].model_copy(update={"variants": [], "floors": []})
    assert [row[1] for row in main_table(record, empty).body] == [
        "failed: the server ended with exit code 1"
    ]


def test_parameters_state_profile_sigmas_and_attention() -> None:
    facts = dict(parameter_table(make_rich_record()).body)
    assert facts["Profile"] == "standard, digest ffeeddccbbaa9988"
    assert facts["Sigmas"].startswith("1, 0.875")
    assert facts["Attention"] == "torch, asked for as SAGE_ATTN"
    assert facts["Warm-up images per variant"].startswith("1 at least, until two medians agree")
    assert dict(parameter_table(make_record()).body)["Prompts"] == "<br>".join(PROMPTS)


def test_one_server_without_reference_or_memory_has_a_report_too(tmp_path: Path) -> None:
    record = make_record()
    (main,) = record.passes
    theirs = main.variants[1].model_copy(
        update={
            "name": "theirs",
            "policy": "unknown",
            "engine": "other",
            "server": {},
            "attention": None,
            "peak_memory_bytes": {},
            "load_s": None,
            "cold_start_s": None,
            "sigmas": [],
            "requests": [
                row.model_copy(update={"quality": None, "nfe": None, "timings_s": {}})
                for row in main.variants[1].requests
            ],
        }
    )
    main = main.model_copy(update={"variants": [theirs]})
    changes = {"passes": [main], "no_quality": "no reference was measured"}
    record = Record.model_validate(record.model_copy(update=changes).model_dump())
    save_pictures(record, tmp_path)
    report = write_report(record, tmp_path).read_text()
    cells = table_rows(report)["theirs"]
    assert cells == [
        "theirs ★", "0.650", "12.31", "n/a", "n/a", "n/a",
        "n/a: no reference was measured", "n/a: no reference was measured",
    ]  # fmt: skip
    assert "The servers do not tell how many forwards a picture took" in report
    assert "Attention backend: not told." in report
    assert "## Worst pictures" not in report
