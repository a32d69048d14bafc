"""A finished benchmark that nobody ran: a record and its pictures, with numbers easy to check."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_fp8.bench.record import (
    Gpu,
    Machine,
    Parameters,
    Quality,
    Record,
    RequestRecord,
    VariantRecord,
)
from zimage_fp8.quant.policy import PRESETS, STATIC_POLICIES

PROMPTS = ['a fisherman\'s "old" pier', "a village | a lake"]
SIZE = (64, 32)
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
        parameters=Parameters(
            prompts=PROMPTS,
            seeds=[1235, 1236],
            width=SIZE[0],
            height=SIZE[1],
            steps=8,
            guidance=0.0,
            warmup=1,
            runs=2,
            dtype="bfloat16",
            device=None,
        ),
        variants=[make_variant(policy, memory, on_gpu=on_gpu) for policy in NUMBERS],
    )


def make_variant(policy: str, memory: str, *, on_gpu: bool) -> VariantRecord:
    latencies, peak_gib, _, _ = NUMBERS[policy]
    return VariantRecord(
        policy=policy,
        summary=PRESETS[policy].summary,
        command=["-m", "zimage_fp8", "serve"],
        server={
            "device": "cuda" if on_gpu else "cpu",
            "attention": "torch",
            "calibration": DIGEST if policy in STATIC_POLICIES else None,
        },
        load_s=4.5,
        warmup_latencies_s=[3.0],
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
        seed=1235 + prompt,
        latency_s=latency_s,
        nfe=8,
        sigmas=[1 - step / 8 for step in range(9)],
        timings_s={"queue": 0.0, "encode": 0.1, "denoise": 0.3, "decode": 0.1, "picture": 0.05},
        picture=f"pictures/{policy}/prompt{prompt}.png",
        sha256=hashlib.sha256(f"{policy}{prompt}".encode()).hexdigest(),
        quality=None if policy == "bf16_base" else quality,
    )


def save_pictures(record: Record, folder: Path) -> None:
    """Noise of the right size for every request of the record."""
    random = np.random.default_rng(0)
    for variant in record.variants:
        for request in variant.requests:
            path = folder / request.picture
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), np.uint8)).save(path)
