"""Pictures and labels from two npm packages, chosen by rules and packed into a few megabytes.

Which pictures: a file of `@lobehub/fluent-emoji-3d` is kept when emojibase knows its code, when the
slug of its label is a name in Microsoft's official set (as `@iconify-json/fluent-emoji` lists it),
and when it is no flag, symbol, clock face or skin tone. Country flags are not Microsoft's.
"""

import json
import re
import subprocess
import tarfile
from pathlib import Path

from recipes.nano.workspace import Workspace

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
LABELS = "emojibase-data@17.0.0"
OFFICIAL_NAMES = "@iconify-json/fluent-emoji@1.2.7"
EXCLUDED_GROUPS = {"component", "symbols", "flags"}
EXCLUDED_SUBGROUPS = {"time"}


def fetch(work: Workspace) -> None:
    """Write objects.json (name, code, group, tags, place in the pack) and pictures.bin."""
    pictures, labels, official = (
        _unpack(package, work.packages) for package in (PICTURES, LABELS, OFFICIAL_NAMES)
    )
    names = set(json.loads((official / "icons.json").read_text())["icons"])
    entries = _choose(pictures / "assets", _by_code(labels), names)
    objects, blob = [], b""
    for file, entry in entries:
        picture = file.read_bytes()
        objects.append(entry | {"offset": len(blob), "length": len(picture)})
        blob += picture
    (work.data / "pictures.bin").write_bytes(blob)
    (work.data / "objects.json").write_text(json.dumps(objects, indent=0))
    work.log(f"{len(objects)} objects, {len(blob) / 1e6:.1f} MB of pictures")


def _unpack(package: str, folder: Path) -> Path:
    name = package.rsplit("@", 1)[0].lstrip("@").replace("/", "-")
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        said = subprocess.run(
            ["npm", "pack", package, "--silent"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(folder / said.stdout.split()[-1]) as archive:
            archive.extractall(target, filter="data")
    return target / "package"


def _by_code(labels: Path) -> dict[str, dict[str, object]]:
    """emojibase's entries by code, without the variation selector, with group names filled in."""
    meta = json.loads((labels / "meta" / "groups.json").read_text())
    found = {}
    for entry in json.loads((labels / "en" / "data.json").read_text()):
        if "group" not in entry:
            continue  # regional indicators
        group, subgroup = (meta[key][str(entry[key[:-1]])] for key in ("groups", "subgroups"))
        if group in EXCLUDED_GROUPS or subgroup in EXCLUDED_SUBGROUPS:
            continue
        found[_code(entry["hexcode"])] = {
            "label": entry["label"].lower().replace("’", "'"),
            "group": group,
            "tags": entry.get("tags", []),
        }
    return found


def _choose(
    assets: Path, labels: dict[str, dict[str, object]], official: set[str]
) -> list[tuple[Path, dict[str, object]]]:
    chosen, taken = [], set()
    for file in sorted(assets.glob("*.webp")):
        code = _code(file.stem)
        label = labels.get(code)
        if label is None or _slug(str(label["label"])) not in official:
            continue
        name = _plain(str(label["label"]))
        if name in taken:
            continue  # one picture under two codes
        taken.add(name)
        tags = label["tags"]
        chosen.append((file, {"name": name, "code": code, "group": label["group"], "tags": tags}))
    return chosen


def _code(stem: str) -> str:
    return re.sub(r"-fe0f", "", stem.lower())


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.replace("'", "")).strip("-")


def _plain(label: str) -> str:
    """`woman: red hair` -> `woman with red hair`, `man: beard` -> `bearded man`."""
    if ": " not in label:
        return label
    who, what = label.split(": ", 1)
    adjective = {"bald": "bald", "beard": "bearded"}.get(what)
    return f"{adjective} {who}" if adjective else f"{who} with {what}"
