"""Results as text a person reads in a terminal."""

from collections.abc import Mapping, Sequence

from zimage_fp8.checkpoint.verify import Verification
from zimage_fp8.engine.profile import Profile
from zimage_fp8.quantize import SizeReport


def dry_run_tables(reports: Sequence[SizeReport]) -> str:
    """Per policy: what becomes 8-bit, why the rest stays, sizes before and after."""
    needed = sum(report.bytes_after for report in reports)
    tables = [_plan_table(report) for report in reports]
    return "\n\n".join([*tables, f"disk needed for transformers: {megabytes(needed)}"])


def _plan_table(report: SizeReport) -> str:
    rows = [("layers", "count", "parameters", "becomes", "before", "after", "why")]
    for group in sorted(report.groups, key=lambda g: (g.format == "BF16", -g.parameters)):
        rows.append(
            (
                group.layers,
                str(group.count),
                f"{group.parameters:,}",
                group.format,
                megabytes(group.bytes_before),
                megabytes(group.bytes_after),
                group.why,
            )
        )
    saved = 1 - report.bytes_after / report.bytes_before
    total = f"{megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)} (-{saved:.1%})"
    return f"{report.policy}: transformer {total}\n{_columns(rows)}"


def verification_text(verification: Verification) -> str:
    """One line per finding, then the verdict."""
    lines = [f"{f.level}: {f.where}: {f.message}" for f in verification.findings]
    what = f"policy {verification.policy}, {verification.quantized_linears} quantized linears"
    verdict = "sound" if verification.is_sound else "NOT SOUND"
    return "\n".join([*lines, f"{verification.folder}: {verdict} ({what})"])


def profile_text(profile: Profile) -> str:
    """The stages of a picture, then its kernels by what they are; ceilings named at the end."""
    total = sum(stage.ms for stage in profile.stages)
    stages = [("stage", "ms", "share", "under the profiler")]
    for stage in profile.stages:
        share, profiled = f"{stage.ms / total:.1%}", f"{stage.profiled_ms:.1f}"
        stages.append((stage.stage, f"{stage.ms:.1f}", share, profiled))
    stages.append(("in all", f"{total:.1f}", "100.0%", ""))
    kernels = [("stage", "kernels", "launches", "ms", "share", "rate", "of ceiling")]
    for row in profile.kernels:
        rate = "" if row.rate is None else f"{row.rate:,.4g} {row.unit}"
        of_ceiling = "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}"
        launches = str(row.launches or "")
        kernels.append(
            (row.stage, row.group, launches, f"{row.ms:.2f}", f"{row.share:.1%}", rate, of_ceiling)
        )
    runs = " · ".join(str(profile.runs[key]) for key in ("model", "policy", "device", "attention"))
    size = f"{profile.width}x{profile.height}, {profile.nfe} forwards, warm"
    ceiling = f"ceiling: {profile.ceilings_note}"
    return "\n".join([f"{runs}: {size}", "", _columns(stages), "", _columns(kernels), ceiling])


def facts_text(facts: Mapping[str, object], indent: int = 0) -> str:
    """Nested facts, one per line."""
    lines = []
    for key, value in facts.items():
        pad = "  " * indent
        if isinstance(value, Mapping):
            lines += [f"{pad}{key}:", facts_text(value, indent + 1)]
        elif isinstance(value, list):
            lines.append(f"{pad}{key}: {', '.join(map(str, value))}")
        else:
            lines.append(f"{pad}{key}: {value}")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()
