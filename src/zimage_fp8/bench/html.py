"""The report as one page that opens from a disk: no scripts, no fonts, nothing from elsewhere."""

import base64
import re
from html import escape

from zimage_fp8.bench.sections import Block, Notes, Picture, Plot, Section
from zimage_fp8.bench.svg import palette_css
from zimage_fp8.bench.table import Table

NO_BREAK = "&nbsp;/&nbsp;"

CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 24px 80px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:25px;line-height:1.25;margin:0 0 20px}
h2{font-size:19px;margin:44px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--grid)}
nav{margin:0 0 24px;font-size:14px}
nav a{margin-right:14px;color:var(--muted)}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 11px;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top}
th{color:var(--muted);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
table.facts td{text-align:left}
table.facts td:first-child{white-space:nowrap;color:var(--muted)}
tr.best td{color:var(--best);font-weight:600}
tr.floor td{color:var(--muted);font-style:italic}
tr.failed td{color:var(--muted)}
td small{display:block;color:var(--muted);font-size:11.5px;font-weight:400;white-space:nowrap}
td.wide{text-align:left}
table:not(.facts) td:is(:first-child,:last-child){white-space:nowrap}
ul{padding-left:20px;margin:12px 0}
li{margin:4px 0;max-width:88ch}
p{max-width:92ch;margin:18px 0 8px}
.warning{border-left:4px solid var(--best);padding:8px 16px;margin:0 0 22px}
.warning p{margin:4px 0}
code{font:13px ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
figure{margin:20px 0}
figure img,figure svg{max-width:100%;height:auto;display:block}
figcaption{color:var(--muted);font-size:13.5px;margin-top:6px}
"""


def render_page(title: str, sections: list[Section]) -> str:
    """The whole page; every picture and plot is inside it."""
    named = [section for section in sections if section.title]
    links = "".join(f'<a href="#{_anchor(one)}">{escape(one.title)}</a>' for one in named)
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{palette_css(':root')}{CSS}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower())


def _section(section: Section) -> str:
    head = f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>\n' if section.title else ""
    blocks = "".join(f"{_block(block)}\n" for block in section.blocks)
    return f"<section>\n{head}{blocks}</section>\n"


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Plot():
            return f"<figure>{block.svg}<figcaption>{_text(block.caption)}</figcaption></figure>"
        case Picture():
            data = base64.b64encode(block.webp).decode("ascii")
            caption = _text(block.caption)
            return (
                f'<figure><img src="data:image/webp;base64,{data}" alt="{escape(block.caption)}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Notes(kind="warning"):
            lines = "".join(f"<p>{_text(line)}</p>" for line in block.lines)
            return f'<div class="warning">{lines}</div>'
        case Notes(lines=[line]):
            return f"<p>{_text(line)}</p>"
        case Notes():
            return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in block.lines)}</ul>"


def _table(table: Table) -> str:
    is_facts = len(table.header) == 2
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
    rows = []
    for index, row in enumerate(table.body):
        mark = table.marks.get(index, "")
        cells = _failure(row) if mark == "failed" else "".join(map(_cell, row))
        rows.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    kind = ' class="facts"' if is_facts else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{"".join(rows)}</tbody></table></div>'


def _cell(text: str) -> str:
    # wins / ties / losses stay on one line
    return f"<td>{_interval(_text(text)).replace(' / ', NO_BREAK)}</td>"


def _failure(row: list[str]) -> str:
    """A name, and an error that has the room of all the numbers that are not there."""
    return f'{_cell(row[0])}<td colspan="{len(row) - 1}" class="wide">{_text(row[1])}</td>'


def _interval(cell: str) -> str:
    """`20.1 (19.5 to 20.7)` with what is in brackets on a line of its own."""
    return re.sub(r"^(\S+) (\([^()]* to [^()]*\))", r"\1<small>\2</small>", cell)


def _text(text: str) -> str:
    """Escaped, but for line breaks and `code`, the two marks that sentences use."""
    safe = escape(text).replace("&lt;br&gt;", "<br>")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
