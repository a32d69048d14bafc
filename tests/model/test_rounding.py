"""Statistics collected in passes: the codes do not depend on how many layers a pass can hold."""

from pathlib import Path

import pytest

from compare import same_bits
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.writer import WeightScales
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model import rounding
from zimage_fp8.model.calibration import CalibrationSettings, run_calibration
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.quant.policy import find_policy, resolve

SETTINGS = CalibrationSettings(("a house",), 64, 48, forwards=2)


def test_passes_do_not_change_codes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(str(tiny_model), device="cpu")
    calibration = run_calibration(pipeline, tiny_model, SETTINGS)
    config, _ = read_config(tiny_model / "transformer")
    plan = resolve(find_policy("int8-rot[0]"), linear_shapes(config))
    with ShardReader(tiny_model / "transformer") as reader:
        scales = WeightScales(reader)
        at_once = rounding.rounded_codes(pipeline, calibration, plan, scales)
        assert set(at_once) == set(plan.quantized)
        seen: list[tuple[int, int]] = []
        monkeypatch.setattr(rounding, "GRAM_BYTES", 1)  # one layer a pass
        one_by_one = rounding.rounded_codes(
            pipeline, calibration, plan, scales, lambda done, total: seen.append((done, total))
        )
    assert seen == [(done, 8) for done in range(1, 9)]  # four fused layers, two forwards each
    for layer, codes in at_once.items():
        same_bits(one_by_one[layer], codes)
