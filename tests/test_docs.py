"""Documentation that cannot rot: commands parse, options are described, numbers come from files."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import render
from zimage_fp8 import __version__
from zimage_fp8.cli import app

ROOT = Path(__file__).parents[1]
PROGRAM = "zimage-fp8"
COMMANDS = typer.main.get_command(app).commands
GENERATED = ROOT / "docs" / "cli.md"
PAGES = [
    page
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    if page != GENERATED
]


def shell_lines(page: Path) -> Iterator[str]:
    """Lines inside fenced blocks, with continuation lines joined."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()


def documented_commands() -> list[tuple[str, str]]:
    """(where, command line without the program's name) of every use of the program."""
    uses = [
        (page.name, line.strip().removeprefix("$ ")) for page in PAGES for line in shell_lines(page)
    ]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    for recipe in re.findall(r"\$\(RUN\) .*", makefile):
        command = recipe.replace("$(RUN)", PROGRAM).partition(";")[0].partition("||")[0]
        uses.append(("Makefile", re.sub(r"\$\$|[$()]", "", command)))
    return [
        (where, command.removeprefix(PROGRAM))
        for where, command in uses
        if command.startswith(f"{PROGRAM} ")
    ]


@pytest.mark.parametrize(("where", "arguments"), documented_commands())
def test_a_documented_command_parses(where: str, arguments: str) -> None:
    verb, *rest = shlex.split(arguments, comments=True)
    if rest and f"{verb} {rest[0]}" in COMMANDS:  # a verb of two words, as `bench report`
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    COMMANDS[verb].make_context(verb, rest)  # raises what the command line would print


def test_there_are_documented_commands() -> None:
    """The check above looks at something: the README and the Makefile both use the program."""
    assert {"README.md", "Makefile"} <= {where for where, _ in documented_commands()}


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_the_readme_shows_every_verb(verb: str) -> None:
    assert re.search(rf"{PROGRAM} {verb}\b", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_option_says_what_it_does(verb: str) -> None:
    silent = [it.name for it in COMMANDS[verb].params if it.name != "help" and not it.help]
    assert not silent, f"{verb}: no help for {silent}"
    assert COMMANDS[verb].help, f"{verb} has no help"


def test_rendered_parts_are_fresh() -> None:
    """README blocks equal what the results say, docs/cli.md what `--help` says."""
    script = ROOT / "benchmarks" / "render.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run `make docs`\n{done.stdout}{done.stderr}"


def test_a_block_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    text = "before\n<!-- rendered: table -->\nold\n<!-- /rendered -->\nafter\n"
    blocks = {"table": lambda results: f"new, from {results.name}\n"}
    assert render.render_blocks(text, blocks, tmp_path / "results") == (
        "before\n<!-- rendered: table -->\nnew, from results\n<!-- /rendered -->\nafter\n"
    )


def test_an_unknown_block_is_refused(tmp_path: Path) -> None:
    text = "<!-- rendered: typo -->\n<!-- /rendered -->\n"
    with pytest.raises(KeyError, match="typo"):
        render.render_blocks(text, {}, tmp_path)


def test_an_open_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table"):
        render.render_blocks("<!-- rendered: table -->\n", {"table": str}, tmp_path)


def test_local_links_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_the_changelog_starts_with_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [version for version in versions if version != "Unreleased"]
    assert released[0] == __version__


def test_every_decision_is_numbered_and_complete() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        assert page.name.startswith(f"{number:03}-")
        assert text.startswith(f"# {number}. "), page.name
        for part in ("Context", "Choice", "Consequence"):
            assert f"**{part}.**" in text, f"{page.name}: no {part}"


def test_the_ladder_is_rendered_from_its_result(tmp_path: Path) -> None:
    assert render.engine_ladder(tmp_path) == "Not measured yet."
    assert render.engine_ladder_plot(tmp_path) is None
    rungs = [
        {"name": "eager", "what": "as it comes", "ms": {"64x32": 30.0}},
        {"name": "fused", "what": "our kernels", "ms": {"64x32": 12.0, "64x64": 20.0}},
    ]
    facts = {"machine": {"cpu": "a CPU"}, "versions": {"torch": "2"}, "commit": "abc"}
    result = {**facts, "command": ["engine.py", "--ladder", "x"], "rungs": rungs}
    (tmp_path / "engine-ladder.json").write_text(json.dumps(result))
    table = render.engine_ladder(tmp_path)
    assert "| fused | our kernels | 12.0 (2.50×) | 20.0 (1.00×) |" in table
    assert "| eager | as it comes | 30.0 (1.00×) | n/a |" in table
    assert "<sub>a CPU · torch 2 · commit abc · `python benchmarks/engine.py --ladder x`" in table
    assert "12   2.50×" in (render.engine_ladder_plot(tmp_path) or "")
