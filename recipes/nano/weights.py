"""Results in BF16, in safetensors pieces small enough to pass through anything."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PIECE_BYTES = 14_000_000


def save_pieces(state: dict[str, Tensor], folder: Path, stem: str, facts: dict) -> list[Path]:
    """Write `stem-1-of-N.safetensors`, …; `facts` travel in the first one's header."""
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if size + tensor.nbytes > PIECE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor.nbytes
    for old in folder.glob(f"{stem}-*-of-*.safetensors"):
        old.unlink()
    files = []
    for number, piece in enumerate(pieces, 1):
        files.append(folder / f"{stem}-{number}-of-{len(pieces)}.safetensors")
        header = {"facts": json.dumps(facts)} if number == 1 else None
        save_file(piece, files[-1], metadata=header)
    return files


def load_pieces(folder: Path, stem: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of all pieces, and the facts. Raises FileNotFoundError when pieces lack."""
    files = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not files or not files[0].stem.endswith(f"of-{len(files)}"):
        raise FileNotFoundError(f"{folder}: {stem} is missing or incomplete ({len(files)} pieces)")
    state: dict[str, Tensor] = {}
    facts = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            facts |= json.loads((opened.metadata() or {}).get("facts", "{}"))
            state |= {name: opened.get_tensor(name) for name in opened.keys()}
    return state, facts


def save_state(state: dict, file: Path) -> None:
    """Write through a temporary file: a run that is cut off leaves the last whole state."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def set_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters and leave buffers: a text encoder's rotary frequencies stay in FP32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
