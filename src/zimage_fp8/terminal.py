"""What the command line puts on the terminal: results on stdout, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


def emit(value: object, as_json: bool) -> None:
    """Print a result: as one JSON document, or as the text it already is."""
    text = json.dumps(value, default=_plain, indent=2, ensure_ascii=False) if as_json else value
    sys.stdout.write(f"{text}\n")


def _plain(item: object) -> object:
    return asdict(item) if is_dataclass(item) and not isinstance(item, type) else str(item)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Bars with an estimate of what is left, one per stage; nothing where stderr is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
