"""The models behind one server: which one a request means, and what /v1/models says of each."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from zimage_fp8.errors import ZImageError
from zimage_fp8.serve.jobs import Engine

JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class Model:
    """One engine under its name. facts: its self-description; card: its line in /v1/models."""

    name: str
    engine: Engine
    card: Mapping[str, object] = field(default_factory=dict)

    @property
    def policy(self) -> str:
        return self.engine.policy


class Catalog:
    """Models by name; the first one serves every name that is not among them."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}
        self.default = models[0]
        # Asked once: it runs git and reads package versions.
        self.facts = {
            model.name: JSON_OBJECT.validate_python(model.engine.describe()) for model in models
        }
        self._created = int(time.time())

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._models.values())
