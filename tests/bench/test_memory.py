"""Memory watched from outside: a real process on the CPU, a pretended driver for the GPU."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from fake_gpu import MIB, FakeDriver
from zimage_fp8.bench.gpu import Activity, Reading
from zimage_fp8.bench.memory import GpuMonitor, ResidentMemory, Sampler, UnifiedGrowth, probes_for

ALLOCATE = "import time; block = bytearray(96 * 2**20); print('done', flush=True); time.sleep(60)"


def test_the_peak_of_a_process_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", ALLOCATE], stdout=subprocess.PIPE)
    sampler = Sampler([ResidentMemory(child.pid)])
    try:
        assert child.stdout
        child.stdout.readline()
        wait_for_samples(sampler, sampler.num_samples + 3)
    finally:
        sampler.stop()
        child.kill()
        child.communicate()
    assert 96 * MIB < sampler.peaks("load")["sampled_rss"] < 200 * MIB


def wait_for_samples(sampler: Sampler, count: int) -> None:
    deadline = time.monotonic() + 20
    while sampler.num_samples < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_ended_uses_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert ResidentMemory(child.pid).read() == 0


def test_loading_is_apart_from_drawing(driver: FakeDriver) -> None:
    """And of all processes, ours alone."""
    assert driver.processes is not None
    driver.processes |= {os.getpid(): 700 * MIB, 1: 500 * MIB}
    sampler = Sampler(probes_for(os.getpid(), driver))
    driver.used = 1800 * MIB
    wait_for_samples(sampler, 2)
    driver.processes[os.getpid()], driver.used = 300 * MIB, 1400 * MIB
    sampler.phase = "steady"
    wait_for_samples(sampler, sampler.num_samples + 2)
    sampler.stop()
    assert sampler.peaks("load") == {
        "nvml_process": 700 * MIB,
        "nvml_device_growth": 800 * MIB,
    }
    assert sampler.peaks("steady")["nvml_process"] in (300 * MIB, 700 * MIB)
    count = sampler.num_samples
    time.sleep(0.1)
    assert sampler.num_samples == count


def test_a_process_that_the_driver_does_not_name_leaves_the_growth(driver: FakeDriver) -> None:
    sampler = Sampler(probes_for(os.getpid(), driver))
    assert driver.used is not None
    driver.used += 50 * MIB
    wait_for_samples(sampler, 2)
    sampler.stop()
    assert sampler.peaks("load") == {"nvml_device_growth": 50 * MIB}


def test_unified_memory_has_no_device_memory(driver: FakeDriver) -> None:
    """The driver may still name processes; where it does not, the machine's own figure is left."""
    driver.used = None
    assert [probe.method for probe in probes_for(1, driver)] == ["nvml_process", "unified_growth"]
    driver.processes = None
    assert [probe.method for probe in probes_for(1, driver)] == ["unified_growth"]


def test_growth_of_the_machines_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a pretended machine: a real one is never still."""
    free = 900 * MIB

    def virtual_memory() -> SimpleNamespace:
        return SimpleNamespace(total=1000 * MIB, available=free)

    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory)
    growth = UnifiedGrowth()
    assert growth.read() == 0
    free = 700 * MIB
    assert growth.read() == 200 * MIB


def test_without_a_gpu_main_memory_is_watched() -> None:
    assert [probe.method for probe in probes_for(1, None)] == ["sampled_rss"]


def test_clocks_are_read_while_somebody_is_timed(driver: FakeDriver) -> None:
    monitor = GpuMonitor(driver)
    activity = Activity()
    time.sleep(0.1)
    assert activity.readings == []
    monitor.activity = activity
    deadline = time.monotonic() + 20
    while len(activity.readings) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monitor.stop()
    assert activity.readings[0] == Reading(1500.0, 400.0, 50.0, 0.0)
