"""How a checkpoint's numbers were chosen, as it states itself, and what can be derived anew."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from zimage_fp8.checkpoint.dialects import StoredQuantization
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.writer import CALIBRATION_FILE
from zimage_fp8.errors import ModelError
from zimage_fp8.quant.calibrate import read_calibration
from zimage_fp8.quant.fold import Factors, channel_factors
from zimage_fp8.quant.method import Method, folded_modules

METHOD = TypeAdapter(Method)


def stated_method(facts: Mapping[str, object]) -> Method:
    """The method in a checkpoint's facts; the default where none is stated. Raises ModelError."""
    try:
        return METHOD.validate_python(facts.get("method", {}))
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ModelError(f"zimage_fp8.method cannot be read: {message}") from None


def stored_factors(folder: Path, stored: StoredQuantization, original: ShardReader) -> Factors:
    """The channel factors that a checkpoint (a pipeline folder) was folded with.

    original: the unquantized transformer. They follow from its weights and the calibration beside
    the checkpoint. Raises ZImageError when that calibration is missing or damaged.
    """
    modules = folded_modules(stored.plan, stated_method(stored.facts))
    if not modules:
        return {}
    calibration = read_calibration(folder / CALIBRATION_FILE)
    return channel_factors(modules, original.read, calibration.channel_amax)
