"""What every GPU measurement carries: machine, versions, commit, command, clock and power.

Where there is no GPU, times are the host's and there is neither clock nor power: enough for a dry
run of a script at `--scale tiny`, and for nothing else.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from zimage_fp8.provenance import commit, machine, versions

Envelope = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANDOM_WEIGHTS = "random: speed and memory are real, pictures are meaningless"
MIN_RUNS = 5


def envelope() -> Envelope:
    """The facts in front of every result file."""
    facts: Envelope = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.argv[0].rpartition("/")[2], *map(_without_machine, sys.argv[1:])],
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    facts |= gpu_facts()
    if torch.cuda.is_available():
        try:
            import triton

            facts["versions"]["triton"] = triton.__version__
        except ImportError:
            pass
    return facts


def gpu_facts() -> Envelope:
    """What a result says of the GPU, where there is one."""
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    }


def _without_machine(word: str) -> str:
    """An absolute path's last part: where files lie on this machine says nothing to a reader."""
    return word.rpartition("/")[2] if word.startswith("/") else word


def write_rows(path: Path, facts: Envelope, key: str, rows: Iterable[Any]) -> None:
    """A result file, written anew after every row: what is measured survives an early end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[Any] = []
    for row in rows:
        kept.append(row)
        path.write_text(json.dumps(facts | {key: kept}, indent=1) + "\n")


def elapsed_ms(run: Callable[[], object]) -> float:
    """Milliseconds of `run()`, until the device has done it."""
    if DEVICE.type == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def sustained(run: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median milliseconds of `run`, warm, over `seconds` of back-to-back work; clock and power."""
    run()
    run()
    times: list[float] = []
    with sampled_gpu() if DEVICE.type == "cuda" else nullcontext({}) as state:
        while sum(times) < seconds * 1000 or len(times) < MIN_RUNS:
            times.append(elapsed_ms(run))
    ordered = sorted(times)
    return {
        "ms": median(times),
        "ms_p10": ordered[len(times) // 10],
        "ms_p90": ordered[len(times) * 9 // 10],
        "loops": len(times),
        **state,
    }


@contextmanager
def sampled_gpu(period_s: float = 0.02) -> Iterator[dict[str, float]]:
    """Median SM clock (MHz), power (W) and largest process memory (bytes) while the block runs."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    clocks: list[int] = []
    watts: list[float] = []
    used: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(period_s):
            clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
            used.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        done.set()
        thread.join()
        if clocks:
            half = len(clocks) // 2  # the second half: the first still heats up
            found["sm_clock_mhz"] = median(clocks[half:])
            found["power_w"] = median(watts[half:])
            found["device_memory_used_peak_bytes"] = max(used)
