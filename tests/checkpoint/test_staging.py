"""Bytes that travel through the staging buffer arrive whole, in order, or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compare import same_bits
from shard_files import TENSORS, sharded
from zimage_fp8.checkpoint import staging
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.staging import Staging
from zimage_fp8.errors import CheckpointError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DATA = torch.randint(0, 256, (50_001,), dtype=torch.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "bytes"
    path.write_bytes(DATA.numpy().tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """With a buffer of three small chunks, so that every chunk is used again and again."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(staging, "CHUNKS", 3)
    return torch.device(request.param)


@pytest.mark.parametrize("size", [0, 1, 1000, 3000, 3001, 49_000])
def test_every_byte_arrives_in_its_place(file: int, device: torch.device, size: int) -> None:
    through = Staging(device)
    for offset in (0, 1, 777):
        target = torch.zeros(size, dtype=torch.uint8, device=device)
        through.copy(file, offset, target)
        same_bits(target.cpu(), DATA[offset : offset + size])
    through.close()


def test_a_file_that_ends_early_is_an_error_and_the_next_copy_works(
    file: int, device: torch.device
) -> None:
    through = Staging(device)
    target = torch.zeros(5000, dtype=torch.uint8, device=device)
    with pytest.raises(OSError, match="ends before"):
        through.copy(file, len(DATA) - 2500, target)
    through.copy(file, 3, target)
    same_bits(target.cpu(), DATA[3:5003])
    through.close()


def test_tensors_read_this_way_are_the_same(tmp_path: Path, device: torch.device) -> None:
    with ShardReader(sharded(tmp_path / "s")) as reader:
        for name, expected in TENSORS.items():
            tensor = torch.empty_like(expected, device=device)
            reader.read_into(name, tensor)
            same_bits(tensor.cpu(), expected)
            same_bits(reader.read(name, device).cpu(), expected)


def test_a_file_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    with ShardReader(folder) as reader:
        path = folder / "m-1.safetensors"
        os.truncate(path, path.stat().st_size - 20)
        target = torch.empty_like(TENSORS["c.bias"])
        with pytest.raises(CheckpointError, match=r"m-1\.safetensors: c\.bias cannot be read"):
            reader.read_into("c.bias", target)
