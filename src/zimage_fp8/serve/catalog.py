"""The models behind one server: which one a request means, and what /v1/models says of each."""

import time
from collections.abc import Iterator, Mapping

from pydantic import JsonValue, TypeAdapter
from starlette.exceptions import HTTPException

from zimage_fp8.serve.job import Engine

JSON_OBJECT = TypeAdapter(dict[str, JsonValue])
Card = Mapping[str, object]  # what else /v1/models tells of a model


class Catalog:
    """Engines by name. The first one also serves every name that is not among them.

    facts: the self-description of each engine, asked once: it runs git and reads package versions.
    """

    def __init__(
        self, engines: Mapping[str, Engine], cards: Mapping[str, Card] | None = None
    ) -> None:
        if not engines:
            raise ValueError("a server needs at least one engine")
        self.engines = dict(engines)
        self.default = next(iter(engines))
        self.facts = {
            name: JSON_OBJECT.validate_python(engine.describe()) for name, engine in engines.items()
        }
        self._cards = cards or {}
        self._created = int(time.time())

    def __iter__(self) -> Iterator[str]:
        return iter(self.engines)

    def name_for(self, asked: str | None) -> str:
        """The model that draws for somebody who asks for `asked`: clients hard-code names."""
        return asked if asked in self.engines else self.default

    def warning_for(self, asked: str | None) -> str | None:
        """What to tell who asks for another model, where there is a choice to get wrong."""
        if asked is None or asked in self.engines or len(self.engines) == 1:
            return None
        return f"model {asked[:60]!r} is not served here; {self.default!r} drew the picture"

    def cards(self) -> list[dict[str, object]]:
        return [self.card(name) for name in self]

    def card(self, name: str) -> dict[str, object]:
        """A line of /v1/models. Raises HTTPException 404."""
        engine = self.engines.get(name)
        if engine is None:
            raise HTTPException(404, f"no model {name[:60]!r} here, only {', '.join(self)}")
        width, height = engine.default_size
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "zimage-fp8",
            "policy": engine.policy,
            "default_size": f"{width}x{height}",
            **self._cards.get(name, {}),
        }
