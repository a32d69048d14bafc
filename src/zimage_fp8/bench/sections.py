"""What a report consists of, and its Markdown form; `bench.html` makes a page of the same."""

from dataclasses import dataclass, field
from typing import Literal

from zimage_fp8.bench.table import Table

PLOTS = "plots"  # the folder of the plots beside report.md


@dataclass(frozen=True)
class Notes:
    """Sentences; kind says how loud."""

    lines: list[str]
    kind: Literal["note", "warning"] = "note"


@dataclass(frozen=True)
class Plot:
    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """`path` is where Markdown finds it; `webp` what a page carries."""

    path: str
    webp: bytes
    caption: str


Block = Notes | Table | Plot | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def render_markdown(title: str, sections: list[Section]) -> str:
    """The report as Markdown; pictures and plots are files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}"] if section.title else []
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Table():
            return block.markdown()
        case Plot():
            return f"![{block.caption}]({PLOTS}/{block.name}.svg)"
        case Picture():
            return f"![{_in_brackets(block.caption)}](<{block.path}>)\n\n{block.caption}"
        case Notes(kind="warning"):
            return "\n".join(f"> **Warning.** {line}\n>" for line in block.lines).removesuffix(
                "\n>"
            )
        case Notes(lines=[line]):
            return line
        case Notes():
            return "\n".join(f"- {line}" for line in block.lines)


def _in_brackets(text: str) -> str:
    return text.replace("[", "(").replace("]", ")")
