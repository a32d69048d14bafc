"""Checkpoints as far as a card reads them: what each says of its own making, and no weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from fake_record import DIGEST, save_pictures
from zimage_fp8.bench.record import Record, write_record
from zimage_fp8.checkpoint.own_format import METHOD
from zimage_fp8.quant.policy import STATIC_POLICIES

CALIBRATION = {
    "prompts": 8, "forwards": 9, "sigmas": [1.0, 0.9545454, 0.3, 0.0, 0.0], "size": "1024x1024",
    "seed": 0, "dtype": "bfloat16", "versions": {},
}  # fmt: skip


STATIC = {"format": "e4m3", "weight": "per-tensor", "activation": "static-per-tensor"}
ROW = {"format": "e4m3", "weight": "per-channel", "activation": "dynamic-per-token"}


INT8 = {
    "format": "int8",
    "weight": "per-channel",
    "activation": "dynamic-per-token",
    "rotate": True,
}


def make_checkpoint(
    folder: Path, policy: str, base_model: str, *, is_own_format: bool = False, **changes: object
) -> None:
    facts = {
        "policy": policy,
        "version": "0.1.0",
        "base_model": base_model,
        "base_fingerprint": "0",
        "calibration": CALIBRATION,
        "calibration_digest": DIGEST,
        "rules": [
            {"layers": "*.adaLN_modulation.*", "spec": None, "why": ""},
            {"layers": "*.feed_forward.w[123]", "spec": STATIC, "why": ""},
        ],
        **changes,
    }
    (folder / "transformer").mkdir(parents=True)
    said = {"quant_method": "modelopt", "quant_algo": "FP8"}
    quantization = {**({"quant_method": METHOD} if is_own_format else said), "zimage_fp8": facts}
    config = {"quantization_config": quantization}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


def make_family(
    folder: Path, record: Record, policies: Sequence[str] = tuple(STATIC_POLICIES)
) -> None:
    """A finished benchmark: record.json, pictures, and checkpoints/<policy> in `folder`."""
    save_pictures(record, folder)
    write_record(record, folder / "record.json")
    for policy in policies:
        make_checkpoint(folder / "checkpoints" / policy, policy, record.model)
