"""What is flagged when a record is put together, and when a run may begin."""

from pathlib import Path

import pytest

from fake_gpu import FakeDriver
from zimage_fp8.bench import gpu
from zimage_fp8.bench.assemble import variant_record
from zimage_fp8.bench.conduct import refuse_busy
from zimage_fp8.bench.gpu import Reading
from zimage_fp8.bench.journal import MemorySeen, Progress, Started
from zimage_fp8.bench.record import GpuActivity, Parameters, RequestRecord
from zimage_fp8.bench.session import Subject, is_settled
from zimage_fp8.errors import ZImageError

PARAMETERS = Parameters(
    prompts=["a", "b"], strata=["all", "all"], seeds=[1, 2], sizes=["16x16"], steps=4,
    guidance=0.0, warmup=0, runs=2, dtype="bfloat16", device=None,
)  # fmt: skip
SUBJECT = Subject("full", "full", "", "zimage-fp8", [])


def request(prompt: int, sha256: str, nfe: int = 4) -> RequestRecord:
    return RequestRecord(
        prompt=prompt, size="16x16", seed=1, is_timed=True, position=prompt, sent_s=0.0,
        latency_s=1.0, nfe=nfe, timings_s={}, picture="x.png", sha256=sha256,
    )  # fmt: skip


def progress(*requests: RequestRecord) -> Progress:
    started = Started(load_s=1.0, cold_start_s=2.0, server={"attention": "fa3"}, sigmas=[])
    return Progress(Path("x"), started=started, pictures=list(requests))


def kinds(found: Progress) -> list[str]:
    return [flag.kind for flag in variant_record(SUBJECT, found, PARAMETERS).flags]


def test_nothing_odd_is_no_flag() -> None:
    assert kinds(progress(request(0, "a"), request(1, "b"))) == []


def test_one_picture_for_two_prompts() -> None:
    assert kinds(progress(request(0, "a"), request(1, "a"))) == ["same_pictures"]


def test_more_forwards_than_were_asked_for() -> None:
    found = progress(request(0, "a", nfe=8), request(1, "b", nfe=8))
    assert kinds(found) == ["unequal_forwards"]


@pytest.mark.parametrize(
    ("throttled", "expected"),
    [
        ({"sw_power_cap": 0.9}, []),  # how a datacenter GPU runs; it is in the record
        ({"hw_thermal_slowdown": 0.2}, ["throttled"]),
        ({"hw_slowdown": 0.001}, []),
    ],
)
def test_heat_is_flagged(throttled: dict[str, float], expected: list[str]) -> None:
    found = progress(request(0, "a"), request(1, "b"))
    found.gpu.append(
        GpuActivity(
            num_samples=1000, sm_clock_mhz=None, power_w=None, temperature_c=None,
            throttled=throttled,
        )
    )  # fmt: skip
    assert kinds(found) == expected


def test_peaks_are_over_all_starts_of_a_server() -> None:
    found = progress(request(0, "a"), request(1, "b"))
    for load, steady in ((5, 3), (4, 6)):
        seen = MemorySeen(
            load={"nvml_process": load}, steady={"nvml_process": steady},
            reported={"torch_reserved": 2}, num_samples=10,
        )  # fmt: skip
        found.memory.append(seen)
    row = variant_record(SUBJECT, found, PARAMETERS)
    assert row.peak_memory_bytes == {"nvml_process": 6, "torch_reserved": 2}
    assert row.load_memory_bytes == {"nvml_process": 5}
    assert row.steady_memory_bytes == {"nvml_process": 6}
    assert row.num_memory_samples == 20


def test_a_busy_gpu_is_refused_or_flagged(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BUSY_PAUSE_S", 0)
    assert list(refuse_busy(driver, allow_busy=False)) == []
    driver.reading = Reading(utilization=0.4)
    with pytest.raises(ZImageError, match="used 40% of the GPU") as refused:
        list(refuse_busy(driver, allow_busy=False))
    assert "--allow-busy" in str(refused.value.hint)
    (flag,) = refuse_busy(driver, allow_busy=True)
    assert flag.kind == "busy_gpu"


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        ([1.0, 1.0, 1.0], False),
        ([9.0, 2.0, 1.0, 1.0, 1.0, 1.005], False),  # medians 2 and 1
        ([9.0, 1.0, 1.002, 1.0, 1.005, 1.0], True),
        ([1.0, 1.0, 1.0, 1.02, 1.02, 1.02], False),
    ],
)
def test_warm_is_when_two_medians_agree(latencies: list[float], expected: bool) -> None:
    assert is_settled(latencies, group=3, tolerance=0.01) is expected


def test_a_picture_that_the_next_seed_does_not_change() -> None:
    found = progress(request(0, "a"), request(1, "b"))
    found.other_seed = "c"
    assert kinds(found) == []
    found.other_seed = "a"
    assert kinds(found) == ["ignored_seed"]


@pytest.mark.parametrize(
    ("encode_s", "expected"),
    [
        ((0.08, 0.00002), ["remembered_prompts"]),
        ((0.08, 0.05), []),  # a shorter prompt
        ((0.0009, 0.0008), []),  # a fast one
        ((0.08, 0.007), []),
    ],
)
def test_a_prompt_that_was_not_encoded_again(
    encode_s: tuple[float, float], expected: list[str]
) -> None:
    rows = [
        request(prompt, name).model_copy(update={"timings_s": {"encode": took_s}})
        for (prompt, name), took_s in zip(enumerate("ab"), encode_s, strict=True)
    ]
    assert kinds(progress(*rows)) == expected
