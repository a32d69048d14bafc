"""Results of a scan, written after every unit: an interrupted run goes on where it ended."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zimage_fp8.errors import ZImageError
from zimage_fp8.evaluate import Difference
from zimage_fp8.provenance import commit, machine, versions

SCHEMA = 1


@dataclass
class Sensitivity:
    """Per unit the difference of every prompt's picture; `settings` says of what, and how."""

    settings: Mapping[str, object]
    units: dict[str, list[Difference]] = field(default_factory=dict)
    made_with: Mapping[str, object] = field(default_factory=dict)

    def mse(self, key: str) -> float:
        """Mean squared error of the pictures' 8-bit levels, over the prompts."""
        found = self.units[key]
        return sum(it.mse for it in found) / len(found)

    def latent_error(self, key: str) -> float:
        found = self.units[key]
        return sum(it.latent_error for it in found) / len(found)

    def of(self, scan: str) -> list[str]:
        """The measured units of a scan, in the order of the model."""
        return [key for key in self.units if key.partition(":")[0] == scan]

    def to_json(self) -> dict[str, object]:
        units = {key: [asdict(it) for it in found] for key, found in self.units.items()}
        return {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "made_with": dict(self.made_with),
            "units": units,
        }


def resume(file: Path, settings: Mapping[str, object]) -> Sensitivity:
    """What `file` holds, or nothing yet. Raises ZImageError when it belongs to something else."""
    if not file.exists():
        made_with = {"versions": versions(), "commit": commit(), "machine": machine()}
        return Sensitivity(settings, made_with=made_with)
    found = read(file)
    wanted = json.loads(json.dumps(settings))
    differing = [key for key in wanted if found.settings.get(key) != wanted[key]]
    if differing:
        raise ZImageError(
            f"{file} holds results made with another {', '.join(differing)}",
            hint="name another --out, or remove the file",
        )
    return found


def read(file: Path) -> Sensitivity:
    """Read what `write` wrote. Raises ZImageError naming what is wrong."""
    try:
        raw = json.loads(file.read_text())
        if raw["schema"] != SCHEMA:
            raise ZImageError(f"{file} is of schema {raw['schema']}, expected {SCHEMA}")
        units = {key: [Difference(**it) for it in found] for key, found in raw["units"].items()}
        return Sensitivity(raw["settings"], units, raw["made_with"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZImageError(f"{file} is not a file of sensitivities: {error}") from None


def write(found: Sensitivity, file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(json.dumps(found.to_json(), indent=1) + "\n")
        partial.replace(file)
    except OSError as error:
        raise ZImageError(f"cannot write {file}: {error.strerror}") from None
