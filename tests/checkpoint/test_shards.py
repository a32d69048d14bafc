"""Safetensors folders: what is written is read back, and damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare import same_bits
from shard_files import TENSORS, sharded, write
from zimage_fp8.checkpoint.shards import ShardReader, info_of, write_shard
from zimage_fp8.errors import CheckpointError, ModelError


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", TENSORS)
    back = load_file(tmp_path / "m.safetensors")
    assert set(back) == set(TENSORS)
    for name, tensor in TENSORS.items():
        same_bits(back[name], tensor)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", TENSORS)
    write(tmp_path / "two", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", TENSORS)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    infos = {"x": info_of(torch.zeros(2))}
    with pytest.raises(ValueError, match="announced"):
        write_shard(tmp_path / "m", infos, lambda _: torch.zeros(3), {})


def test_shards_read_as_one(tmp_path: Path) -> None:
    with ShardReader(sharded(tmp_path / "s")) as reader:
        assert set(reader.infos) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.infos[name] == info_of(tensor)
            same_bits(reader.read(name), tensor)
        assert [sorted(names) for _, names in reader.shards()] == [
            ["a.weight", "b.scale"],
            ["c.bias", "d.odd", "e.empty"],
        ]


def truncate(folder: Path) -> None:
    path = folder / "m-1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def remove(folder: Path) -> None:
    (folder / "m-1.safetensors").unlink()


def duplicate(folder: Path) -> None:
    save_file({"b.scale": torch.zeros(1), "c.bias": torch.zeros(1)}, folder / "m-1.safetensors")


def garbage(folder: Path) -> None:
    (folder / "m-0.safetensors").write_bytes(b"\x00" * 4)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "m-1.safetensors: cannot be read"),
        (remove, "m-1.safetensors: cannot be read"),
        (duplicate, "b.scale: in both m-0.safetensors and m-1.safetensors"),
        (duplicate, "d.odd: the index says m-1.safetensors, found in no shard"),
        (garbage, "m-0.safetensors: cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    folder = sharded(tmp_path / "s")
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        ShardReader(folder)
    assert any(said in problem for problem in raised.value.problems), raised.value.problems


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        ShardReader(tmp_path / "none")
    with pytest.raises(ModelError, match="holds 0"):
        ShardReader(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ModelError, match="not a safetensors index"):
        ShardReader(tmp_path)


def test_the_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    prints = []
    for change in (0.0, 1.0):
        folder = tmp_path / str(change)
        folder.mkdir()
        tensor = torch.zeros(3, 64)
        tensor[0, 5] = change
        write(folder / "m.safetensors", {"x": tensor, "y": torch.zeros(())})
        with ShardReader(folder) as reader:
            prints.append(reader.fingerprint())
    assert prints[0] != prints[1]
