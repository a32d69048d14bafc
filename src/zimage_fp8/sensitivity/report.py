"""Sensitivities for people: a table for the terminal, heat maps as SVG."""

from collections.abc import Sequence
from pathlib import Path

from zimage_fp8.evaluate import psnr_db
from zimage_fp8.heatmap import HeatMap
from zimage_fp8.layout import KINDS
from zimage_fp8.sensitivity.result import Sensitivity
from zimage_fp8.sensitivity.units import ALL

SHOWN = 8  # the worst so many units of a scan are listed
EVERY = "all blocks"
BLOCK = "block"


def report_text(found: Sensitivity, files: Sequence[Path]) -> str:
    """Per scan the units, worst first, with what they would cost the picture alone."""
    settings = found.settings
    prompts = settings["prompts"]
    assert isinstance(prompts, list)
    lines = [
        f"{settings['model']}, policy {settings['policy']}, prompts: {len(prompts)}, "
        f"{settings['size']}, {settings['steps']} steps, {settings['dtype']} elsewhere",
        f"everything quantized: {_db(found, ALL)} (latent error {found.latent_error(ALL):.2%})",
    ]
    for scan, title in TITLES.items():
        if keys := found.of(scan):
            lines += ["", f"{title}, one at a time:"]
            lines += _table(found, keys)
    return "\n".join([*lines, "", *map(str, files)])


TITLES = {
    "kinds": "kinds of layer",
    "blocks": "blocks",
    "steps": "denoise steps (caption: the context refiner, once per prompt)",
    "text": "text encoder, not part of any policy",
    "cells": "single layers",
}


def _table(found: Sensitivity, keys: Sequence[str]) -> list[str]:
    """Steps in their order, everything else worst first; shares are of the summed squared error."""
    is_ordered = keys[0].startswith("steps:")
    ranked = list(keys) if is_ordered else sorted(keys, key=found.mse, reverse=True)
    total = sum(map(found.mse, keys))
    shown = ranked if is_ordered else ranked[:SHOWN]
    rows = [
        f"  {key.partition(':')[2]:<24} {_db(found, key):>9}  {found.mse(key) / total:>5.0%} of "
        f"the error  latent {found.latent_error(key):.2%}"
        for key in shown
        if total
    ]
    rest = len(ranked) - len(shown)
    return [*rows, f"  … and {rest} more"] if rest else rows


def _db(found: Sensitivity, key: str) -> str:
    return f"{psnr_db(found.mse(key)):.1f} dB"


def heat_maps(found: Sensitivity) -> list[HeatMap]:
    """Block by kind, with whole blocks and whole kinds at the edges; then the steps."""
    values: dict[tuple[str, str], float] = {}
    for key in (*found.of("cells"), *found.of("blocks"), *found.of("kinds"), ALL):
        scan, _, name = key.partition(":")
        row, column = _place(scan, name)
        values[row, column] = psnr_db(found.mse(key))
    rows = list(dict.fromkeys(row for row, _ in values if row != EVERY))
    policy, prompts = found.settings["policy"], found.settings["prompts"]
    assert isinstance(prompts, list)
    title = f"PSNR (dB) with only this in 8 bits: {policy}, prompts: {len(prompts)}"
    maps = [HeatMap(title, [*rows, EVERY], [*KINDS.values(), BLOCK], values, is_bad_low=True)]
    if steps := found.of("steps"):
        names = {key: key.partition(":")[2] for key in steps}
        column = "PSNR"
        shown = {(names[key], column): psnr_db(found.mse(key)) for key in steps}
        maps.append(HeatMap("one step", list(names.values()), [column], shown, is_bad_low=True))
    return maps


def _place(scan: str, name: str) -> tuple[str, str]:
    if scan == "cells":
        block, _, kind = name.partition(" ")
        return block, kind
    return {"blocks": (name, BLOCK), "kinds": (EVERY, name)}.get(scan, (EVERY, BLOCK))
