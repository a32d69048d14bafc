"""A small safetensors model in one file or in two, for tests of reading it."""

from pathlib import Path

import torch

from zimage_fp8.checkpoint.shards import info_of, write_index, write_shard

TENSORS = {
    "b.scale": torch.tensor(0.5),
    "a.weight": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "c.bias": torch.randn(7).to(torch.bfloat16),
    "d.odd": torch.randn(1, 3, 1),
    "e.empty": torch.empty(0, 4, dtype=torch.bfloat16),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    infos = {name: info_of(tensor) for name, tensor in tensors.items()}
    write_shard(path, infos, tensors.__getitem__, {"format": "pt", "z": "1", "a": "2"})


def sharded(folder: Path) -> Path:
    folder.mkdir()
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:])):
        write(folder / f"m-{number}.safetensors", {n: TENSORS[n] for n in part})
    weight_map = {n: f"m-{0 if n in names[:2] else 1}.safetensors" for n in names}
    write_index(folder, "m", weight_map, 99)
    return folder
