"""How each engine is started: ours, vLLM-Omni's, or a command line that the user gives.

vLLM-Omni's flags are those that are fair to it at 0.26 and later: CUTLASS for static FP8 (its own
choice on Blackwell is the slower kernel) and no quantization flag for what a checkpoint states.
Older releases run guidance that was turned off, and take other flags.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Protocol

from pydantic import JsonValue

from zimage_fp8.bench.record import REFERENCE
from zimage_fp8.errors import UsageError, ZImageError

LOCALHOST = "127.0.0.1"
ONLINE = "online_fp8"
FIELDS = ("model", "port", "host", "policy", "attention")
OLDEST_VLLM_OMNI = (0, 26)
VERSION_WAIT_S = 300  # it imports torch and vLLM before it answers
DEFAULT_MAX_PIXELS = 2048 * 2048  # of `zimage-fp8 serve`


@dataclass(frozen=True)
class Start:
    """What one server is started with. checkpoint: None when the policy is applied at loading.

    port None: a command to be shown, not run.
    """

    model: str
    policy: str
    checkpoint: Path | None
    dtype: str
    device: str | None
    attention: str | None = None
    max_pixels: int = 0
    port: int | None = None

    @property
    def source(self) -> str:
        return str(self.checkpoint or self.model)


class Engine(Protocol):
    """name: as in the record. body: what requests carry besides the usual fields."""

    name: str
    body: Mapping[str, JsonValue]

    def check(self) -> None:
        """Raise ZImageError when it cannot run here, as far as that is cheap to know."""

    def command(self, start: Start) -> list[str]: ...

    def needs_checkpoint(self, policy: str, *, is_static: bool) -> bool:
        """Raises UsageError when this engine cannot serve the policy at all."""


class OurEngine:
    """Without its own warm-up picture: the benchmark warms every engine in the same way."""

    name = "zimage-fp8"
    body: Mapping[str, JsonValue] = {}

    def check(self) -> None:
        """It is this program."""

    def command(self, start: Start) -> list[str]:
        source = [start.source] if start.checkpoint else [start.model, "--policy", start.policy]
        return [
            "zimage-fp8", "serve", *source, "--dtype", start.dtype, "--no-warm-up",
            *_flag("--device", start.device),
            *_flag("--attention-backend", start.attention),
            *(["--max-pixels", str(start.max_pixels)]
              if start.max_pixels > DEFAULT_MAX_PIXELS else []),
            *_flag("--host", LOCALHOST if start.port else None),
            *_flag("--port", start.port),
        ]  # fmt: skip

    def needs_checkpoint(self, policy: str, *, is_static: bool) -> bool:
        return is_static


class VllmOmni:
    name = "vllm-omni"
    body: Mapping[str, JsonValue] = {"generator_device": "cpu"}  # one seed, one latent, everywhere

    def check(self) -> None:
        """Ask for its version. One that states none is left to the guidance probe."""
        # Without --omni the program hands its arguments to vLLM, which states a version of its own.
        command = ["vllm-omni", "--version", "--omni"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=VERSION_WAIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ZImageError(
                f"vllm-omni cannot be run: {error}", hint="install it, or use --launch"
            ) from None
        found = re.search(r"(\d+)\.(\d+)", asked.stdout)
        if found and (int(found[1]), int(found[2])) < OLDEST_VLLM_OMNI:
            raise ZImageError(
                f"vllm-omni is {found[0]}, which runs guidance that was turned off",
                hint="0.26 is the first that can be compared",
            )

    def command(self, start: Start) -> list[str]:
        return [
            "vllm-omni", "serve", start.source, "--omni", "--tensor-parallel-size", "1",
            *(["--force-cutlass-fp8"] if start.checkpoint else []),
            *(["--diffusion-quantization-config", '{"method":"fp8"}']
              if start.policy == ONLINE else []),
            *_flag("--diffusion-attention-backend", start.attention),
            *_flag("--host", LOCALHOST if start.port else None),
            *_flag("--port", start.port),
        ]  # fmt: skip

    def needs_checkpoint(self, policy: str, *, is_static: bool) -> bool:
        return policy not in (REFERENCE, ONLINE)


class Template:
    """A command line with {model}, {port} and, if it likes, {policy}, {attention}, {host}."""

    body: Mapping[str, JsonValue] = {}

    def __init__(self, template: str) -> None:
        self.words = _words(template)
        self.name = Path(self.words[0]).name
        self.fields = {field for word in self.words for field in _fields(word)}
        if unknown := self.fields - set(FIELDS):
            raise UsageError(
                f"--launch has the field {{{sorted(unknown)[0]}}}, known are "
                + ", ".join(f"{{{field}}}" for field in FIELDS),
                param="launch",
            )
        for field in ("model", "port"):
            if field not in self.fields:
                raise UsageError(f"--launch lacks {{{field}}}: {template}", param="launch")

    def check(self) -> None:
        """Whether there is such a program; starting it will tell the rest."""
        program = self.words[0]
        if not _fields(program) and program != OurEngine.name and shutil.which(program) is None:
            raise ZImageError(
                f"cannot run {program!r}: no such program", hint="install it, or give its path"
            )

    def command(self, start: Start) -> list[str]:
        if start.attention and "attention" not in self.fields:
            raise UsageError(
                f"--launch lacks {{attention}}, but {start.attention} is asked for", param="launch"
            )
        values = {
            "model": start.source,
            "port": "PORT" if start.port is None else str(start.port),
            "host": LOCALHOST,
            "policy": start.policy,
            "attention": start.attention or "",
        }
        return [word.format(**values) for word in self.words]

    def needs_checkpoint(self, policy: str, *, is_static: bool) -> bool:
        if is_static or policy == REFERENCE:
            return is_static
        if "policy" not in self.fields:
            raise UsageError(
                f"--launch lacks {{policy}}, so {policy} and {REFERENCE} would be one server",
                param="launch",
            )
        return False


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OurEngine(), VllmOmni())}


def find_engine(name: str, launch: str | None) -> Engine:
    """The engine of this name, or of a command line. Raises UsageError."""
    if launch is not None:
        return Template(launch)
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: expected {' or '.join(ENGINES)}", param="engine")
    return ENGINES[name]


def shown(engine: Engine, start: Start) -> list[str]:
    """The command in names that mean the same on every machine: no folder, no port."""
    checkpoint = start.checkpoint and Path(start.checkpoint.parent.name, start.checkpoint.name)
    command = engine.command(replace(start, checkpoint=checkpoint, port=None))
    return [travelling_word(word) for word in command]


def travelling_word(word: str) -> str:
    """An absolute path without its folder, anything else as it is.

    Whether it exists does not matter: the same command must read the same tomorrow.
    """
    return Path(word).name if word.startswith("/") and word.count("/") > 1 else word


def _flag(name: str, value: object | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _words(template: str) -> list[str]:
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UsageError(f"--launch cannot be read as a command: {error}", param="launch") from None
    if not words:
        raise UsageError("--launch is empty", param="launch")
    return words


def _fields(word: str) -> list[str]:
    try:
        return [field for _, field, _, _ in Formatter().parse(word) if field is not None]
    except ValueError as error:
        raise UsageError(
            f"--launch: {word!r}: {error}; write {{{{ and }}}} for braces", param="launch"
        ) from None
