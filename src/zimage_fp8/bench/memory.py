"""Peak memory of a server process, watched from outside, loading apart from drawing.

NVML lists GPU processes by the host's process ids, which are not ours inside a container; so the
growth of the whole device is watched beside it, and the table prefers the process's own number.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import psutil

from zimage_fp8.bench.gpu import Activity, Driver

SAMPLING_HZ = 50.0

Phase = Literal["load", "steady"]


class Probe(Protocol):
    """One way to read the memory in use now; `method` is a key of MEMORY_METHODS."""

    method: str

    def read(self) -> int: ...


class ResidentMemory:
    method = "sampled_rss"

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self) -> int:
        return sum(_resident_bytes(process) for process in _process_tree(self.pid))


class GpuProcessMemory:
    method = "nvml_process"

    def __init__(self, pid: int, driver: Driver) -> None:
        self.pid = pid
        self.driver = driver

    def read(self) -> int:
        ours = {process.pid for process in _process_tree(self.pid)}
        return self.driver.process_bytes(ours) or 0


class GpuGrowth:
    """Memory in use on the GPU above what was used when this was made."""

    method = "nvml_device_growth"

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.before = driver.used_bytes() or 0

    def read(self) -> int:
        return (self.driver.used_bytes() or 0) - self.before


class UnifiedGrowth:
    """Memory of the machine in use above what was used when this was made.

    On unified memory (GB10) a GPU has none of its own, and what it holds is not resident in any
    process. Other programs count too.
    """

    method = "unified_growth"

    def __init__(self) -> None:
        self.before = _memory_in_use()

    def read(self) -> int:
        return _memory_in_use() - self.before


def _memory_in_use() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def probes_for(pid: int, driver: Driver | None) -> list[Probe]:
    """The probes that work here; the server itself tells what torch's allocator holds."""
    probes: list[Probe] = [] if driver else [ResidentMemory(pid)]
    if driver and driver.process_bytes(set()) is not None:
        probes.append(GpuProcessMemory(pid, driver))
    if driver and driver.used_bytes() is not None:
        probes.append(GpuGrowth(driver))
    elif driver:
        probes.append(UnifiedGrowth())
    return probes


class Sampler:
    """A thread that reads the probes SAMPLING_HZ times a second until `stop`.

    `phase` is set by the caller: peaks are kept for each. A probe that saw nothing is left out.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.num_samples = 0
        self.phase: Phase = "load"
        self._peaks: dict[Phase, dict[str, int]] = {"load": {}, "steady": {}}
        self._ticker = Ticker(SAMPLING_HZ, self._sample)

    def peaks(self, phase: Phase) -> dict[str, int]:
        """Peak bytes by method."""
        return {method: peak for method, peak in self._peaks[phase].items() if peak > 0}

    def stop(self) -> None:
        """Once or more often; nothing is read afterwards."""
        self._ticker.stop()

    def _sample(self) -> None:
        peaks = self._peaks[self.phase]
        for probe in self.probes:
            peaks[probe.method] = max(peaks.get(probe.method, 0), probe.read())
        self.num_samples += 1


class GpuMonitor:
    """A thread that reads clocks, power and throttling into `activity` while it is set."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.activity: Activity | None = None
        self._ticker = Ticker(SAMPLING_HZ, self._look)

    def stop(self) -> None:
        self._ticker.stop()

    def _look(self) -> None:
        if (activity := self.activity) is not None:
            activity.readings.append(self.driver.read())


class Ticker:
    """Calls `act` `rate_hz` times a second in a thread of its own, from now on until `stop`."""

    def __init__(self, rate_hz: float, act: Callable[[], None]) -> None:
        self._pause_s, self._act = 1 / rate_hz, act
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            self._act()


def _process_tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
