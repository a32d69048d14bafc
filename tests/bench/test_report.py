"""Every number in a report is the record's."""

from pathlib import Path

import pytest
from PIL import Image

from fake_record import NUMBERS, changed, make_record, save_pictures
from zimage_fp8.bench.grid import draw_grid
from zimage_fp8.bench.record import Quality, read_record, write_record
from zimage_fp8.bench.report import notes, render_report, write_report
from zimage_fp8.bench.table import BEST, close_to_best, rows


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
    assert table_rows(render_report(make_record(), ["a", "b"]))[policy][1:] == expected


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
    assert "Peak RSS" in render_report(make_record(on_gpu=False), ["a", "b"])
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
    report = render_report(changed(record, "online_fp8", requests=requests), ["a", "b"])
    assert table_rows(report)["online_fp8"][6] == cell


def test_no_change_has_no_minus() -> None:
    record = make_record()
    almost = [r.model_copy(update={"latency_s": 1.09999}) for r in record.variants[1].requests]
    report = render_report(changed(record, "online_fp8", requests=almost), ["a", "b"])
    assert table_rows(report)["online_fp8"][4] == "+0.0%"


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


def test_a_grid_shows_every_picture_pixel_for_pixel(tmp_path: Path) -> None:
    record = make_record()
    save_pictures(record, tmp_path)
    grid = draw_grid(record, 1, tmp_path).tobytes()
    for variant in record.variants:
        with Image.open(tmp_path / variant.requests[1].picture) as picture:
            first_line = picture.crop((8, 16, 56, 17)).tobytes()
        assert first_line in grid
