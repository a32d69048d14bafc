"""What NVML says of the GPU that is measured: memory, energy, clocks, throttling, other users.

Everything else in the benchmark asks a `Driver`, so that it can be tested without a GPU.
"""

import os
import re
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import pynvml

from zimage_fp8.bench.record import Gpu, GpuActivity, Spread

# What makes a GPU slower than it could be. A power cap is normal under full load and counts as
# throttling too: two variants that hit it differently did not run at the same clock.
THROTTLING = {
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hw_power_brake",
}
HEAT = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake")
BUSY_LOOKS, BUSY_PAUSE_S = 10, 0.1


@dataclass(frozen=True)
class Reading:
    """One look at the GPU. Every part is None where this GPU does not tell it."""

    sm_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    utilization: float | None = None
    throttling: Set[str] = frozenset()


class Driver(Protocol):
    """One GPU. None stands for what this GPU does not tell (unified memory, old cards)."""

    def describe(self) -> Gpu: ...
    def used_bytes(self) -> int | None: ...
    def process_bytes(self, pids: Set[int]) -> int | None: ...
    def energy_j(self) -> float | None: ...
    def read(self) -> Reading: ...


class Nvml:
    """The GPU behind an NVML handle."""

    def __init__(self, handle: object) -> None:
        self.handle = handle

    def describe(self) -> Gpu:
        memory = self._ask(pynvml.nvmlDeviceGetMemoryInfo)
        return Gpu(
            name=pynvml.nvmlDeviceGetName(self.handle),
            memory_bytes=None if memory is None else int(memory.total),
            driver=pynvml.nvmlSystemGetDriverVersion(),
        )

    def used_bytes(self) -> int | None:
        memory = self._ask(pynvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else int(memory.used)

    def process_bytes(self, pids: Set[int]) -> int | None:
        """Of these processes together. Inside a container the driver may know them by other ids;
        then this is 0."""
        running = self._ask(pynvml.nvmlDeviceGetComputeRunningProcesses)
        if running is None:
            return None
        return sum(entry.usedGpuMemory or 0 for entry in running if entry.pid in pids)

    def energy_j(self) -> float | None:
        millijoules = self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def read(self) -> Reading:
        power_mw = self._ask(pynvml.nvmlDeviceGetPowerUsage)
        reasons = self._ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
        rates = self._ask(pynvml.nvmlDeviceGetUtilizationRates)
        return Reading(
            sm_clock_mhz=self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=self._ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            utilization=None if rates is None else rates.gpu / 100,
            throttling={name for bit, name in THROTTLING.items() if reasons & bit},
        )

    def _ask(self, function: Callable[..., Any], *arguments: object) -> Any:  # pynvml has no types
        try:
            return function(self.handle, *arguments)
        except pynvml.NVMLError:
            return None


def find_driver(device: str | None) -> Driver | None:
    """The GPU that servers started with `--device device` use; None for cpu and without NVML.

    NVML counts all GPUs of the machine, CUDA those of CUDA_VISIBLE_DEVICES.
    """
    if device == "cpu":
        return None
    index = int(match[1]) if (match := re.fullmatch(r"cuda:(\d+)", device or "")) else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        if visible is None:
            return Nvml(pynvml.nvmlDeviceGetHandleByIndex(index))
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if index < len(names):
            return Nvml(_handle(names[index]))
    return None


def _handle(name: str) -> object:
    if name.isdigit():
        handle: object = pynvml.nvmlDeviceGetHandleByIndex(int(name))
    else:
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
    return handle


@dataclass
class Activity:
    """Readings of one variant's timed requests, summed up."""

    readings: list[Reading] = field(default_factory=list)

    def summary(self) -> GpuActivity | None:
        """None when there was nothing to read."""
        if not self.readings:
            return None
        reasons = sorted({reason for one in self.readings for reason in one.throttling})
        return GpuActivity(
            num_samples=len(self.readings),
            sm_clock_mhz=_spread([one.sm_clock_mhz for one in self.readings]),
            power_w=_spread([one.power_w for one in self.readings]),
            temperature_c=_spread([one.temperature_c for one in self.readings]),
            throttled={
                reason: sum(reason in one.throttling for one in self.readings) / len(self.readings)
                for reason in reasons
            },
        )


def _spread(values: list[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(least=min(known), mean=sum(known) / len(known), greatest=max(known))


def utilization_now(driver: Driver) -> float | None:
    """Mean over a second in which the benchmark itself does nothing."""
    looks: list[float] = []
    for _ in range(BUSY_LOOKS):
        if (utilization := driver.read().utilization) is not None:
            looks.append(utilization)
        time.sleep(BUSY_PAUSE_S)
    return sum(looks) / len(looks) if looks else None
