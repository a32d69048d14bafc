"""A calibration of the tiny model that takes a second: two prompts, three forwards."""

from pathlib import Path

from zimage_fp8.quantize import CalibrationOptions


def short_calibration(folder: Path) -> CalibrationOptions:
    """Options that write prompts and the calibration file into `folder`."""
    (folder / "prompts.txt").write_text("a red house\ntwo birds\n")
    return CalibrationOptions(
        file=folder / "calibration.json",
        prompts=folder / "prompts.txt",
        forwards=3,
        size=(64, 64),
        device="cpu",
    )
