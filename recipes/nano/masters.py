"""BF16 parameters to compute with, FP32 masters to optimize, all in a few flat buffers.

The model's parameters become views of one BF16 buffer, so that clipping, averaging over GPUs, the
optimizer, the moving average and the cast back are each one or two kernels whatever the depth, and
training computes with exactly the numbers that ship.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.nano.team import Team

ALIGN = 64  # elements: every parameter starts on a 128-byte boundary, as fast kernels expect


@dataclass
class Group:
    """Parameters of one weight decay, and the buffers behind them."""

    names: list[str]
    parameters: list[nn.Parameter]
    compute: Tensor
    master: nn.Parameter
    average: Tensor
    master_grads: list[Tensor]


class Masters:
    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        ema: float,
    ) -> None:
        named = list(named)
        matrices = [(name, p) for name, p in named if p.ndim > 1]
        vectors = [(name, p) for name, p in named if p.ndim <= 1]
        self.groups = [_flatten(group, dtype) for group in (matrices, vectors) if group]
        decays = [weight_decay, 0.0]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [group.master], "weight_decay": decay}
                for group, decay in zip(self.groups, decays, strict=False)
            ],
            lr=lr,
            betas=betas,
            fused=self.groups[0].master.is_cuda,
        )
        self.lr, self.ema, self.steps = lr, ema, 0

    @torch.no_grad()
    def step(self, lr_factor: float, team: Team, max_norm: float = 1.0) -> Tensor:
        """Average gradients over the team, clip, update; the parameters' gradients are dropped.

        Returns the gradient norm before clipping.
        """
        for group in self.groups:
            torch._foreach_copy_(group.master_grads, [p.grad for p in group.parameters])
            for parameter in group.parameters:
                parameter.grad = None
        masters = [group.master for group in self.groups]
        team.average([master.grad for master in masters])
        norm = nn.utils.clip_grad_norm_(masters, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.step()
        # A young average must not remember the initial weights.
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
        for group in self.groups:
            group.compute.copy_(group.master)
            group.average.lerp_(group.master, 1 - decay)
        self.steps += 1
        return norm

    def drop_gradients(self) -> None:
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the parameters; training does not go on after that."""
        for group in self.groups:
            group.compute.copy_(group.average)

    def state_dict(self) -> dict:
        return {
            "steps": self.steps,
            "names": [group.names for group in self.groups],
            "masters": [group.master.detach() for group in self.groups],
            "averages": [group.average for group in self.groups],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        names = [group.names for group in self.groups]
        if state["names"] != names:
            raise ValueError("the saved training state belongs to a model of another shape")
        self.steps = state["steps"]
        for group, master, average in zip(
            self.groups, state["masters"], state["averages"], strict=True
        ):
            group.master.copy_(master)
            group.average.copy_(average)
            group.compute.copy_(group.master)
        self.optimizer.load_state_dict(state["optimizer"])


def _flatten(named: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> Group:
    device = named[0][1].device
    starts, total = [], 0
    for _, parameter in named:
        starts.append(total)
        total += -(-parameter.numel() // ALIGN) * ALIGN
    master = nn.Parameter(torch.zeros(total, device=device))
    master.grad = torch.zeros_like(master)
    compute = torch.zeros(total, device=device, dtype=dtype)
    grads = []
    with torch.no_grad():
        for (_, parameter), start in zip(named, starts, strict=True):
            _view(master, start, parameter).copy_(parameter)
            grads.append(_view(master.grad, start, parameter))
            parameter.data = _view(compute, start, parameter)
        compute.copy_(master)
    names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
    return Group(names, parameters, compute, master, master.detach().clone(), grads)


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """A piece of the buffer in the parameter's shape; convolution weights are channels-last."""
    piece = flat[start : start + like.numel()]
    if like.ndim != 4:
        return piece.view(like.shape)
    out, inner, height, width = like.shape
    return piece.view(out, height, width, inner).permute(0, 3, 1, 2)
