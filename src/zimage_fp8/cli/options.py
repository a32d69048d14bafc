"""What the verbs' modules share: the app, and the options that several verbs take."""

import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from zimage_fp8.errors import UsageError


class Verbs(TyperGroup):
    """Commands whose name may be two words, as `bench report`, beside one that is the first."""

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]  # typer's own types vary
        first_two = " ".join(args[:2])
        words = [first_two, *args[2:]] if first_two in self.commands else args
        return super().resolve_command(ctx, words)


app = typer.Typer(
    name="zimage-fp8",
    cls=Verbs,
    help="Z-Image-Turbo in 8 bits: quantize it, prove what it costs, serve it fast.\n\n"
    "MODEL is always one of: `nano` (a small model inside this package), a local diffusers "
    "folder, or a Hub id such as Tongyi-MAI/Z-Image-Turbo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(help="nano, a local folder, or a Hub id.", metavar="MODEL")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32, for everything not quantized.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")]
PolicyName = Annotated[
    str | None,
    typer.Option(
        help="bf16_base, online_fp8, online_int8-rot, fp8-row, int8-rot, a static policy such as "
        "full or ffn-only, one of these with blocks (full[0-14], full[!15-29]), or a .toml file."
    ),
]

EngineName = Annotated[
    str,
    typer.Option(
        "--engine", help="fused (fast kernels), plain (the reference), or auto: fused on CUDA."
    ),
]
AttentionBackend = Annotated[
    str,
    typer.Option(
        help="auto, sdpa, math, hopper, fa3, fa3-fp8, cudnn, flash2, sage; or TORCH_SDPA, "
        "FLASH_ATTN, SAGE_ATTN.",
        envvar="DIFFUSION_ATTENTION_BACKEND",
    ),
]
TextEncoderPrecision = Annotated[
    str, typer.Option("--text-encoder", help="bf16, or fp8: 3 GB less, a little off.")
]
Offload = Annotated[
    str,
    typer.Option(help="none, or text-encoder: it stays in host memory and streams when needed."),
]


def parse_size(size: str | None) -> tuple[int, int] | None:
    """`WxH` as numbers. Raises UsageError."""
    from zimage_fp8.protocol import parse_size

    return parse_size(size) if size else None


def parse_bytes(size: str | None) -> int | None:
    """`12G`, `1.5GB`, `30M` or plain bytes as a number, in powers of ten. Raises UsageError."""
    if size is None:
        return None
    number = size.upper().removesuffix("B")
    factor = {"K": 1e3, "M": 1e6, "G": 1e9}.get(number[-1:], 1)
    try:
        return int(float(number.rstrip("KMG")) * factor)
    except (ValueError, OverflowError):
        raise UsageError(f"{size!r} is no size in bytes; write 12G or 30M") from None


def let_segments_grow() -> None:
    """Have PyTorch, which must not be imported yet, keep GPU memory in segments that grow in place.

    Segments of fixed size that a small picture has left are of no use to a larger one. Measured on
    an H200 with `full`: 14.2 instead of 14.5 GiB at 1024x512, then 14.6 instead of 15.3 at
    1024x1024, the same speed. Who sets PyTorch's variable is obeyed. Only Linux has such segments.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
