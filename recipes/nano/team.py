"""One process, or several that torchrun started with one GPU each; the same code either way."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """Averages gradients and agrees on the time; alone, both cost nothing."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # gloo for tensors on the CPU: the clock is agreed on without waiting for the GPU
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=8))

    def average(self, tensors: list[Tensor]) -> None:
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.size)

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
