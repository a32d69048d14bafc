"""What the tree promises about itself: direction of imports, size of files, cost of importing."""

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "zimage_fp8"
MODULES = sorted(SOURCE.rglob("*.py"))

MAX_LINES = 400
HELP_BUDGET_S = 0.5

# Dependencies point down only: a unit may import itself and the lines above its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("layout", "numerics", "protocol", "provenance", "terminal"),
    ("kernels",),
    ("quant",),
    ("checkpoint",),
    ("model",),
    ("engine",),
    ("picture",),
    ("serve",),
)
FOUNDATION = {unit for layer in LAYERS[:2] for unit in layer}

# Beside the layers: verbs that stand on some of them. The benchmark starts servers as processes
# and talks HTTP: it knows the wire, policies, a checkpoint's headers, and what a model refuses.
UP_TO_MODEL = {unit for layer in LAYERS[:6] for unit in layer}
BESIDE: dict[str, set[str]] = {
    "bench": {
        *("errors", "layout", "numerics", "protocol", "provenance", "quant.policy"),
        *("checkpoint.dialects", "checkpoint.own_format", "checkpoint.shards"),
        *("model.loading", "model.request", "model.source"),
    },
    "card": {"errors", "provenance", "bench", "quant.policy", "checkpoint"},
    "doctor": FOUNDATION | {"kernels"},
    "generate": UP_TO_MODEL | {"engine", "picture"},
    "inspect": UP_TO_MODEL | {"picture"},
    "diagnose": UP_TO_MODEL | {"evaluate", "heatmap"},
    "evaluate": UP_TO_MODEL | {"bench.workload"},
    "heatmap": set(),
    "outliers": UP_TO_MODEL,
    "quantize": UP_TO_MODEL,
    "search": UP_TO_MODEL | {"engine", "evaluate", "quantize", "sensitivity"},
    "sensitivity": UP_TO_MODEL | {"evaluate", "heatmap", "quantize"},
    "render": UP_TO_MODEL | {"engine", "quantize"},
}
NEED_NO_TORCH = (
    *("errors", "protocol", "provenance", "bench.load", "bench.record", "cli"),
    "checkpoint.read_ahead",
)


def allowed_imports() -> dict[str, set[str]]:
    allowed = {unit: imports | {unit} for unit, imports in BESIDE.items()}
    below: set[str] = set()
    for layer in LAYERS:
        allowed |= {unit: below | {unit} for unit in layer}
        below |= set(layer)
    return allowed


def unit_of(path: Path) -> str:
    """`model/z_image.py` belongs to the unit `model`, `errors.py` is the unit `errors`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, is at the top) of every import from this package, `quant.policy` and such."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "zimage_fp8":
            names = [f"zimage_fp8.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; spell it out"
            names = [node.module or ""]
        else:
            continue
        for package, _, rest in (name.partition(".") for name in names):
            if package == "zimage_fp8" and rest and not rest.startswith("__"):
                yield rest, node.lineno, id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit in ("__init__", "__main__"):
        assert {name for name, *_ in own_imports(path)} <= {"cli"}
        return
    if unit == "cli":
        wrong = [
            (name, line)
            for name, line, top in own_imports(path)
            if top and name.partition(".")[0] not in ("cli", "errors", "terminal")
        ]
        assert not wrong, f"the command line imports a verb inside the verb's function: {wrong}"
        return
    allowed = allowed_imports()
    assert unit in allowed, f"{unit} is new: give it a place in LAYERS or BESIDE"
    wrong = [
        (name, line)
        for name, line, _ in own_imports(path)
        if not any(f"{name}.".startswith(f"{below}.") for below in allowed[unit])
    ]
    assert not wrong, f"{path.name} may import {sorted(allowed[unit])}, not {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, the budget is {MAX_LINES}: split it by subject"


def test_the_console_script_loads() -> None:
    (script,) = entry_points(group="console_scripts", name="zimage-fp8")
    assert callable(script.load())


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_touches_nothing() -> None:
    """No torch (so no GPU), no socket, no environment variable."""
    run_python(
        """
import os, sys
def refuse(event, arguments):
    assert not event.startswith("socket."), event
sys.addaudithook(refuse)
class Sealed(dict):
    def __getitem__(self, key): raise AssertionError(f"read the environment: {key}")
    get = __contains__ = __getitem__
os.environ = Sealed()
import zimage_fp8
heavy = {"torch", "numpy", "diffusers", "transformers", "pydantic", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
    )


@pytest.mark.parametrize("module", NEED_NO_TORCH)
def test_needs_no_torch(module: str) -> None:
    run_python(
        f"import sys, zimage_fp8.{module}; assert 'torch' not in sys.modules, 'imported torch'"
    )


# What drawing on the engine does without, one name for each of the trees that would grow under it.
HEAVY = (
    *("diffusers", "transformers", "accelerate", "peft", "datasets"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torchvision", "sympy"),
    *("scipy", "pandas", "skimage", "matplotlib"),
)


def test_serving_imports_nothing_it_does_not_use() -> None:
    """Start-up is mostly imports: what a server needs is spelled out, and nothing pulls in more."""
    run_python(
        f"""
import sys
import zimage_fp8.cli, zimage_fp8.engine, zimage_fp8.generate, zimage_fp8.serve
crept_in = sorted({{*{HEAVY}}} & set(sys.modules))
assert not crept_in, crept_in
"""
    )


def test_drawing_on_the_engine_imports_no_models_but_ours(tiny_model: Path) -> None:
    run_python(
        f"""
import sys
from zimage_fp8.engine import EngineOptions, load_pipeline
from zimage_fp8.generate import generate
from zimage_fp8.model.request import ImageRequest
pipeline = load_pipeline({str(tiny_model)!r}, options=EngineOptions("fused"), device="cpu")
pipeline.generate(ImageRequest("a red apple", width=64, height=64, steps=1))
crept_in = sorted({{*{HEAVY}}} & set(sys.modules))
assert not crept_in, crept_in
"""
    )


def test_help_is_quick() -> None:
    """CPU seconds of the process, not wall time: a busy machine does not fail it.

    Measured 0.3 s on two cores; the budget leaves the rest to slower machines. Best of three,
    because the first run compiles bytecode.
    """
    script = Path(sys.executable).with_name("zimage-fp8")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([script, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < HELP_BUDGET_S, f"--help took {min(spent):.2f} s of CPU time"


def test_no_file_names_a_machine() -> None:
    """Absolute paths of somebody's machine mean nothing to a reader."""
    machine_path = re.compile(r"(?<![\w.)}\]-])/(work|root|home/\w+)/")
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in repository_files()
        for number, line in enumerate(text_lines(ROOT / name), 1)
        if machine_path.search(line)
    ]
    assert not found, "\n".join(found)


def repository_files() -> list[str]:
    """What git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if os.path.isfile(ROOT / name)]


def text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:  # a picture, weights, an archive
        return []
