"""The progress bar of a benchmark, on stderr; in a log, one line per variant."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStage = Callable[[str, str], None]  # (policy, what it does now), before each piece of work


@contextmanager
def show_progress(num_pieces: int) -> Iterator[OnStage]:
    """A bar over `num_pieces` pieces of work; call the result when one begins."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("benchmark", total=num_pieces)
        begun = 0

        def on_stage(policy: str, stage: str) -> None:
            nonlocal begun
            if not console.is_terminal and stage == "starting":
                console.print(f"measuring {policy}", highlight=False)
            progress.update(bar, completed=begun, description=f"{policy:<14} {stage}")
            begun += 1

        yield on_stage
        progress.update(bar, completed=begun, description="done")
