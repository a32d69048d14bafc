"""What one card is about, and what its repository is called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.bench.facts import CheckpointFacts
from zimage_fp8.bench.notes import hardware
from zimage_fp8.bench.record import Record, VariantRecord
from zimage_fp8.bench.table import Row, rows
from zimage_fp8.checkpoint.own_format import METHOD as OWN_METHOD

UPSTREAM = "Tongyi-MAI/Z-Image-Turbo"
EMBEDDED = "nano"
OWN_ENGINE = "zimage-fp8"


@dataclass(frozen=True)
class Card:
    """Everything one README is made of. `folder` is the checkpoint that it is written into."""

    folder: Path
    facts: CheckpointFacts
    record: Record
    family: Sequence[str]
    namespace: str

    @property
    def policy(self) -> str:
        return self.facts.policy

    @property
    def readme(self) -> Path:
        return self.folder / "README.md"

    @property
    def is_own_format(self) -> bool:
        """Whether this program alone reads it; else it is ModelOpt's."""
        return self.facts.algorithm == OWN_METHOD

    @property
    def variant(self) -> VariantRecord:
        """As the main pass measured it, first of all on this program's own server."""
        found = [v for v in self.record.variants if v.policy == self.policy]
        return min(found, key=lambda variant: variant.engine != OWN_ENGINE)

    @property
    def row(self) -> Row:
        return next(row for row in rows(self.record) if row.name == self.variant.name)

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    @property
    def repository(self) -> str:
        return self.repository_of(self.policy)

    def repository_of(self, policy: str) -> str:
        """`full[0-14]` is a policy, but the Hub allows no brackets."""
        kind = "INT8" if policy.startswith("int8") else "FP8"
        base = self.record.model.rpartition("/")[2]
        suffix = re.sub(r"[^\w.]+", "-", policy.removeprefix("int8-"))
        return f"{self.namespace}/{base}-{kind}-{suffix.strip('-')}"

    @property
    def base_model(self) -> str:
        """As measured; only the embedded model has no home on the Hub but the namespace."""
        is_embedded = self.record.model == EMBEDDED
        return f"{self.namespace}/{EMBEDDED}" if is_embedded else self.record.model


def workload(record: Record) -> str:
    parameters = record.parameters
    size = f"{parameters.width}×{parameters.height}"
    return f"{parameters.steps} steps, {size}, on {hardware(record)}"


# Models whose licence this program knows: Apache 2.0, both of them.
ORIGINS = {
    UPSTREAM: f"Apache 2.0, inherited from upstream {UPSTREAM}.",
    EMBEDDED: "Apache 2.0. Trained on Fluent Emoji 3D pictures (Microsoft, MIT) with labels from "
    "emojibase-data (MIT).",
}
