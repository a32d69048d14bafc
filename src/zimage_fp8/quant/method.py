"""How the numbers of a quantized checkpoint are chosen, within one and the same format.

A policy says what every layer becomes; the method says how well its codes and scales are chosen.
None of it costs anything at run time, and every loader of the format benefits.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from zimage_fp8.errors import UsageError
from zimage_fp8.layout import fused_name
from zimage_fp8.quant.policy import Plan

Rounding = Literal["nearest", "gptq"]
MAX_HEADROOM = 64.0  # beyond it the small inputs of an E4M3 layer would lose their mantissas


@dataclass(frozen=True)
class Method:
    """fold: channel scales are folded into weights (`quant.fold`); rotated layers always are.
    rounding: of weights; nearest, or by what calibration saw (`quant.rounding`). headroom: how far
    a static input scale reaches beyond the largest calibrated input.
    """

    fold: bool = False
    rounding: Rounding = "nearest"
    headroom: float = 1.0

    def check(self) -> None:
        """Raise UsageError, naming the option, for values that make no sense."""
        if self.rounding not in get_args(Rounding):
            raise UsageError(
                f"rounding {self.rounding!r}: expected {' or '.join(get_args(Rounding))}",
                param="rounding",
            )
        if not 1 <= self.headroom <= MAX_HEADROOM:
            raise UsageError(
                f"headroom is {self.headroom:g}, expected 1 (none) to {MAX_HEADROOM:g}",
                param="headroom",
            )


def folded_modules(plan: Plan, method: Method) -> list[str]:
    """The fused modules whose input channels are balanced before they are quantized."""
    specs = {fused_name(layer): plan.spec(layer) for layer in plan.quantized}
    return [module for module, spec in specs.items() if spec and (spec.rotate or method.fold)]
