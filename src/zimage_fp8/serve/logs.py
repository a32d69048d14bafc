"""The server's log on stderr, for people or as one JSON object per line, each with a request's id.

Prompts are written nowhere unless the operator asks for it.
"""

import json
import logging
import sys
import time
from contextvars import ContextVar

from zimage_fp8.errors import UsageError

FORMATS = ("human", "json")

# The request that the current task answers; empty outside of requests.
request_id: ContextVar[str] = ContextVar("request_id", default="")


def log_to_stderr(log_format: str) -> None:
    """Set the root logger up. Raises UsageError for an unknown format."""
    if log_format not in FORMATS:
        raise UsageError(
            f"--log-format {log_format!r}: expected one of {', '.join(FORMATS)}", param="log_format"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else HumanLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class HumanLines(logging.Formatter):
    """Time, level, message, and the request's id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        identity = request_id.get()
        return super().formatMessage(record) + (f" [{identity}]" if identity else "")


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message, request_id, exception, and a record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get() or None,
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
            **getattr(record, "facts", {}),
        }
        known = {name: value for name, value in facts.items() if value is not None}
        return json.dumps(known, ensure_ascii=False)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
