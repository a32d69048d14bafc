"""doctor: what this machine can run."""

from zimage_fp8.cli.options import Json
from zimage_fp8.terminal import emit


def doctor(as_json: Json = False) -> None:
    """Say what this machine can run, and why not the rest."""
    from zimage_fp8 import doctor as verb

    report = verb.examine()
    emit(report if as_json else verb.render(report), as_json)
