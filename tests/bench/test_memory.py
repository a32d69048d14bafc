"""Memory watched from outside: a real process on the CPU, a pretended driver for the GPU."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pynvml
import pytest

from zimage_fp8.bench import memory
from zimage_fp8.bench.memory import GpuGrowth, ResidentMemory, Sampler, probes_for

MIB = 2**20
ALLOCATE = "import time; block = bytearray(96 * 2**20); print('done', flush=True); time.sleep(60)"


def test_the_peak_of_a_process_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", ALLOCATE], stdout=subprocess.PIPE)
    try:
        with Sampler([ResidentMemory(child.pid)]) as sampler:
            assert child.stdout
            child.stdout.readline()
            wait_for_samples(sampler, sampler.num_samples + 3)
    finally:
        child.kill()
        child.communicate()
    assert 96 * MIB < sampler.peaks["sampled_rss"] < 200 * MIB


def wait_for_samples(sampler: Sampler, count: int) -> None:
    deadline = time.monotonic() + 20
    while sampler.num_samples < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_ended_uses_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert ResidentMemory(child.pid).read() == 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver with one GPU: `processes` and `used` can be set."""
    state = SimpleNamespace(processes=[], used=1000 * MIB)
    replaced = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda device: "NVIDIA Test 9000",
        "nvmlSystemGetDriverVersion": lambda: "600.1",
        "nvmlDeviceGetComputeRunningProcesses": lambda device: state.processes,
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(
            used=state.used, total=8000 * MIB
        ),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(pynvml, name, function)
    return state


def test_gpu_memory_of_our_process_only(driver: SimpleNamespace) -> None:
    driver.processes = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=300 * MIB),
        SimpleNamespace(pid=1, usedGpuMemory=500 * MIB),
    ]
    with Sampler(probes_for(os.getpid(), on_gpu=True)) as sampler:
        driver.used = 1400 * MIB
        wait_for_samples(sampler, 2)
        driver.used = 1200 * MIB
        wait_for_samples(sampler, 4)
    assert sampler.peaks == {"nvml_process": 300 * MIB, "nvml_device_growth": 400 * MIB}


def test_a_process_that_the_driver_does_not_name_leaves_the_growth(driver: SimpleNamespace) -> None:
    with Sampler(probes_for(os.getpid(), on_gpu=True)) as sampler:
        driver.used += 50 * MIB
        wait_for_samples(sampler, 2)
    assert sampler.peaks == {"nvml_device_growth": 50 * MIB}


def test_unified_memory_has_no_device_memory(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_supported(device: object) -> None:
        raise pynvml.NVMLError_NotSupported

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    probes = probes_for(os.getpid(), on_gpu=True)
    assert not any(isinstance(probe, GpuGrowth) for probe in probes)
    (gpu,) = memory.describe_gpus()
    assert (gpu.name, gpu.memory_bytes) == ("NVIDIA Test 9000", None)
