"""Peak memory of this process since it started, each number under the name of its method.

    torch_allocated   the largest sum of live CUDA tensors
    torch_reserved    the most that torch's allocator held from the driver
    process_rss       the most main memory the process had resident (CPU only)

A process that holds a GPU reports the first two, any other the last.
"""

import resource
import sys
from pathlib import Path

import torch

KIB = 1024


def peak_memory_bytes() -> dict[str, int]:
    # As a tree, once: every `torch.cuda.max_memory_...` flattens and sorts all statistics for one.
    stats = torch.cuda.memory_stats_as_nested_dict()
    if stats and stats["reserved_bytes"]["all"]["current"]:
        return {
            "torch_allocated": stats["allocated_bytes"]["all"]["peak"],
            "torch_reserved": stats["reserved_bytes"]["all"]["peak"],
        }
    return {"process_rss": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    # Not getrusage on Linux: its ru_maxrss survives exec, so a server started by a big process
    # would report its parent's peak. VmHWM belongs to this address space alone.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB
