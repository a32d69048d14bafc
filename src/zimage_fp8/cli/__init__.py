"""The command line. Each verb parses, calls the function of its name, and prints.

One module per verb, or two that belong together. Heavy imports happen inside the verbs, so that
`--help` answers at once. Data goes to stdout, everything else to stderr. Exit codes: 0 done,
1 failed, 2 the request was wrong.
"""

import signal
import sys
from typing import Annotated

import typer

from zimage_fp8 import __version__
from zimage_fp8.cli.bench import bench
from zimage_fp8.cli.card import card
from zimage_fp8.cli.doctor import doctor
from zimage_fp8.cli.generate import generate, inspect
from zimage_fp8.cli.options import app
from zimage_fp8.cli.quantize import quantize, verify
from zimage_fp8.cli.report import bench_compare, bench_report
from zimage_fp8.cli.sensitivity import sensitivity
from zimage_fp8.cli.serve import serve
from zimage_fp8.errors import ZImageError

__all__ = ["app", "main"]

# as --help lists them
for verb in (quantize, verify, sensitivity, generate, inspect, serve, bench, card, doctor):
    app.command()(verb)
app.command("bench report")(bench_report)
app.command("bench compare")(bench_compare)


def _version(value: bool) -> None:
    if value:
        print(f"zimage-fp8 {__version__}")
        raise typer.Exit


@app.callback()
def before_the_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """The options in front of every verb."""


def main() -> None:
    """Run the command line; our errors become one sentence and an exit code."""
    # Being asked to end must unwind like Ctrl-C does, so that half-written folders are removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        app()
    except ZImageError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
