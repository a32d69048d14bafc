"""Where the recipe reads and writes, and what it says while it works."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Workspace:
    """data: prepared pictures and tokenizer; weights: BF16 results; state: resumable training."""

    root: Path
    data: Path
    export: Path | None = None
    is_silent: bool = False  # all ranks but the first
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        folders = [self.data, self.weights, self.state, *([self.export] if self.export else [])]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def packages(self) -> Path:
        return self.root / "packages"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def begin_stage(self) -> None:
        self.started = time.monotonic()

    def age_s(self) -> float:
        return time.monotonic() - self.started

    def log(self, message: str) -> None:
        if self.is_silent:
            return
        line = f"[{self.age_s():7.1f}] {message}"
        print(line, flush=True)
        with (self.root / "log.txt").open("a") as file:
            file.write(line + "\n")

    def deliver(self, files: Iterable[Path]) -> None:
        """Copy a stage's results, and the log, to the export folder if there is one."""
        if self.export is None or self.is_silent:
            return
        for file in [*files, self.root / "log.txt"]:
            shutil.copyfile(file, self.export / file.name)
