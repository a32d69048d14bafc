"""A finished benchmark that nobody ran: a record and its pictures, with numbers easy to check.

`make_record` is the smallest whole record: one pass, two prompts, one size. `make_rich_record` has
everything a record can hold: two passes, strata, two sizes, floors, load tests, flags, a failure.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_fp8.bench.record import (
    FailedVariant,
    Flag,
    Gpu,
    GpuActivity,
    GuidanceProbe,
    LoadRecord,
    Machine,
    Parameters,
    Pass,
    ProfileFacts,
    Quality,
    Record,
    RequestRecord,
    Spread,
    VariantRecord,
)
from zimage_fp8.quant.policy import PRESETS, STATIC_POLICIES

PROMPTS = ['a fisherman\'s "old" pier', "a village | a lake"]
SIZE = (64, 32)
SIZE_TEXT = f"{SIZE[0]}x{SIZE[1]}"
DIGEST = "0123abcd"  # of the calibration behind every static variant
GIB = 2**30

# policy -> (latency of each request in s, peak memory in GiB, PSNR in dB, SSIM)
NUMBERS: dict[str, tuple[tuple[float, float], float, float, float]] = {
    "bf16_base": ((1.0, 1.2), 20.0, 0.0, 0.0),
    "online_fp8": ((0.6, 0.7), 13.0, 21.05, 0.7942),
    **{
        policy: ((0.8 + index / 10, 0.9 + index / 10), 14.0 + index / 2, 20.0 + index, 0.8)
        for index, policy in enumerate(STATIC_POLICIES)
    },
}


def make_record(*, on_gpu: bool = True, is_test_model: bool = False) -> Record:
    memory = "nvml_process" if on_gpu else "process_rss"
    gpu = Gpu(name="NVIDIA Test 9000", memory_bytes=80 * GIB, driver="600.1")
    return Record(
        created="2026-11-22T12:00:00+00:00",
        command=["zimage-fp8", "bench", "model"],
        model="nano" if is_test_model else "Tongyi-MAI/Z-Image-Turbo",
        is_test_model=is_test_model,
        machine=Machine(
            cpu="Test CPU", cores=2, memory_bytes=8 * GIB, system="Linux", gpus=[gpu] * on_gpu
        ),
        versions={"zimage-fp8": "0.1.0", "torch": "2.13.0"},
        commit="abc",
        profile=ProfileFacts(name="card", digest="00112233aabbccdd"),
        parameters=Parameters(
            prompts=PROMPTS,
            strata=["people", "scenes"],
            seeds=[1235, 1236],
            sizes=[SIZE_TEXT],
            steps=8,
            guidance=0.0,
            warmup=1,
            runs=2,
            dtype="bfloat16",
            device=None,
        ),
        passes=[
            Pass(
                name="A",
                attention=None,
                order="sequential",
                order_reason="The profile asks for one variant after the other.",
                variants=[make_variant(policy, memory, on_gpu=on_gpu) for policy in NUMBERS],
            )
        ],
    )


def make_variant(policy: str, memory: str, *, on_gpu: bool) -> VariantRecord:
    latencies, peak_gib, _, _ = NUMBERS[policy]
    return VariantRecord(
        name=policy,
        policy=policy,
        summary=PRESETS[policy].summary,
        command=["-m", "zimage_fp8", "serve"],
        server={
            "device": "cuda" if on_gpu else "cpu",
            "attention": "torch",
            "calibration": DIGEST if policy in STATIC_POLICIES else None,
        },
        attention="torch",
        load_s=4.5,
        cold_start_s=8.0,
        warmup_latencies_s=[3.0],
        sigmas=[1 - step / 8 for step in range(9)],
        requests=[make_request(policy, index, latency) for index, latency in enumerate(latencies)],
        peak_memory_bytes={memory: round(peak_gib * GIB)},
        memory_sampling_hz=50,
        num_memory_samples=100,
    )


def make_request(policy: str, prompt: int, latency_s: float) -> RequestRecord:
    _, _, psnr_db, ssim = NUMBERS[policy]
    # A quality that differs by picture, with the stated one as its mean.
    quality = Quality(psnr_db=psnr_db + prompt - 0.5, ssim=ssim + (prompt - 0.5) / 50)
    return RequestRecord(
        prompt=prompt,
        size=SIZE_TEXT,
        seed=1235 + prompt,
        is_timed=True,
        position=prompt,
        sent_s=2.0 * prompt,
        latency_s=latency_s,
        nfe=8,
        timings_s={"queue": 0.0, "encode": 0.1, "denoise": 0.3, "decode": 0.1, "picture": 0.05},
        picture=f"pictures/{policy}/prompt{prompt}.png",
        sha256=hashlib.sha256(f"{policy}{prompt}".encode()).hexdigest(),
        quality=None if policy == "bf16_base" else quality,
    )


def changed(record: Record, name: str, **changes: object) -> Record:
    """The record with one variant of the main pass changed."""
    main, *others = record.passes
    variants = [
        variant.model_copy(update=changes) if variant.name == name else variant
        for variant in main.variants
    ]
    passes = [main.model_copy(update={"variants": variants}), *others]
    return record.model_copy(update={"passes": passes})


STRATA = ("people", "scenes", "counting", "chinese_text")
RICH_SIZES = (SIZE_TEXT, "32x64")
REPETITIONS = 3  # timed requests per prompt and size


def make_rich_record() -> Record:
    """Eight prompts in four strata, two sizes, passes A and B, floors, a failure, load, flags."""
    small = make_record()
    prompts = [f"{stratum} {index}" for stratum in STRATA for index in range(2)]
    parameters = small.parameters.model_copy(
        update={
            "prompts": prompts,
            "strata": [stratum for stratum in STRATA for _ in range(2)],
            "seeds": list(range(1235, 1235 + len(prompts))),
            "sizes": list(RICH_SIZES),
            "runs": len(prompts) * REPETITIONS,
            "warm_tolerance": 0.01,
            "max_warmup": 20,
        }
    )
    floors = [rich_variant("bf16_base", parameters, floor=floor) for floor in FLOORS]
    first = Pass(
        name="A",
        attention="SAGE_ATTN",
        order="interleaved",
        order_reason="All 8 servers fit into the GPU's memory together.",
        variants=[rich_variant(policy, parameters) for policy in NUMBERS if policy != BROKEN],
        floors=floors,
        failures=[
            FailedVariant(name=BROKEN, policy=BROKEN, error="the server ended with exit code 1")
        ],
    )
    second = Pass(
        name="B",
        attention="TORCH_SDPA",
        order="sequential",
        order_reason="2 servers need 40.0 GiB together, 30.0 GiB are free.",
        variants=[rich_variant(p, parameters, speed=0.9) for p in ("bf16_base", "online_fp8")],
    )
    raw = small.model_dump() | {
        "parameters": parameters.model_dump(),
        "passes": [first.model_dump(), second.model_dump()],
        "profile": {"name": "standard", "digest": "ffeeddccbbaa9988"},
        "flags": [{"kind": "busy_gpu", "text": "Another program used 12 % of the GPU."}],
    }
    return Record.model_validate(raw)


BROKEN = "attn-only"
FLOORS = {  # floor -> (PSNR in dB, SSIM)
    "rerun": (float("inf"), 1.0),
    "attention": (36.0, 0.98),
    "next_seed": (9.5, 0.3),
}


def rich_variant(
    policy: str, parameters: Parameters, *, floor: str | None = None, speed: float = 1.0
) -> VariantRecord:
    """Latencies and qualities that scatter around those of NUMBERS, the same on every call."""
    name = f"{policy} ({floor})" if floor else policy
    random = np.random.default_rng(len(name) + sum(map(ord, name)))
    (latency_s, _), peak_gib, psnr_db, ssim = NUMBERS[policy]
    psnr_db, ssim = FLOORS[floor] if floor else (psnr_db, ssim)
    cases = [(prompt, size) for size in RICH_SIZES for prompt in range(len(parameters.prompts))]
    rows = []
    for position, (prompt, size) in enumerate(cases * REPETITIONS):
        draw = random.normal()
        quality = Quality(psnr_db=psnr_db + draw, ssim=min(1.0, ssim + draw / 100), lpips=0.1)
        is_reference = policy == "bf16_base" and floor is None
        took_s = latency_s * speed * (1 + 0.02 * abs(random.normal()))
        rows.append(
            RequestRecord(
                prompt=prompt,
                size=size,
                seed=parameters.seeds[prompt] + (floor == "next_seed"),
                is_timed=True,
                position=position,
                sent_s=2.0 * position,
                latency_s=took_s,
                nfe=8,
                timings_s={
                    "queue": 0.001, "encode": 0.02, "denoise": took_s - 0.2, "decode": 0.1,
                    "picture": 0.05,
                },
                energy_j=600 * took_s,
                picture=f"pictures/{name}/prompt{prompt}-{size}.png",
                sha256=hashlib.sha256(f"{name}{prompt}{size}".encode()).hexdigest(),
                quality=None if is_reference else quality,
            )
        )  # fmt: skip
    base = make_variant(policy, "nvml_process", on_gpu=True)
    flags = [Flag(kind="unsettled", text="Latency fell by 3.0 % over the last warm-up requests.")]
    return base.model_copy(
        update={
            "name": name,
            "floor": floor,
            "requests": rows,
            "peak_memory_bytes": {
                "nvml_process": round(peak_gib * GIB),
                "torch_reserved": round((peak_gib - 1) * GIB),
                "torch_allocated": round((peak_gib - 2) * GIB),
            },
            "load_memory_bytes": {"nvml_process": round((peak_gib - 3) * GIB)},
            "steady_memory_bytes": {"nvml_process": round(peak_gib * GIB)},
            "gpu": GpuActivity(
                num_samples=1000,
                sm_clock_mhz=Spread(least=1455, mean=1520, greatest=1980),
                power_w=Spread(least=310, mean=640, greatest=702),
                temperature_c=Spread(least=41, mean=58, greatest=63),
                throttled={"sw_power_cap": 0.8},
            ),
            "probe": GuidanceProbe(
                size=SIZE_TEXT, steps=2, guidance=3.0, off_s=[0.2] * 3, on_s=[0.3] * 3,
                twice_s=[0.3] * 3, is_same_picture=False,
            ),
            "load": [] if floor else rich_load(latency_s * speed),
            "flags": flags if policy == "online_fp8" else [],
        }
    )  # fmt: skip


def rich_load(latency_s: float) -> list[LoadRecord]:
    closed = [
        LoadRecord(
            size=SIZE_TEXT, concurrency=clients, duration_s=16 * latency_s,
            latencies_s=[latency_s * clients] * 16, failures={}, energy_j=9000.0,
        )
        for clients in (1, 2, 4)
    ]  # fmt: skip
    opened = [
        LoadRecord(
            size=SIZE_TEXT, rate_per_s=share / latency_s, slo_s=2 * latency_s,
            duration_s=16 * latency_s / share,
            latencies_s=[latency_s * (1 + share * index / 8) for index in range(16)],
            failures={"429 overloaded": 2} if share > 1 else {},
        )
        for share in (0.5, 0.9, 1.2)
    ]  # fmt: skip
    return closed + opened


def save_pictures(record: Record, folder: Path) -> None:
    """Noise of the right size for every request of the record."""
    random = np.random.default_rng(0)
    for one in record.passes:
        for variant in (*one.variants, *one.floors):
            for request in variant.requests:
                path = folder / request.picture
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                width, height = map(int, request.size.split("x"))
                Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
