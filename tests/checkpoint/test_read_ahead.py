"""Reading weights into the page cache before anything loads them."""

import os
from pathlib import Path

import pytest

from zimage_fp8.checkpoint import read_ahead as module
from zimage_fp8.checkpoint.read_ahead import read_ahead

SIZE = 12 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards and a VAE, written to the disk."""
    folder = tmp_path / "model"
    for name in ("transformer/a", "transformer/b", "vae/c"):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(os.urandom(SIZE))
            os.fsync(stream.fileno())
    (folder / "model_index.json").write_text("{}")
    (folder / "tokenizer").mkdir()  # without weights
    return folder


def is_cached(file: Path) -> bool:
    """Whether its last chunk can be read without waiting for the disk."""
    with file.open("rb") as stream:
        try:
            read = os.preadv(stream.fileno(), [bytearray(4096)], SIZE - 4096, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
    return read == 4096


def forget(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(map(is_cached, files)):
        pytest.skip("this file system keeps its pages, or cannot tell")
    return files


@pytest.mark.parametrize("given", ["{}", "small={}"])
def test_weights_are_in_the_cache_afterwards(model: Path, given: str) -> None:
    files = forget(model)
    threads = read_ahead([given.format(model), given.format(model), "nano", "owner/name", ""])
    assert len(threads) == 2  # one a folder of weights, and each folder once
    for thread in threads:
        thread.join(30)
    assert all(map(is_cached, files))


def test_weights_that_memory_cannot_hold_are_left_where_they_are(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 3 * SIZE * 3 // 2)
    assert len(read_ahead([str(model)])) == 2
    monkeypatch.setattr(module, "available_memory", lambda: 3 * SIZE * 3 // 2 - 3)
    assert read_ahead([str(model)]) == []
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert read_ahead([str(model)]) == []


def test_what_cannot_be_read_is_left_to_who_loads_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refused(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "a.safetensors":
            raise PermissionError(self)
        return real(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refused)
    for thread in read_ahead([str(model), str(model / "missing")]):
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("name", ["~nobody-here/model", "a" * 5000, "bad\0name", "a=" + "b" * 5000])
def test_impossible_names_are_left_to_who_loads_them(name: str) -> None:
    assert read_ahead([name]) == []


def test_a_broken_link_is_left_to_who_loads_it(model: Path) -> None:
    (model / "transformer" / "d.safetensors").symlink_to(model / "gone")
    assert read_ahead([str(model)]) == []
