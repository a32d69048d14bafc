"""NVML behind one interface: a pretended library here, a real GPU where there is one."""

from types import SimpleNamespace

import pynvml
import pytest

from fake_gpu import MIB, FakeDriver
from zimage_fp8.bench import gpu
from zimage_fp8.bench.gpu import Activity, Nvml, Reading, find_driver, utilization_now

ANSWERS = {
    "nvmlInit": lambda: None,
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
    "nvmlDeviceGetName": lambda device: "NVIDIA Test 9000",
    "nvmlSystemGetDriverVersion": lambda: "600.1",
    "nvmlDeviceGetComputeRunningProcesses": lambda device: [
        SimpleNamespace(pid=7, usedGpuMemory=300 * MIB),
        SimpleNamespace(pid=8, usedGpuMemory=None),
        SimpleNamespace(pid=9, usedGpuMemory=500 * MIB),
    ],
    "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=1000 * MIB, total=8000 * MIB),
    "nvmlDeviceGetTotalEnergyConsumption": lambda device: 12_345,
    "nvmlDeviceGetPowerUsage": lambda device: 350_000,
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda device: (
        pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle
    ),
    "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=40),
    "nvmlDeviceGetClockInfo": lambda device, kind: 1500,
    "nvmlDeviceGetTemperature": lambda device, kind: 61,
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in ANSWERS.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("library")
def test_units_are_bytes_joules_watts() -> None:
    device = Nvml(0)
    assert device.process_bytes({7, 8}) == 300 * MIB
    assert device.used_bytes() == 1000 * MIB
    assert device.energy_j() == 12.345
    assert device.read() == Reading(1500, 350.0, 61, 0.4, frozenset({"sw_power_cap"}))
    assert device.describe().memory_bytes == 8000 * MIB


@pytest.mark.usefixtures("library")
def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GB10, whose memory is the machine's."""

    def not_supported(*arguments: object) -> None:
        raise pynvml.NVMLError_NotSupported

    for name in ANSWERS:
        if name not in ("nvmlInit", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion"):
            monkeypatch.setattr(pynvml, name, not_supported)
    device = Nvml(0)
    assert (device.process_bytes({7}), device.used_bytes(), device.energy_j()) == (None,) * 3
    assert device.read() == Reading()
    assert device.describe().memory_bytes is None


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("device", "visible", "handle"),
    [
        (None, None, 0),
        ("cuda", None, 0),
        ("cuda:1", None, 1),
        (None, "3,5", 3),
        ("cuda:1", "3,5", 5),
        ("cuda:0", "GPU-12ab", "GPU-12ab"),
    ],
)
def test_the_gpu_that_cuda_means(
    device: str | None, visible: str | None, handle: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = find_driver(device)
    assert isinstance(found, Nvml)
    assert found.handle == handle


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("device", "visible"), [("cpu", None), (None, ""), ("cuda:2", "3,5")])
def test_no_gpu_is_none(
    device: str | None, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_driver(device) is None


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    assert find_driver(None) is None


def test_activity_is_spread_and_shares() -> None:
    activity = Activity()
    assert activity.summary() is None
    activity.readings = [
        Reading(1000, 100, 40, throttling={"sw_power_cap"}),
        Reading(1600, 700, 60, throttling={"sw_power_cap", "hw_slowdown"}),
        Reading(1900, 700, None),
        Reading(1500, 500, 50),
    ]
    found = activity.summary()
    assert found
    assert found.sm_clock_mhz
    assert (found.sm_clock_mhz.least, found.sm_clock_mhz.mean) == (1000, 1500)
    assert found.temperature_c
    assert found.temperature_c.mean == 50
    assert found.throttled == {"hw_slowdown": 0.25, "sw_power_cap": 0.5}


def test_utilization_is_a_mean(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUSY_PAUSE_S", 0)
    driver.reading = Reading(utilization=0.3)
    assert utilization_now(driver) == pytest.approx(0.3)
    driver.reading = Reading()
    assert utilization_now(driver) is None


@pytest.mark.gpu
def test_a_real_gpu_counts_memory_and_energy() -> None:
    """Half a second of matrix products costs joules, and 1 GiB is seen as 1 GiB."""
    import time

    import torch

    found = find_driver("cuda:0")
    assert found is not None
    assert "NVIDIA" in found.describe().name
    torch.zeros(1, device="cuda")
    before, energy = found.used_bytes(), found.energy_j()
    block = torch.randn(2**28, device="cuda")  # 1 GiB
    after = found.used_bytes()
    if before is not None and after is not None:
        assert 0.9 * 2**30 < after - before < 1.5 * 2**30
    matrix = block[: 2**24].view(4096, 4096)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        matrix @ matrix
        torch.cuda.synchronize()
    reading = found.read()
    assert reading.sm_clock_mhz is None or reading.sm_clock_mhz > 100
    if energy is not None:
        spent = found.energy_j()
        assert spent is not None
        assert 5 < spent - energy < 1000
