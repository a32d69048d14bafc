"""Where a picture's time goes: real runs on the CPU, and the arithmetic behind the rates."""

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zimage_fp8.engine import EngineOptions, load_pipeline, work
from zimage_fp8.engine.profile import (
    GAPS,
    DeviceType,
    Profile,
    Span,
    group_kernels,
    group_of,
    profile,
    spans_of,
)
from zimage_fp8.engine.work import ATTENTION, CONVOLUTION, DATA_SHEETS, GEMM, Ceilings, Work
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.generate import check_path, profile_to
from zimage_fp8.model.drawing import STAGE_MARK
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.render import profile_text

REQUEST = ImageRequest("a red apple on a teal background", 32, 48, steps=2)
FLASH = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::"


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), dtype="bfloat16", policy="online_fp8", device="cpu")


@pytest.fixture(scope="module")
def found(tiny: Pipeline) -> Profile:
    return profile(tiny, REQUEST, lambda image: image.pixels.tobytes())


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN", GEMM),
        ("nvjet_sm90_tst_64x24_64x16_1x4_h_bz_bias_TNT", GEMM),
        ("_tma_kernel", GEMM),
        ("_pointer_kernel", GEMM),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8", GEMM),
        (FLASH, ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", ATTENTION),
        ("_norm_kernel", "_norm_kernel"),
        ("_gated_kernel", "_gated_kernel"),
        ("row_kernel", "row_kernel"),
        ("wgmma_kernel", GEMM),
        ("_qk_norm_rope_kernel", "_qk_norm_rope_kernel"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", CONVOLUTION),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Unknown)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::neg", "elementwise"),
        ("aten::mm", GEMM),
        ("aten::_scaled_mm", GEMM),
        ("aten::addmm", GEMM),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::mkldnn_convolution", CONVOLUTION),
        ("aten::copy_", "copies"),
        ("aten::nonzero", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name: str, group: str) -> None:
    assert group_of(name) == group


def test_stages_and_kernels_of_a_real_picture(found: Profile) -> None:
    assert [stage.stage for stage in found.stages] == ["encode", "denoise", "decode", "picture"]
    assert all(stage.ms > 0 for stage in found.stages)
    denoise = {row.group: row for row in found.kernels if row.stage == "denoise"}
    assert {GEMM, ATTENTION, GAPS} <= set(denoise)
    assert any(row.group == CONVOLUTION and row.stage == "decode" for row in found.kernels)
    # 2 steps through 4 products of each block, the latent's entrance and exit, and the timestep's
    assert denoise[GEMM].launches >= 2 * 4
    assert denoise[GEMM].unit == "TFLOP/s"
    assert found.nfe == 2


def test_kernels_and_gaps_add_up_to_the_picture(found: Profile) -> None:
    profiled = sum(stage.profiled_ms for stage in found.stages if stage.stage != "picture")
    assert math.isclose(sum(row.ms for row in found.kernels), profiled, rel_tol=0.02)
    assert math.isclose(sum(row.share for row in found.kernels), 1, rel_tol=0.02)


def test_the_cpu_has_no_ceiling_and_says_so(found: Profile) -> None:
    assert found.ceilings is None
    assert all(row.of_ceiling is None for row in found.kernels)
    assert profile_text(found).endswith("ceiling: none is known for cpu")


def test_a_profile_is_saved_as_json(tiny: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    found = profile_to(path, tiny, replace(REQUEST, steps=1))
    saved = json.loads(path.read_text())
    assert saved["runs"]["policy"] == "online_fp8"
    assert [row["group"] for row in saved["kernels"]] == [row.group for row in found.kernels]
    assert saved["stages"][-1]["stage"] == "picture"


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"profile .*x\.txt must end in \.json"):
        check_path(tmp_path / "x.txt", ".json", "profile")
    with pytest.raises(ZImageError, match="not a writable folder"):
        check_path(tmp_path / "none" / "x.json", ".json", "profile")


@pytest.mark.parametrize("policy", ["bf16_base", "online_fp8"])
def test_products_and_attention_equal_what_pytorch_counts(tiny_model: Path, policy: str) -> None:
    """Against the plain model's own calls, without the timestep's products of one row."""
    pipeline = load_pipeline(str(tiny_model), dtype="bfloat16", policy=policy, device="cpu")
    with torch.inference_mode():
        velocity = pipeline.velocity(REQUEST)
        latent = pipeline.draw_latent(REQUEST)
        # As plain products: PyTorch does not count its fused attention on the CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            velocity(latent, 0.5)
    config = pipeline.transformer.config
    blocks = config.n_layers + config.n_refiner_layers
    timestep = 2 * (256 * 1024 + 1024 * config.time_dim)
    timestep += 2 * config.time_dim * config.dim * (4 * blocks + 1)
    expected = work.denoise_work(pipeline, replace(REQUEST, steps=1))
    counted = sum(expected[GEMM].flops.values()) + sum(expected[ATTENTION].flops.values())
    assert counted == counter.get_total_flops() - timestep
    assert set(expected[GEMM].flops) == ({"bf16"} if policy == "bf16_base" else {"bf16", "e4m3"})
    assert ("_encode_kernel" in expected) == (policy != "bf16_base")


def test_rows_in_8_bits_move_as_much_by_another_kernel(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper one kernel does what two do elsewhere, but for a stack's first norm, last sum."""
    apart = work.denoise_work(tiny, REQUEST)
    monkeypatch.setattr(work, "program_for", lambda out, *_, **__: out.spec)
    together = work.denoise_work(tiny, REQUEST)
    both = ("_norm_kernel", "_encode_kernel")
    moved = sum(apart[kernel].num_bytes for kernel in both)
    assert "row_kernel" not in apart
    assert "_encode_kernel" not in together
    assert together["row_kernel"].num_bytes + together["_norm_kernel"].num_bytes == moved
    assert together["row_kernel"].num_bytes > together["_norm_kernel"].num_bytes > 0


def test_guidance_doubles_the_work(tiny: Pipeline) -> None:
    once = work.denoise_work(tiny, REQUEST)
    twice = work.denoise_work(tiny, replace(REQUEST, guidance=1.0, negative_prompt=REQUEST.prompt))
    for group, one in once.items():
        assert twice[group].num_bytes == 2 * one.num_bytes
        assert twice[group].flops == {format: 2 * n for format, n in one.flops.items()}


def test_the_decoders_convolutions_are_counted_without_running_them(tiny: Pipeline) -> None:
    small, large = (
        work.decode_work(tiny, replace(REQUEST, width=side, height=side))[CONVOLUTION].flops["bf16"]
        for side in (64, 128)
    )
    assert large == 4 * small > 0


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_the_decoders_work_is_that_of_the_decoder_that_runs(tiny_model: Path, engine: str) -> None:
    options = EngineOptions(engine)
    pipeline = load_pipeline(str(tiny_model), options=options, dtype="float32", device="cpu")
    request = replace(REQUEST, width=512, height=512)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        pipeline.decoder.decode(pipeline.draw_latent(request))
    ran = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "convolution" in str(op)
    )
    stated = work.decode_work(pipeline, request)[CONVOLUTION].flops["fp32"]
    assert stated == pytest.approx(ran, rel=0.03)  # the fast one's edges are not stated


def test_a_share_of_the_ceiling_is_time_against_time() -> None:
    limits = Ceilings({"bf16": 500.0, "e4m3": 1000.0}, 2000.0, "made up")
    assert limits.least_ms(Work({"bf16": 5e11, "e4m3": 1e12})) == pytest.approx(2.0)
    assert limits.least_ms(Work(num_bytes=4e9)) == pytest.approx(2.0)
    assert limits.least_ms(Work({"int8": 1.0})) is None
    spans = [
        Span("_norm_kernel", "denoise", 0, 4000, 4000),
        Span(FLASH, "denoise", 3000, 9000, 6000),
    ]
    known = {"denoise": {"_norm_kernel": Work(num_bytes=4e9), ATTENTION: Work({"bf16": 1.5e12})}}
    rows = list(group_kernels(spans, {"denoise": 10.0}, known, limits))
    assert [row.group for row in rows] == [ATTENTION, "_norm_kernel", GAPS]
    assert (rows[0].rate, rows[0].unit, rows[0].of_ceiling) == (pytest.approx(250), "TFLOP/s", 0.5)
    assert (rows[1].rate, rows[1].unit, rows[1].of_ceiling) == (pytest.approx(1000), "GB/s", 0.5)
    assert rows[2].ms == pytest.approx(1.0)  # 10 ms, of which 9 covered: overlap counts once


def test_a_kernel_belongs_to_the_stage_whose_mark_follows() -> None:
    def event(name: str, start: float, end: float, on: object = DeviceType.CUDA) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=on)

    events = [
        event("first", 0, 5),
        event(f"{STAGE_MARK}encode", 10, 11, DeviceType.CPU),
        event("second", 12, 30),
        event(f"{STAGE_MARK}denoise", 12, 30),  # the GPU's echo of a mark is no kernel
        event(f"{STAGE_MARK}denoise", 31, 32, DeviceType.CPU),
        event("after", 40, 41),
    ]
    spans = spans_of(events, "cuda")  # type: ignore[arg-type]
    assert [(span.name, span.stage) for span in spans] == [
        ("first", "encode"),
        ("second", "denoise"),
    ]


def test_ceilings_are_measured_or_of_the_data_sheet_or_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L40S")
    assert work.ceilings(torch.device("cuda")) == DATA_SHEETS["NVIDIA L40S"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GB10")
    assert work.ceilings(torch.device("cuda")) is None
    assert work.ceilings(torch.device("cpu")) is None


def test_measured_ceilings_come_before_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/kernels.py --ceilings writes them, once it has run on a GPU."""
    measured = {"tflops": {"bf16": 800.0, "e4m3": 1500.0}, "gb_per_s": 2700.0}
    monkeypatch.setattr(work.json, "loads", lambda _: {"NVIDIA L40S": measured})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L40S")
    work.measured_ceilings.cache_clear()
    found = work.ceilings(torch.device("cuda"))
    work.measured_ceilings.cache_clear()
    assert found is not None
    assert (found.tflops, found.gb_per_s) == (measured["tflops"], measured["gb_per_s"])
    assert "measured on NVIDIA L40S" in found.source


def test_every_shipped_ceiling_is_below_its_data_sheet() -> None:
    file = resources.files("zimage_fp8.engine") / "ceilings.json"
    for gpu, found in json.loads(file.read_text()).items():
        sheet = DATA_SHEETS.get(gpu)
        assert set(found["tflops"]) == {"bf16", "e4m3", "int8"}
        if sheet:
            assert found["gb_per_s"] < sheet.gb_per_s
            assert all(rate < sheet.tflops[format] for format, rate in found["tflops"].items())


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_on_a_gpu_every_kernel_finds_its_group(engine: str) -> None:
    options = EngineOptions(engine=engine)
    pipeline = load_pipeline("nano", policy="fp8-row", options=options, device="cuda")
    request = ImageRequest("a red apple on a teal background", 256, 256)
    found = profile(pipeline, request, lambda image: image.pixels.tobytes())
    rows = {(row.stage, row.group): row for row in found.kernels}
    for stage in ("encode", "denoise", "decode"):
        assert rows[stage, GAPS].ms >= 0
        spent = sum(row.ms for (at, _), row in rows.items() if at == stage)
        wall = next(it.profiled_ms for it in found.stages if it.stage == stage)
        assert spent == pytest.approx(wall, rel=0.1)
    config = pipeline.transformer.config
    blocks = config.n_layers + config.n_refiner_layers
    assert rows["denoise", ATTENTION].launches >= 8 * blocks
    assert rows["denoise", GEMM].launches >= 8 * 4 * blocks
    if engine == "fused":
        for kernel in ("_norm_kernel", "_gated_kernel", "_qk_norm_rope_kernel"):
            assert rows["denoise", kernel].rate, kernel
    assert rows["decode", CONVOLUTION].rate
