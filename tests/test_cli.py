"""The command line as a person meets it: output, exit codes, sentences."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from zimage_fp8.cli import main

PROMPT = "a 3d icon of a red apple on a teal background"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, from an empty folder: a process per case costs seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERMINAL_WIDTH", "200")  # so that no sentence is wrapped
    for name in ALLOCATOR:  # set and unset, so that what a run sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["zimage-fp8", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


def test_generate_writes_a_picture_that_tells_how_it_was_made(run: Run, tmp_path: Path) -> None:
    drawn = run("generate", PROMPT, "--seed", "3", "--size", "64x64", "-o", "a.png")
    assert (drawn.code, drawn.stdout.strip()) == (0, "a.png")
    facts = json.loads(run("inspect", "a.png", "--json").stdout)
    assert (facts["prompt"], facts["seed"], facts["nfe"]) == (PROMPT, 3, 8)
    assert (facts["model"], facts["policy"]) == ("nano", "bf16_base")


def test_several_pictures_count_their_seeds_up(run: Run, tmp_path: Path) -> None:
    options = ("--n", "2", "--seed", "7", "--size", "32x32", "--steps", "1", "--json")
    drawn = run("generate", PROMPT, *options, "-o", "b.png")
    assert json.loads(drawn.stdout) == ["b-0.png", "b-1.png"]
    facts = json.loads(run("inspect", "b-1.png", "--json").stdout)
    assert facts["seed"] == 8


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's segments grow on Linux only")
@pytest.mark.parametrize("given", [None, *ALLOCATOR])
def test_gpu_memory_grows_in_place_unless_somebody_chose(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    if given is not None:
        monkeypatch.setenv(given, "backend:native")
    assert run("generate", PROMPT, "--n", "0").code == 2
    expected = {given: "backend:native"} if given else {ALLOCATOR[0]: "expandable_segments:True"}
    assert {name: os.environ[name] for name in ALLOCATOR if name in os.environ} == expected


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_the_allocator_is_chosen_before_torch_is_imported(verb: str) -> None:
    script = f"""
import sys
from zimage_fp8.cli import main

def chosen():
    print("torch" in sys.modules)
    sys.exit()

sys.modules["zimage_fp8.cli.{verb}"].let_segments_grow = chosen
sys.argv = ["zimage-fp8", "{verb}", "nano"]
main()
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, "False"), ended.stderr


@pytest.mark.parametrize("name", ["SAGE_ATTN", "FLASH_ATTN", "nonsense"])
@pytest.mark.parametrize("engine", ["auto", "fused"])
def test_an_attention_of_the_environment_that_cannot_run_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, engine: str
) -> None:
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", name)
    ended = run("generate", PROMPT, "--engine", engine, "--device", "cpu", "--size", "32x32")
    assert (ended.code, ended.stdout) == (2, "")
    assert repr(name) in ended.stderr


def test_an_attention_of_the_environment_is_what_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "TORCH_SDPA")
    short = ("--size", "32x32", "--steps", "1", "--device", "cpu", "--engine", "fused")
    assert run("generate", PROMPT, *short, "-o", "a.png").code == 0
    assert "sdpa (" in run("inspect", "a.png").stdout
    assert run("generate", PROMPT, *short, "--attention-backend", "math", "-o", "b.png").code == 0
    assert "math (" in run("inspect", "b.png").stdout


def test_a_profile_is_printed_and_saved(run: Run, tmp_path: Path) -> None:
    short = ("--size", "32x32", "--steps", "1", "--device", "cpu")
    ended = run("generate", PROMPT, *short, "-o", "a.png", "--profile", "a.json")
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("a.png\nnano · bf16_base · cpu")
    for row in ("encode", "denoise", "decode", "picture", "GEMM", "attention", "gaps"):
        assert row in ended.stdout
    assert json.loads((tmp_path / "a.json").read_text())["nfe"] == 1
    refused = run("generate", PROMPT, *short, "--profile", "a.txt")
    assert (refused.code, "must end in .json" in refused.stderr) == (2, True)


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    shown = run("quantize", "nano", "--policy", "full[0-1]", "--dry-run")
    assert shown.code == 0
    assert "outside [0-1]" in shown.stdout
    assert "8 bits here give noise" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_quantize_verify_inspect(run: Run, tmp_path: Path) -> None:
    made = run("quantize", "nano", "--policy", "fp8-row", "--out", "row")
    assert (made.code, made.stdout.strip()) == (0, "row")
    checked = run("verify", "row", "--against", "nano", "--json")
    assert checked.code == 0
    assert json.loads(checked.stdout)["findings"] == []
    facts = json.loads(run("inspect", "row", "--json").stdout)
    assert facts["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"

    config = tmp_path / "row" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"model*",', ""))
    broken = run("verify", "row")
    assert broken.code == 1
    assert "does not cover model*" in broken.stdout
    assert "NOT SOUND" in broken.stdout


WRONG = {
    "unknown policy": (["generate", PROMPT, "--policy", "best"], 2, "unknown policy 'best'"),
    "unknown verb": (["paint"], 2, "No such command"),
    "unknown option": (["generate", PROMPT, "--sed", "1"], 2, "No such option"),
    "size not a multiple": (["generate", PROMPT, "--size", "100x64"], 2, "nearest is 96x64"),
    "size not a size": (["generate", PROMPT, "--size", "big"], 2, "is not WIDTHxHEIGHT"),
    "empty prompt": (["generate", " "], 2, "the prompt is empty"),
    "long prompt": (["generate", "word " * 600], 2, "at most 512"),
    "negative steps": (["generate", PROMPT, "--steps", "-1"], 2, "steps is -1"),
    "negative prompt without guidance": (
        ["generate", PROMPT, "--negative-prompt", "x"], 2, "does nothing at guidance 0",
    ),
    "not a PNG": (["generate", PROMPT, "-o", "a.gif"], 2, "must end in .png"),
    "unwritable output": (["generate", PROMPT, "-o", "no/such/a.png"], 1, "not a writable folder"),
    "missing model": (["generate", PROMPT, "--model", "./none"], 1, "does not exist"),
    "no user's model": (["generate", PROMPT, "--model", "~nobody-here/m"], 1, "does not exist"),
    "endless model": (["generate", PROMPT, "--model", "m" * 5000], 1, "does not exist"),
    "missing out": (["quantize", "nano"], 2, "--out is missing"),
    "missing prompt file": (
        ["quantize", "nano", "--out", "q", "--prompts", "p.txt"], 1, "p.txt cannot be read",
    ),
    "too few calibration steps": (
        ["quantize", "nano", "--out", "q", "--steps", "1"], 2, "takes 2 to 200",
    ),
    "calibration size": (
        ["quantize", "nano", "--out", "q", "--size", "60x60"], 2, "multiples of 16",
    ),
    "missing policy file": (
        ["quantize", "nano", "--out", "q", "--policy", "p.toml"], 1, "does not exist",
    ),
    "output inside a file": (
        ["quantize", "nano", "--policy", "fp8-row", "--out", "file/q"], 1, "not a writable folder",
    ),
    "verify a BF16 model": (["verify", "file"], 1, "config.json is missing"),
    "inspect nothing": (["inspect", "none.png"], 1, "does not exist"),
    "inspect a text": (["inspect", "file"], 1, "cannot be read as a picture"),
    "bad dtype": (["generate", PROMPT, "--dtype", "int4"], 2, "expected one of bfloat16"),
    "bad device": (["generate", PROMPT, "--device", "gpu"], 2, "expected cpu, cuda"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence_and_leaves_nothing(run: Run, case: str, tmp_path: Path) -> None:
    arguments, code, said = WRONG[case]
    (tmp_path / "file").write_text("x")
    failed = run(*arguments)
    assert failed.code == code, failed.stderr
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_of_another_architecture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    failed = run("generate", PROMPT, "--model", "./flux")
    assert failed.code == 1
    assert "is a FluxPipeline, expected a ZImagePipeline" in failed.stderr
