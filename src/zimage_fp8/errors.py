"""Every error a user can meet, and the exit code it ends the command line with.

    ZImageError            1   something failed: a file, a model, a machine
    ├── UsageError         2   the request itself is wrong: an unknown policy, a bad size
    ├── ModelError         1   the model folder is not a Z-Image pipeline, or parts are missing
    ├── CheckpointError    1   tensors are missing, unexpected, mis-shaped, mis-typed or damaged
    └── OutOfMemory        1   the device has not enough memory left for this picture

Every message names the value, what was expected and what to do.
"""

from collections.abc import Sequence


class ZImageError(Exception):
    """A failure a person can act on. `hint`, when given, is the next thing to try."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ZImageError):
    """The request is wrong. `param` names the offending field or option."""

    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class ModelError(ZImageError):
    """The folder is not a model this program can run."""


class OutOfMemory(ZImageError):
    """A picture does not fit into the device's memory; smaller ones may."""


class CheckpointError(ZImageError):
    """A checkpoint is damaged or does not match its model; `problems` lists everything found."""

    def __init__(self, where: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        shown = [f"  - {problem}" for problem in problems[:20]]
        if len(problems) > 20:
            shown.append(f"  … and {len(problems) - 20} more")
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(f"{where}: {count}\n" + "\n".join(shown), hint=hint)
        self.problems = list(problems)
