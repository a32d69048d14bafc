"""Safetensors folders: read strictly, write one tensor at a time and always the same bytes.

Reading uses the safetensors library (on the way to a GPU, `staging`). Writing does not: the library
keeps metadata in a hash map, so two runs may write different bytes, and it wants all tensors of a
shard in memory at once. The format is small enough to stream: 8 bytes of header length, a JSON
header, the tensors.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zimage_fp8.checkpoint.staging import Staging
from zimage_fp8.errors import CheckpointError, ModelError
from zimage_fp8.layout import Shape

INDEX_SUFFIX = ".safetensors.index.json"
SCALE_SUFFIXES = (".weight_scale", ".input_scale")
FINGERPRINT_BYTES = 256
CPU = torch.device("cpu")

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it; dtype is safetensors' name for it."""

    dtype: str
    shape: Shape

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


class ShardReader:
    """All tensors of one folder of safetensors files, whatever the number of shards.

    Opening reads headers only and raises CheckpointError with everything wrong with them: files
    the index names that are missing, truncated files, tensors in two shards or not where the
    index says. Use as a context manager.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _shard_files(folder)
        self.infos: dict[str, TensorInfo] = {}
        self.shard_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._places: dict[str, tuple[int, dict[str, int]]] = {}
        self._staging: dict[torch.device, Staging] = {}
        problems = [problem for name in self.files for problem in self._read_header(name)]
        problems += _index_problems(folder, self.shard_of)
        if problems:
            self._stack.close()
            raise CheckpointError(str(folder), problems, hint="download or copy the files again")

    def _read_header(self, name: str) -> list[str]:
        try:
            handle = self._stack.enter_context(
                safe_open(str(self.folder / name), framework="pt", device="cpu")
            )
        except (SafetensorError, OSError) as error:
            return [f"{name}: cannot be read ({error})"]
        problems = []
        for tensor in handle.keys():
            if tensor in self.shard_of:
                problems.append(f"{tensor}: in both {self.shard_of[tensor]} and {name}")
            view = handle.get_slice(tensor)
            self.infos[tensor] = TensorInfo(view.get_dtype(), tuple(view.get_shape()))
            self.shard_of[tensor] = name
            if view.get_dtype() not in DTYPES:
                problems.append(f"{tensor}: dtype {view.get_dtype()} is not supported")
        self._open[name] = handle
        return problems

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """One tensor in its dtype on disk. On the CPU it is a view of the file's pages.

        On a GPU the bytes arrive through pinned memory, in the order of the current stream. Raises
        CheckpointError when the file cannot be read to the tensor's end.
        """
        if device.type == "cpu":
            view: Tensor = self._open[self.shard_of[name]].get_tensor(name)
            return view
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype], device=device)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor of the stored shape and dtype, on any device, by way of
        `staging`. Raises CheckpointError when the file cannot be read to the tensor's end."""
        shard = self.shard_of[name]
        if shard not in self._places:
            file = os.open(self.folder / shard, os.O_RDONLY)
            self._stack.callback(os.close, file)
            self._places[shard] = (file, _data_offsets(file))
        if tensor.device not in self._staging:
            self._staging[tensor.device] = Staging(tensor.device)
            self._stack.callback(self._staging[tensor.device].close)
        file, offsets = self._places[shard]
        try:
            flat = tensor.reshape(-1).view(torch.uint8)
            self._staging[tensor.device].copy(file, offsets[name], flat)
        except OSError as error:
            raise CheckpointError(
                str(self.folder),
                [f"{shard}: {name} cannot be read ({error})"],
                hint="download or copy the files again",
            ) from error

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """(file name, its tensors) for every shard, in order."""
        for file in self.files:
            yield file, [name for name, home in self.shard_of.items() if home == file]

    def fingerprint(self) -> str:
        """A hash over every tensor's name, type, shape and first bytes: cheap at any size, and
        different for training and merging, which move the first row of some weight."""
        digest = hashlib.sha256()
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            view = self._open[self.shard_of[name]].get_slice(name)
            first = self.read(name) if not info.shape else view[:1]
            digest.update(raw_bytes(first)[:FINGERPRINT_BYTES])
        return digest.hexdigest()


def _data_offsets(file: int) -> dict[str, int]:
    """Where every tensor of an open safetensors file starts; the library has checked the header."""
    (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
    header = json.loads(os.pread(file, length, 8))
    start = 8 + length
    return {
        name: start + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _shard_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing", hint="expected a diffusers model folder")
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise ModelError(f"{folder} has {len(indexes)} index files, expected one")
    if indexes:
        return sorted(set(_weight_map(indexes[0]).values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(
            f"{folder} holds {len(files)} .safetensors files and no index; "
            "expected one file, or shards with an index"
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index: {error}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index} is not a safetensors index: it names {file!r} as a file")
    return dict(weight_map)


def _index_problems(folder: Path, shard_of: Mapping[str, str]) -> list[str]:
    problems = []
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        listed = _weight_map(index)
        for name in sorted(set(listed) | set(shard_of)):
            where, found = listed.get(name), shard_of.get(name)
            if where != found:
                problems.append(
                    f"{name}: the index says {where or 'nothing'}, found in {found or 'no shard'}"
                )
    return problems


def write_shard(
    path: Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, asking `produce` for one tensor at a time.

    Tensors lie in order of falling alignment, then name, as the library lays them out. The bytes
    depend on the arguments alone. Raises ValueError when a produced tensor is not as announced.
    """
    order = sorted(infos, key=lambda name: (-DTYPES[infos[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        end = offset + infos[name].num_bytes
        header[name] = {
            "dtype": infos[name].dtype,
            "shape": list(infos[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in order:
            tensor = produce(name)
            if info_of(tensor) != infos[name]:
                raise ValueError(f"{name}: announced {infos[name]}, got {info_of(tensor)}")
            file.write(raw_bytes(tensor))
    os.chmod(path, 0o644)


def scale_problems(reader: ShardReader) -> dict[str, str]:
    """Scales that would turn every picture into noise: tensor name -> what is wrong with it."""
    problems = {}
    for name in reader.infos:
        if not name.endswith(SCALE_SUFFIXES):
            continue
        scale = reader.read(name).float()
        if not scale.isfinite().all():
            problems[name] = "is not finite"
        elif (scale <= 0).any():
            problems[name] = f"is {scale.min().item():g}, a scale must be positive"
    return problems


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index beside several shards."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it lies contiguous on the CPU."""
    flat: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data
