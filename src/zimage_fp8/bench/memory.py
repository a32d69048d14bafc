"""Peak memory of a server process, watched from outside.

NVML lists GPU processes by the host's process ids, which are not ours inside a container; so the
growth of the whole device is watched beside it, and the table prefers the process's own number.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import psutil
import pynvml

from zimage_fp8.bench.record import Gpu

SAMPLING_HZ = 50.0


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

    def __init__(self, pid: int, devices: Sequence[object]) -> None:
        self.pid = pid
        self.devices = devices

    def read(self) -> int:
        ours = {process.pid for process in _process_tree(self.pid)}
        return sum(
            entry.usedGpuMemory or 0
            for device in self.devices
            for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(device)
            if entry.pid in ours
        )


class GpuGrowth:
    """Memory in use on all devices above what the first reading saw."""

    method = "nvml_device_growth"

    def __init__(self, devices: Sequence[object]) -> None:
        self.devices = devices
        self.before: int | None = None

    def read(self) -> int:
        used = sum(int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in self.devices)
        if self.before is None:
            self.before = used
        return used - self.before


def probes_for(pid: int, *, on_gpu: bool) -> list[Probe]:
    """The probes that work here. On unified memory (GB10) a device has no memory of its own."""
    if not on_gpu:
        return [ResidentMemory(pid)]
    devices = gpu_devices()
    candidates: list[Probe] = [GpuProcessMemory(pid, devices), GpuGrowth(devices)]
    return [probe for probe in candidates if _works(probe)]


def _works(probe: Probe) -> bool:
    try:
        probe.read()
    except pynvml.NVMLError:
        return False
    return True


class Sampler:
    """A context in which the probes are read SAMPLING_HZ times a second; `peaks` is the result."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.num_samples = 0
        self._peaks = {probe.method: 0 for probe in probes}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)

    @property
    def peaks(self) -> dict[str, int]:
        """Peak bytes by method; a probe that saw nothing is left out."""
        return {method: peak for method, peak in self._peaks.items() if peak > 0}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(1 / SAMPLING_HZ):
            for probe in self.probes:
                self._peaks[probe.method] = max(self._peaks[probe.method], probe.read())
            self.num_samples += 1


def gpu_devices() -> list[object]:
    """NVML's handles of all GPUs; empty where there is no NVIDIA driver."""
    try:
        pynvml.nvmlInit()
        return [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
    except pynvml.NVMLError:
        return []


def describe_gpus() -> list[Gpu]:
    return [
        Gpu(
            name=pynvml.nvmlDeviceGetName(device),
            memory_bytes=_total_bytes(device),
            driver=pynvml.nvmlSystemGetDriverVersion(),
        )
        for device in gpu_devices()
    ]


def _total_bytes(device: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(device).total)
    except pynvml.NVMLError_NotSupported:
        return None


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
