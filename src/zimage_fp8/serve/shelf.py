"""Pictures that wait in memory to be fetched by URL, for a while and up to a size."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import URL, Headers

LIFETIME_S = 3600
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Kept:
    file: bytes
    expires: float


class Shelf:
    """Files under random names, which are their only protection: 192 bits, never listed.

    The oldest go when there are more than `max_bytes`, and every one after `lifetime_s`.
    """

    def __init__(
        self,
        lifetime_s: float = LIFETIME_S,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lifetime_s = lifetime_s
        self.max_bytes = max_bytes
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, file: bytes, output_format: str) -> str:
        """Keep `file`; returns its name, which ends in the format."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        with self._lock:
            self._kept[name] = _Kept(file, self._clock() + self.lifetime_s)
            self._make_room()
        return name

    def get(self, name: str) -> bytes | None:
        with self._lock:
            self._make_room()
            kept = self._kept.get(name)
        return kept.file if kept else None

    def _make_room(self) -> None:
        now = self._clock()
        size = sum(len(kept.file) for kept in self._kept.values())
        for name, kept in list(self._kept.items()):
            if kept.expires > now and size <= self.max_bytes:
                return
            del self._kept[name]
            size -= len(kept.file)


def public_base(url: URL, headers: Headers) -> str:
    """Scheme, host and prefix under which the client reaches us, behind a proxy too.

    A client that lies in these headers deceives itself: they appear in its own answer only.
    """
    scheme = _first(headers, "x-forwarded-proto") or url.scheme
    host = _first(headers, "x-forwarded-host") or url.netloc
    prefix = _first(headers, "x-forwarded-prefix").rstrip("/")
    return f"{scheme}://{host}{prefix}"


def _first(headers: Headers, name: str) -> str:
    return headers.get(name, "").partition(",")[0].strip()
