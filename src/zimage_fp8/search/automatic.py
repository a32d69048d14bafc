"""What `--policy auto` does with what it found: a checkpoint, where the format can hold the mix."""

from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.checkpoint.dialects import algorithm_of
from zimage_fp8.errors import UsageError
from zimage_fp8.evaluate import Quality, Workload
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.quant.policy import find_policy, resolve
from zimage_fp8.quantize import find_unquantized, quantize
from zimage_fp8.search import Goal, OnProgress, search


@dataclass(frozen=True)
class Automatic:
    """checkpoint: None when no format on disk holds the mix; `reason` says why. Sizes in dB;
    held_out: with prompts that the search did not see, None where none were given."""

    policy_file: Path
    evidence_file: Path
    checkpoint: Path | None
    reason: str
    mean_psnr: float
    ci95: float
    predicted_psnr: float
    cost: float
    unit: str
    latency_s: float | None
    pictures_drawn: int
    held_out: Quality | None
    model: str

    def text(self) -> str:
        """What was found, what it rests on, and how to run it."""
        cost = f"{self.cost:.3g} s predicted" if self.unit == "s" else f"{self.cost / 1e6:,.1f} MB"
        real = f", {self.latency_s:.3g} s measured" if self.latency_s else ""
        lines = [
            f"{self.policy_file}: {self.mean_psnr:.1f} ± {self.ci95:.1f} dB measured, "
            f"{self.predicted_psnr:.1f} dB predicted, {cost}{real}",
            *self._elsewhere(),
            f"evidence: {self.evidence_file}",
        ]
        if self.checkpoint:
            return "\n".join([*lines, str(self.checkpoint)])
        run = f"zimage-fp8 serve {self.model} --policy {self.policy_file}"
        return "\n".join([*lines, f"no checkpoint: {self.reason}", f"run it with: {run}"])

    def _elsewhere(self) -> list[str]:
        if (found := self.held_out) is None:
            return []
        return [
            f"with {found.pictures} prompts that the search did not see: {found.mean:.1f} "
            f"± {found.ci95:.1f} dB"
        ]


def quantize_automatically(
    model: str,
    goal: Goal,
    out: Path,
    prompts: Path | None,
    held_out: Path | None = None,
    *,
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> Automatic:
    """Search, write the policy to `out` + .toml, and the checkpoint to `out` if it can be stored.

    Raises what `search` and `quantize` raise.
    """
    file = out.with_name(f"{out.name}.toml")
    workload = Workload(prompts)
    found = search(
        model,
        goal,
        file,
        workload=workload,
        held_out=held_out,
        device=device,
        on_progress=on_progress,
    )
    config, _ = read_config(find_unquantized(model) / "transformer")
    checkpoint, reason = None, ""
    try:
        algorithm_of(resolve(find_policy(str(file)), linear_shapes(config)))
    except UsageError as error:
        reason = str(error)
    else:
        (checkpoint,) = quantize(model, [str(file)], out, on_progress=on_progress)
    quality, point = found.chosen.quality, found.chosen.point
    return Automatic(
        policy_file=file,
        evidence_file=found.evidence_file,
        checkpoint=checkpoint,
        reason=reason,
        mean_psnr=quality.mean,
        ci95=quality.ci95,
        predicted_psnr=point.predicted_psnr,
        cost=point.cost,
        unit="s" if found.cost == "latency" else "bytes",
        latency_s=found.chosen.latency_s,
        pictures_drawn=quality.pictures,
        held_out=found.held_out,
        model=model,
    )
