"""Weights on their way from the disk while Python still imports what will load them."""

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from zimage_fp8.provenance import available_memory

BUFFER_BYTES = 4 << 20  # stays in a processor's cache, so that it costs no memory bandwidth
# One call fills the buffer again and again. Between calls a thread needs Python's lock, for which
# it waits 5 ms when another one computes: at one buffer a call that is 0.8 GB/s at most.
BUFFERS_PER_CALL = 64
MOST_OF_MEMORY = 2 / 3  # more might push out what was read first


def read_ahead(models: Iterable[str]) -> list[threading.Thread]:
    """Start reading the weights of local models into the system's page cache, a thread per folder.

    models: as `serve` takes them, NAME=MODEL included; what is no local folder is left alone.
    Importing PyTorch and the rest takes seconds, in which the disk would rest. On a disk of
    1.3 GB/s, 4.2 GB were read 5.0 s after the start instead of 7.1 (medians of three); where they
    lay in the cache already nothing changed. Nothing is read where more than two thirds of the
    memory that the system can spare would be needed, or where it does not tell (not Linux).
    """
    try:
        folders = dict.fromkeys(part for model in models for part in _weight_folders(model))
        weights = [sorted(folder.glob("*.safetensors")) for folder in folders]
        total = sum(file.stat().st_size for files in weights for file in files)
    except (OSError, RuntimeError, ValueError):  # no such user, broken links, impossible names
        return []  # whoever loads the model says what is wrong with it
    if total > MOST_OF_MEMORY * (available_memory() or 0):
        return []
    # Daemons: a command that ends early does not wait for them.
    threads = [
        threading.Thread(target=_read, args=(files,), daemon=True) for files in weights if files
    ]
    for thread in threads:
        thread.start()
    return threads


def _weight_folders(model: str) -> list[Path]:
    for path in (model, model.partition("=")[2]):
        folder = Path(path).expanduser()
        if path and (folder / "model_index.json").is_file():
            return [one.resolve() for one in sorted(folder.iterdir()) if one.is_dir()]
    return []


def _read(files: Sequence[Path]) -> None:
    buffers = [bytearray(BUFFER_BYTES)] * BUFFERS_PER_CALL
    with contextlib.suppress(OSError):  # as above
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while os.readv(stream.fileno(), buffers):
                    pass
