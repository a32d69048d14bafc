"""docs/engine.md's tables, from results as the benchmarks write them; the GPU always named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import engine_tables
import gpu

FACTS = {
    "gpu": {"name": "NVIDIA H200"},
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "command": ["engine.py", "--out", "engine.json"],
    "weights": "random: speed and memory are real, pictures are meaningless",
    "steps": 8,
    "caption_tokens": 64,
}
LOOP = {
    "policy": "full",
    "size": "1024x512",
    "attention": "fa3",
    "gemm": {"w13": "cublas", "w2": "triton-tma"},
    "ms": 217.4,
    "ms_p10": 216.1,
    "ms_p90": 225.9,
    "sm_clock_mhz": 1590.0,
    "power_w": 689.9,
}
GEMM = {"layer": "w2", "kind": "e4m3-scalar", "rows": 2112, "implementation": "cublas"}
FUSED = {"kernel": "norm", "output": "bf16", "rows": 2112}
REQUEST = {
    "variant": "full",
    "start_to_first_picture_s": 17.25,
    "new_size_first_picture_s": 0.5,
    "sizes": {
        "1024x512": {
            "p50_ms": 228.0,
            "p90_ms": 240.0,
            "stages_ms": {"encode": 5.0, "denoise": 200.0},
            "peak_bytes": 13 * 2**30,
        }
    },
}
TABLES = (
    (engine_tables.loops_table, "engine.json"),
    (engine_tables.attention_table, "engine-attention.json"),
    (engine_tables.kernels_table, "kernels.json"),
    (engine_tables.heads_table, "kernels.json"),
    (engine_tables.request_table, "gpu-request.json"),
    (engine_tables.baselines_table, "baselines.json"),
    (engine_tables.turns_table, "engine-turns.json"),
)


def write(folder: Path, name: str, **rows: object) -> Path:
    (folder / name).write_text(json.dumps({**FACTS, **rows}))
    return folder


@pytest.mark.parametrize(("table", "name"), TABLES)
def test_what_was_not_measured_says_so(
    table: Callable[[Path], str], name: str, tmp_path: Path
) -> None:
    assert table(tmp_path) == "Not measured yet."


def test_a_loop_names_gpu_weights_clock_and_what_ran(tmp_path: Path) -> None:
    text = engine_tables.loops_table(write(tmp_path, "engine.json", loops=[LOOP]))
    assert "**NVIDIA H200**; weights random: speed and memory are real" in text
    assert "8 forwards, batch 1, a caption of 64 tokens" in text
    row = "| `full` | 1024×512 | 217 | 216 to 226 | 1590 | 690 | fa3; w13 cublas, w2 triton-tma |"
    assert row in text
    assert "commit abc · `python benchmarks/engine.py --out engine.json`" in text


def test_kernels_show_the_fastest_product_and_no_speed_where_wrong(tmp_path: Path) -> None:
    gemm = [
        GEMM | {"us": 100.0, "tflops": 1661.0},
        GEMM | {"implementation": "triton", "us": 90.0, "tflops": 1845.6},
        GEMM | {"implementation": "triton-tma", "refused": "shared memory"},
    ]
    right = {"us": 10.0, "gb_per_s": 1300.0, "share_of_copy": 0.5, "reference_us": 80.0}
    fused = [
        {"kernel": "device copy", "gb_per_s": 2600.0},
        FUSED | right,
        FUSED | {"kernel": "gated", "wrong": True, "error": 0.5},
        FUSED
        | {"kernel": "pixel_attention", "us": 1720.0, "tflops": 320.0}
        | {"share_of_product": 0.4, "reference_us": 4120.0},
    ]
    text = engine_tables.kernels_table(write(tmp_path, "kernels.json", gemm=gemm, fused=fused))
    assert "| `w2` | e4m3-scalar | 2,112 | triton | 90 | 1,846 |  |" in text
    assert "| `norm` | bf16 | 2,112 | 10 | 1,300 | 50% | 80 |" in text
    assert "| `gated` | bf16 | 2,112 | wrong |  |  |  |" in text
    attention = (
        "| `pixel_attention` | bf16 | 2,112 | 1720 | 320 TFLOP/s | 40% of a product | 4120 |"
    )
    assert attention in text
    assert "A device copy moves 2,600 GB/s" in text
    assert "**NVIDIA H200**" in text


def test_requests_show_stages_memory_and_start(tmp_path: Path) -> None:
    text = engine_tables.request_table(write(tmp_path, "gpu-request.json", requests=[REQUEST]))
    row = "| `full` | 1024×512 | 228 | 240 | encode 5, denoise 200 | 13.00 | 17.2 | 0.50 |"
    assert row in text
    assert "**NVIDIA H200**; weights random" in text


DEVICE_COPY = {"kernel": "device copy", "gb_per_s": 2600.0}


def test_the_product_that_is_fastest_back_to_back_wins(tmp_path: Path) -> None:
    gemm = [
        GEMM | {"us": 100.0, "tflops": 1661.0, "sustained_us": 120.0},
        GEMM | {"implementation": "triton", "us": 90.0, "tflops": 1846.0, "sustained_us": 130.0},
        GEMM | {"implementation": "triton-tma", "us": 80.0, "tflops": 2076.0},
    ]
    write(tmp_path, "kernels.json", gemm=gemm, fused=[DEVICE_COPY])
    text = engine_tables.kernels_table(tmp_path)
    assert "| `w2` | e4m3-scalar | 2,112 | cublas | 100 | 1,661 | 120 |" in text


def test_a_run_that_ended_before_the_fused_kernels_shows_its_products(tmp_path: Path) -> None:
    write(tmp_path, "kernels.json", gemm=[GEMM | {"us": 100.0, "tflops": 1661.0}])
    assert "| `w2` | e4m3-scalar | 2,112 | cublas |" in engine_tables.kernels_table(tmp_path)


def test_heads_in_one_kernel_stand_beside_two(tmp_path: Path) -> None:
    row = GEMM | {"kind": "bf16-heads", "tile": None, "us": 248.0, "sustained_us": 286.4}
    wide = row | {"tile": {"m": 192, "n": 192}, "us": 241.9, "sustained_us": 276.5}
    short = {**GEMM, "kind": "bf16-heads", "tile": {"m": 128, "n": 192}, "us": 277.0}
    refused = {**GEMM, "kind": "int8-heads", "tile": {"m": 128, "n": 192}, "refused": "why"}
    rows = [row, wide, short, refused]
    text = engine_tables.heads_table(write(tmp_path, "kernels.json", gemm=rows))
    assert "| format | rows | two kernels, µs | 192 × 192, µs | 128 × 192, µs |" in text
    assert "| bf16 | 2,112 | 248, 286 | 242, 276 | 277, – |" in text
    assert "| int8 | 2,112 |  |  |  |" in text
    assert "**NVIDIA H200**" in text
    write(tmp_path, "kernels.json", gemm=[GEMM | {"us": 100.0}])
    assert engine_tables.heads_table(tmp_path) == "Not measured yet.", "a run without heads"


def test_what_a_loop_does_with_other_products_is_shown(tmp_path: Path) -> None:
    tile = {"m": 192, "n": 192, "group": 22}
    w13 = {"columns": 20480, "depth": 3840, "implementation": "wgmma-gated", "tile": tile}
    w2 = {"columns": 3840, "depth": 10240, "implementation": "cublas", "tile": None}
    loop = {"policy": "full", "size": "1024x512", "table_ms": [200.0, 200.0], "taken": False}
    rows = [
        {**loop, "what": "table", "choices": [], "ms": [200.0, 200.0]},
        {**loop, "what": "slow", "choices": [w2], "ms": [204.0, 206.0]},
        {**loop, "what": "fast", "choices": [w13], "ms": [198.0, 198.0], "taken": True},
        {**loop, "what": "together", "choices": [w13], "ms": [198.4, 198.4], "taken": True},
        {**loop, "what": "table", "choices": [], "ms": [430.0], "size": "1024x1024"},
    ]
    text = engine_tables.turns_table(write(tmp_path, "engine-turns.json", turns=rows))
    fast = "`w13` by wgmma-gated 192 × 192 in 22"
    assert f"| 200.0 | 2 | {fast}: -1.00% | `w2` by cublas: +2.50% | {fast}: -0.80% |" in text
    assert "| `full` | 1024×1024 | 430.0 | 0 |  |  |  |" in text


def test_targets_stand_beside_every_machine_that_was_measured(tmp_path: Path) -> None:
    loops = [
        LOOP | {"policy": policy, "size": size, "ms": 205.4}
        for policy in engine_tables.LOOP_TARGETS_MS
        for size in engine_tables.SIZES
    ]
    at = {"p50_ms": 229.0, "stages_ms": {"encode": 6.2, "decode": 15.0, "picture": 3.0}}
    at |= {"peak_bytes": 14.2 * 2**30}
    asked = [
        REQUEST | {"variant": variant, "sizes": dict.fromkeys(engine_tables.SIZES, at)}
        for variant in engine_tables.PEAK_TARGETS_GIB
    ]
    write(tmp_path, "engine.json", loops=loops)
    assert engine_tables.targets_table(tmp_path) == engine_tables.NOT_YET  # no requests
    write(tmp_path, "gpu-request.json", requests=asked)
    alone = engine_tables.targets_table(tmp_path)
    assert "|  |  | 1024×512, H200 | target | 1024×1024, H200 | target |" in alone
    assert "| denoise loop, `full` | ms | 205.4 ✗ | 195 | 205.4 | 425 |" in alone
    # Before it, what was measured on an H100: one loop less, and a second server, which holds more
    # and is asked when kernels are compiled; a start that quantizes first is no start.
    older = [one | {"ms": 99.0} for one in loops if one["policy"] != "fp8-row"]
    write(tmp_path, "engine-h100.json", gpu={"name": "NVIDIA H100 80GB HBM3"}, loops=older)
    again = asked[0] | {
        "variant": "full-again",
        "start_to_first_picture_s": 9.0,
        "sizes": dict.fromkeys(engine_tables.SIZES, at | {"p50_ms": 231.0, "peak_bytes": 2**30}),
    }
    quantizes = again | {"variant": "int8-rot", "start_to_first_picture_s": 46.0}
    requests = [*asked, again, quantizes]
    write(tmp_path, "gpu-request-h100.json", gpu={"name": "NVIDIA H100"}, requests=requests)
    both = engine_tables.targets_table(tmp_path)
    assert "|  |  | 1024×512, H100 | 1024×512, H200 | target |" in both
    assert "| denoise loop, `full` | ms | 99.0 | 205.4 ✗ | 195 | 99.0 | 205.4 | 425 |" in both
    assert "| denoise loop, `fp8-row` | ms |  | 205.4 ✗ | 205 |  | 205.4 | 450 |" in both
    assert "`full`, p50 | ms | 231.0 ✗ | 229.0 | 230 | 231.0 | 229.0 | 490 |" in both
    assert "| of which encode | ms | 6.2 ✗ | 6.2 ✗ | 6 | 6.2 ✗ | 6.2 ✗ | 6 |" in both
    assert "| `full` | GiB | 14.20 ✗ | 14.20 ✗ | 14 |" in both.replace("peak GPU memory, ", "")
    assert "| start to first picture | s | 9.0 to 17.2 | 17.2 to 17.2 | 20 |  |  |  |" in both


def test_attention_in_8_bits_is_compared_with_16_in_the_same_run(tmp_path: Path) -> None:
    loops = [LOOP | {"attention": "fa3", "ms": 200.0}, LOOP | {"attention": "fa3-fp8", "ms": 190.0}]
    text = engine_tables.attention_table(write(tmp_path, "engine-attention.json", loops=loops))
    assert "| policy | size | `fa3`, ms | `fa3-fp8`, ms |" in text
    assert "| `full` | 1024×512 | 200.0 | 190.0 (-5.0%) |" in text


def test_baselines_show_every_part_and_count_forwards(tmp_path: Path) -> None:
    parts = {part: {"ms": 100.0} for part in ("encode", "decode", "call")}
    row = {"what": "diffusers, BF16, eager", "size": "1024x512", "nfe": 8, "first_loop_ms": 14750}
    row |= parts | {"loop": {"ms": 638.6, "sm_clock_mhz": 1500.0}}
    text = engine_tables.baselines_table(write(tmp_path, "baselines.json", baselines=[row]))
    shown = "| diffusers, BF16, eager | 1024×512 | 639 | 100 | 100 | 100 | 8 | 14.8 | 1500 |"
    assert shown in text


def test_a_blocks_arithmetic_is_that_of_the_layout(tmp_path: Path) -> None:
    text = engine_tables.block_table(tmp_path)
    assert "| `to_qkv`: [2,112, 3,840] × [3,840, 11,520] | 187 | 153 | 101 |" in text
    assert "| attention | 69 |" in text


def test_a_result_does_not_say_where_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "argv", ["/somewhere/engine.py", "--out", "/a/b.json", "full=/c"])
    assert gpu.envelope()["command"] == ["engine.py", "--out", "b.json", "full=/c"]
