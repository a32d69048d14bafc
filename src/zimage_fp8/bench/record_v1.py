"""Records of schema version 1 in the words of version 2."""

from collections.abc import Iterator
from itertools import count
from typing import Any

Raw = dict[str, Any]  # JSON before it is validated

PROFILE_1 = {"name": "version 1", "digest": ""}  # version 1 had no profiles
ORDER_REASON = "Version 1 of the benchmark measured one variant after the other."


def from_version_1(raw: Raw) -> Raw:
    """The same record as version 2, to be validated. Raises KeyError and TypeError if damaged."""
    old = dict(raw["parameters"])
    size = f"{old.pop('width')}x{old.pop('height')}"
    parameters = {**old, "sizes": [size], "strata": ["all"] * len(old["prompts"])}
    positions = count()
    variants = [_variant(variant, size, positions) for variant in raw["variants"]]
    kept = {key: value for key, value in raw.items() if key != "variants"}
    return {
        **kept,
        "schema_version": 2,
        "profile": PROFILE_1,
        "parameters": parameters,
        "passes": [
            {
                "name": "A",
                "attention": None,
                "order": "sequential",
                "order_reason": ORDER_REASON,
                "variants": variants,
            }
        ],
    }


def _variant(raw: Raw, size: str, positions: Iterator[int]) -> Raw:
    for _ in raw["warmup_latencies_s"]:
        next(positions)
    rows = [dict(request) for request in raw["requests"]]
    sigmas = [row.pop("sigmas") for row in rows]
    return {
        **raw,
        "name": raw["policy"],
        "attention": raw["server"].get("attention"),
        "cold_start_s": None,
        "sigmas": sigmas[0] if sigmas else [],
        "requests": [
            # Version 1 did not write down when a request was sent.
            {**row, "size": size, "is_timed": True, "position": next(positions), "sent_s": None}
            for row in rows
        ],
    }
