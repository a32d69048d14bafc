"""bench report and bench compare: what records say, alone, together and against each other."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.cli.options import Json
from zimage_fp8.errors import UsageError
from zimage_fp8.terminal import emit

Records = Annotated[
    list[Path], typer.Argument(help="record.json of one run, or of several to be merged.")
]


def bench_report(
    records: Records,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, needed for several; else the record's own."),
    ] = None,
) -> None:
    """Render the report again: one page, Markdown, plots and comparison pictures.

    Several records of one workload become one report, and one record.json in --out.

    zimage-fp8 bench report results/record.json
    """
    from zimage_fp8.bench.compare import merge_records
    from zimage_fp8.bench.record import read_record, write_record
    from zimage_fp8.bench.report import write_report

    if out is None and len(records) > 1:
        raise UsageError("--out is missing: name a folder for the merged report", param="out")
    if out is None:
        record, folder = read_record(records[0]), records[0].parent
    else:
        record, folder = merge_records(records, out), out
        out.mkdir(parents=True, exist_ok=True)
        write_record(record, out / "record.json")
    report = write_report(record, folder)
    print(report, report.with_suffix(".html"), sep="\n")


def bench_compare(
    old: Annotated[Path, typer.Argument(help="The record.json to compare with.")],
    new: Annotated[Path, typer.Argument(help="The record.json that may be worse.")],
    as_json: Json = False,
) -> None:
    """Print what changed beyond noise from OLD to NEW.

    Exit code 0: nothing is worse; 1: something is; 2: the records cannot be compared.

    zimage-fp8 bench compare before/record.json after/record.json
    """
    from zimage_fp8.bench.compare import compare_records, comparison_text
    from zimage_fp8.bench.record import read_record

    changes = compare_records(read_record(old), read_record(new))
    emit(changes if as_json else comparison_text(changes), as_json)
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(1)
