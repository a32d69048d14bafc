"""What every test stands on: a header that says what ran where, the `gpu` marker, a tiny model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
# Idle threads sleep instead of spinning, which starves other work on two cores (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src" / "zimage_fp8"

# Without a GPU, Triton's kernels run in its interpreter. Read when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two threads, what CI has: sums are split alike on every machine, so a measured threshold holds.
torch.set_num_threads(2)


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "triton", "diffusers", "transformers")
    sizes = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    longest = max(sizes, key=sizes.__getitem__)
    return [
        " · ".join(f"{name} {_version(name)}" for name in packages) + f" · GPU: {gpu}",
        f"source: {len(sizes)} files, {sum(sizes.values())} lines, "
        f"longest {longest.relative_to(SOURCE)} ({sizes[longest]})",
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if count := sum("gpu" in report.keywords for report in skipped):
        terminalreporter.write_line(f"{count} gpu tests did not run: no CUDA device here")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/kernels `torch.empty*` holds NaN (integers: 113): no unwritten element can pass."""
    if "kernels" not in request.path.parts:
        return

    def poisoned(allocate):
        def fresh(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 113)

        return fresh

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="session", autouse=True)
def interpreter_counts_under_numpy_2_4() -> None:
    """Triton 3.6's interpreter makes loop bounds with `int(array of one)`, which NumPy refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny.save_tiny_model`. Shared by all tests: read it, never write to it."""
    from tiny import save_tiny_model  # diffusers takes seconds to import; few tests need it

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(folder)
    return folder
