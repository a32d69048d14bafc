"""What `verify` works on and what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zimage_fp8.checkpoint.dialects import StoredQuantization
from zimage_fp8.checkpoint.provenance import stated_method
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.quant.method import Method
from zimage_fp8.quant.policy import Plan


@dataclass(frozen=True)
class Finding:
    """One thing wrong. An error corrupts pictures somewhere; a warning costs quality or time."""

    level: Literal["error", "warning"]
    where: str
    message: str


@dataclass(frozen=True)
class OpenCheckpoint:
    """A quantized pipeline folder; linears: every linear layer's name -> [out, in]."""

    folder: Path
    reader: ShardReader
    stored: StoredQuantization
    config: Mapping[str, object]
    linears: Mapping[str, tuple[int, ...]]

    @property
    def plan(self) -> Plan:
        return self.stored.plan

    @property
    def method(self) -> Method:
        return stated_method(self.stored.facts)
