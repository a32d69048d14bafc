"""Bytes of files to a GPU: read by several threads into pinned memory, copied while more is read.

A copy from ordinary memory goes through the driver's own small buffer, on one thread, and the GPU
waits meanwhile. Here threads fill chunks of one pinned buffer and every chunk is copied as soon as
it is full; a chunk is filled again when its copy is done.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

CHUNK_BYTES = 4 << 20
CHUNKS = 32  # 128 MiB: a power of two, to which PyTorch rounds pinned memory up
THREADS = 8


class Staging:
    """A pinned buffer and the threads that fill it. Not thread-safe: one thread calls `copy`."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._buffer = torch.empty(CHUNKS, CHUNK_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._copied = [_event() for _ in range(CHUNKS)] if is_cuda else None
        self._next = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="staging")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def copy(self, file: int, offset: int, target: Tensor) -> None:
        """Fill target (uint8 [bytes], contiguous) with the bytes of descriptor `file` at `offset`.

        Copies are queued on the current stream, so what is queued there afterwards sees them.
        Raises OSError when the file ends early or cannot be read.
        """
        pending: deque[tuple[Future[None], int, Tensor]] = deque()
        try:
            for start in range(0, len(target), CHUNK_BYTES):
                if len(pending) == CHUNKS:
                    self._send(*pending.popleft())
                part = target[start : start + CHUNK_BYTES]
                slot, self._next = self._next, (self._next + 1) % CHUNKS
                read = self._pool.submit(self._fill, slot, file, offset + start, len(part))
                pending.append((read, slot, part))
            while pending:
                self._send(*pending.popleft())
        finally:
            # After an error no thread may still write where the next copy will.
            wait([read for read, *_ in pending])

    def _fill(self, slot: int, file: int, offset: int, size: int) -> None:
        if self._copied:
            self._copied[slot].synchronize()
        memory = self._buffer[slot].numpy().data[:size]
        done = 0
        while done < size:
            count = os.preadv(file, [memory[done:]], offset + done)
            if count == 0:
                raise OSError("the file ends before its header says")
            done += count

    def _send(self, read: "Future[None]", slot: int, part: Tensor) -> None:
        read.result()
        part.copy_(self._buffer[slot, : len(part)], non_blocking=True)
        if self._copied:
            self._copied[slot].record(torch.cuda.current_stream(part.device))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
