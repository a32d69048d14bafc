"""VERB sensitivity: what quantizing each part of the model, by itself, does to the pictures.

The model is loaded in full precision and once more under the policy, and modules of the second are
put into the first one unit at a time: a kind of layer, a block, a single layer of a block, a
denoise step, the text encoder. Everything else computes in FP32, because BF16's own rounding (47
to 53 dB on nano) would drown what one layer does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from zimage_fp8.errors import ZImageError
from zimage_fp8.evaluate import Workload, load_requests, load_subject
from zimage_fp8.heatmap import svg
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.quantize import find_unquantized
from zimage_fp8.sensitivity.report import heat_maps
from zimage_fp8.sensitivity.result import Sensitivity
from zimage_fp8.sensitivity.units import measure, plan_units

DEFAULT_SCANS = ("kinds", "blocks", "steps", "text")

OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


def sensitivity(
    model: str,
    policy: str,
    out: Path,
    *,
    scans: Sequence[str] = DEFAULT_SCANS,
    workload: Workload | None = None,
    dtype: str = "float32",
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Sensitivity, list[Path]]:
    """Measure the units of `scans` under `policy`; returns the results and the files written.

    Results are streamed to `out` (JSON), from which an interrupted run resumes; the heat map is
    drawn beside it as SVG. Raises UsageError for an unknown scan or policy or one that quantizes
    nothing, ZImageError when `out` holds other results or cannot be written.
    """
    chosen, folder = find_policy(policy), find_unquantized(model)
    if not out.absolute().parent.is_dir():
        raise ZImageError(f"cannot write {out}: its folder does not exist")
    plan_units((), 0, scans)  # an unknown scan is refused before the model is loaded
    requests = load_requests(folder, workload or Workload())
    subject = load_subject(
        model,
        folder,
        chosen,
        requests,
        dtype=dtype,
        device=device,
        on_calibration=_stage("calibrating", on_progress),
    )
    units = plan_units(list(subject.quantized), requests[0].steps, scans)
    found = measure(subject, units, out, _stage("drawing", on_progress))
    picture = out.with_suffix(".svg")
    picture.write_text(svg(heat_maps(found)))
    return found, [out, picture]


def _stage(name: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(name, done, total)
