"""Write a quantized checkpoint: shard by shard, one tensor in memory at a time, all or nothing."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from zimage_fp8.checkpoint.dialects import OWN_KEY, stored_infos, write_config
from zimage_fp8.checkpoint.shards import (
    ShardReader,
    TensorInfo,
    write_index,
    write_shard,
)
from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import (
    COMPONENTS,
    fused_name,
    linear_shapes,
    members_of,
    read_config,
    tensor_shapes,
)
from zimage_fp8.quant.calibrate import Calibration, write_calibration
from zimage_fp8.quant.fold import Factors, folded
from zimage_fp8.quant.linear import quantize_weight, weight_amax, weight_scales
from zimage_fp8.quant.policy import Plan

NO_CODES: Mapping[str, Tensor] = {}
CALIBRATION_FILE = "calibration.json"
SHARD_STEM = "diffusion_pytorch_model"
ROOT_FILES = ("model_index.json", "NOTICE", "calibration-prompts.txt")
COMPONENT_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja")

OnTensor = Callable[[int, int], None]  # (bytes of source read, bytes of source in all)


@dataclass
class WeightScales:
    """The weight scales of a model, its channel scales folded by `factors`: measured once, and
    shared by every policy that folds alike."""

    reader: ShardReader
    factors: Factors = field(default_factory=dict)
    _amax: dict[tuple[str, str, bool], Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A tensor of the unquantized model, folded, in its dtype on disk."""
        return folded(name, self.reader.read(name), self.factors)

    def scale(self, layer: str, plan: Plan) -> Tensor:
        """The weight scale of one linear: shared within its fused group when per tensor."""
        spec = plan.entries[layer].spec
        if spec is None:
            raise ValueError(f"{layer} is kept in BF16")
        members = members_of(fused_name(layer))
        keys = [(member, spec.weight, spec.rotate) for member in members]
        for member, key in zip(members, keys, strict=True):
            if key not in self._amax:
                weight = self.read(f"{member}.weight")
                found = weight_amax(weight, spec)
                if not found.isfinite().all():
                    raise ZImageError(f"{member}.weight of the source holds NaN or infinity")
                self._amax[key] = found
        amaxes = [self._amax[key] for key in keys]
        return weight_scales(amaxes, spec)[members.index(layer)]


def write_checkpoint(
    source: Path,
    plan: Plan,
    calibration: Calibration | None,
    facts: Mapping[str, object],
    out: Path,
    scales: WeightScales,
    on_tensor: OnTensor | None = None,
    *,
    headroom: float = 1.0,
    codes: Mapping[str, Tensor] = NO_CODES,
) -> None:
    """Write the pipeline folder `source`, its transformer quantized by `plan`, to `out`.

    The other components are hard-linked or copied. headroom: of static input scales. codes: of
    layers that are not to be rounded to nearest. Everything goes to a temporary folder beside
    `out` and is renamed when complete. The same input gives the same bytes.
    """
    with complete_or_nothing(out) as partial:
        bring_components(source, partial)
        if calibration is not None:
            write_calibration(calibration, partial / CALIBRATION_FILE)
        _write_transformer(
            source / "transformer",
            partial / "transformer",
            _Content(scales, plan, calibration, headroom, codes),
            facts,
            on_tensor,
        )


@contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds, and is removed when not."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise ZImageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@dataclass(frozen=True)
class _Content:
    """What each tensor of the new transformer is."""

    scales: WeightScales
    plan: Plan
    calibration: Calibration | None
    headroom: float
    codes: Mapping[str, Tensor]

    def produce(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        entry = self.plan.entries.get(layer)
        if entry is None or entry.spec is None:
            return self.scales.read(name)
        if leaf == "weight" and layer in self.codes:
            return self.codes[layer]
        if leaf == "weight":
            weight = self.scales.read(name)
            return quantize_weight(weight, self.scales.scale(layer, self.plan), entry.spec)
        if leaf == "weight_scale":
            return self.scales.scale(layer, self.plan)
        if leaf == "input_scale" and self.calibration is not None:
            factors = self.scales.factors
            return self.calibration.input_scale(layer, entry.spec, factors, self.headroom)
        return self.scales.read(name)


def _write_transformer(
    source: Path,
    out: Path,
    content: _Content,
    facts: Mapping[str, object],
    on_tensor: OnTensor | None,
) -> None:
    out.mkdir()
    config, raw = read_config(source)
    reader = content.scales.reader
    infos = new_infos(reader, content.plan, tensor_shapes(config))
    metadata = {"format": "pt", OWN_KEY: json.dumps(_short(content.plan, facts), sort_keys=True)}
    done, total = 0, sum(info.num_bytes for info in reader.infos.values())
    weight_map: dict[str, str] = {}

    def produce(name: str) -> Tensor:
        nonlocal done
        tensor = content.produce(name)
        if name in reader.infos:
            done += reader.infos[name].num_bytes
            if on_tensor is not None:
                on_tensor(done, total)
        return tensor

    for file, names in reader.shards():
        shard = {name: infos[name] for name in _with_scales(names, infos)}
        write_shard(out / file, shard, produce, metadata)
        weight_map |= dict.fromkeys(shard, file)
    if len(reader.files) > 1:
        write_index(out, SHARD_STEM, weight_map, sum(info.num_bytes for info in infos.values()))
    new_config = write_config(content.plan, raw, facts, linear_shapes(config))
    (out / "config.json").write_text(json.dumps(new_config, indent=2) + "\n")


def _short(plan: Plan, facts: Mapping[str, object]) -> dict[str, object]:
    """What a shard says of itself when it is found alone; config.json has the rest."""
    keys = ("version", "base_model", "base_fingerprint", "calibration_digest")
    return {"policy": plan.policy, **{key: facts[key] for key in keys if key in facts}}


def new_infos(
    reader: ShardReader, plan: Plan, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """Tensors of the quantized transformer; kept ones stay exactly as they are in the source."""
    infos = stored_infos(plan, shapes)
    return {
        name: reader.infos[name] if name in reader.infos and info.dtype == "BF16" else info
        for name, info in infos.items()
    }


def _with_scales(names: Iterable[str], infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name in names:
        yield name
        layer = name.removesuffix(".weight")
        for scale in (f"{layer}.weight_scale", f"{layer}.input_scale"):
            if layer != name and scale in infos:
                yield scale


def bring_components(source: Path, out: Path) -> None:
    """Everything but the transformer, as it is: weights hard-linked, small files copied.

    A copy of a configuration may be edited without changing the source; weights never are.
    """
    for name in ROOT_FILES:
        if (source / name).is_file():
            _copy(source / name, out / name)
    for part in COMPONENTS:
        if part == "transformer":
            continue
        folder = (source / part).resolve()
        for path in sorted(folder.rglob("*")):
            if path.suffix not in COMPONENT_SUFFIXES or not path.is_file():
                continue
            target = out / part / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                link_or_copy(path.resolve(), target)
            else:
                _copy(path, target)


def component_bytes(source: Path) -> int:
    """What the components weigh where they cannot be hard-linked."""
    parts = (source / part for part in COMPONENTS if part != "transformer")
    return sum(path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file())


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    os.chmod(target, 0o644)
