"""A checkpoint against what it was made from: the unquantized model and the calibration."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zimage_fp8.checkpoint.findings import Finding, OpenCheckpoint
from zimage_fp8.checkpoint.provenance import stored_factors
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.writer import CALIBRATION_FILE, WeightScales
from zimage_fp8.errors import ZImageError
from zimage_fp8.numerics import QMAX, QuantSpec, dequantize
from zimage_fp8.quant.calibrate import Calibration, read_calibration
from zimage_fp8.quant.fold import Factors
from zimage_fp8.quant.linear import quantize_weight, rotated

# ‖error‖ / ‖weight‖ of nano's layers in E4M3: 2.7 % to nearest, 2.9 to 3.7 % by statistics.
MAX_ROUNDING_ERROR = 0.1


def check_against(checkpoint: OpenCheckpoint, source: Path) -> Iterator[Finding]:
    """Every scale and code recomputed from the BF16 weights, every kept tensor compared.

    Codes that were not rounded to nearest cannot be recomputed; their error must be small.
    """
    reader, plan, method = checkpoint.reader, checkpoint.plan, checkpoint.method
    with ShardReader(source / "transformer") as original:
        shapes = {name: info.shape for name, info in original.infos.items()}
        if any(info.shape != shapes.get(n, info.shape) for n, info in reader.infos.items()):
            yield Finding("error", "tensors", f"{source.name} is a model of other shapes")
            return
        try:
            factors = stored_factors(checkpoint.folder, checkpoint.stored, original)
            if method.fold:
                calibration = read_calibration(checkpoint.folder / CALIBRATION_FILE)
                yield from check_input_scales(checkpoint, calibration, factors)
        except ZImageError as error:
            yield Finding("error", CALIBRATION_FILE, f"{error}; its channel scales are needed")
            return
        scales = WeightScales(original, factors)
        for name in reader.infos:
            layer, _, leaf = name.rpartition(".")
            spec = plan.spec(layer) if layer in plan.entries else None
            if spec is None:
                if name not in original.infos:
                    yield Finding("error", name, f"is not in {source}")
                elif not _equal(reader.read(name), scales.read(name)):
                    yield Finding("error", name, "is kept in BF16 but differs from the source")
            elif leaf == "weight":
                scale = reader.read(f"{layer}.weight_scale")
                expected = scales.scale(layer, plan)
                if not _equal(scale.reshape(expected.shape), expected):
                    message = f"is not amax/{QMAX[spec.format]:g} of the source"
                    yield Finding("error", f"{layer}.weight_scale", message)
                elif method.rounding != "nearest":
                    far = _relative_error(reader.read(name), expected, scales.read(name), spec)
                    if not far < MAX_ROUNDING_ERROR:
                        message = f"is {far:.0%} away from the source, more than rounding explains"
                        yield Finding("error", name, message)
                elif not _equal(
                    reader.read(name), quantize_weight(scales.read(name), expected, spec)
                ):
                    yield Finding("error", name, "codes differ from the source quantized anew")


def check_input_scales(
    checkpoint: OpenCheckpoint, calibration: Calibration, factors: Factors
) -> Iterator[Finding]:
    """Every static input scale recomputed from the calibration it was made with."""
    headroom = checkpoint.method.headroom
    for layer in checkpoint.plan.quantized:
        spec, name = checkpoint.plan.spec(layer), f"{layer}.input_scale"
        if spec is None or not spec.is_static or name not in checkpoint.reader.infos:
            continue
        expected = calibration.input_scale(layer, spec, factors, headroom)
        if not _equal(checkpoint.reader.read(name), expected):
            times = f"{headroom:g}·" if headroom != 1 else ""
            message = f"is not {times}amax/{QMAX[spec.format]:g} of the calibration"
            yield Finding("error", name, message)


def _relative_error(codes: Tensor, scale: Tensor, weight: Tensor, spec: QuantSpec) -> float:
    exact = rotated(weight, spec).float()
    w_hat = dequantize(codes, scale[:, None] if scale.ndim else scale)
    return float((w_hat - exact).norm() / exact.norm())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
