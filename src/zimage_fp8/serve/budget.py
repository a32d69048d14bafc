"""How much memory models will take, from headers alone, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import linear_shapes, read_config, tensor_shapes
from zimage_fp8.model.loading import is_quantized
from zimage_fp8.provenance import available_memory
from zimage_fp8.quant.policy import Policy, resolve

GIB = 2**30


@dataclass(frozen=True)
class Available:
    """Bytes that may still be allocated, and where."""

    num_bytes: int
    where: str


def transformer_bytes(folder: Path, policy: Policy | None, dtype: torch.dtype) -> int:
    """Bytes of a transformer's weights once loaded: stored as they are, or under a policy.

    Scales are left out: they are less than a thousandth. Raises ModelError, CheckpointError or
    UsageError for what loading would refuse, too.
    """
    if is_quantized(folder):
        with ShardReader(folder / "transformer") as reader:
            return sum(info.num_bytes for info in reader.infos.values())
    config, _ = read_config(folder / "transformer")
    in_8_bits = set(resolve(policy, linear_shapes(config)).quantized) if policy else set()
    return sum(
        prod(shape) * (1 if name.removesuffix(".weight") in in_8_bits else dtype.itemsize)
        for name, shape in tensor_shapes(config).items()
    )


def shared_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the text encoder and the VAE's decoder once loaded."""
    num_elements = 0
    for part, prefix in (("text_encoder", ""), ("vae", "decoder.")):
        with ShardReader(folder / part) as reader:
            num_elements += sum(
                info.num_elements for name, info in reader.infos.items() if name.startswith(prefix)
            )
    return num_elements * dtype.itemsize


def available(device: torch.device, share: float | None = None) -> Available | None:
    """What is free on the GPU, at most `share` of it, or in main memory; None when unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Available(min(free, int(total * (share or 1))), f"the GPU ({device})")
    num_bytes = available_memory()
    return None if num_bytes is None else Available(num_bytes, "main memory")


def check_fits(parts: Mapping[str, int], room: Available | None) -> None:
    """Raise ZImageError, with every part's size, when the weights alone do not fit."""
    needed = sum(parts.values())
    if room is None or needed <= room.num_bytes:
        return
    sizes = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
    raise ZImageError(
        f"the weights need {needed / GIB:.2f} GiB ({sizes}), but {room.where} has "
        f"{room.num_bytes / GIB:.2f} free",
        hint="serve fewer policies, or smaller ones; zimage-fp8 doctor shows the memory",
    )
