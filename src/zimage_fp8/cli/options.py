"""What the verbs' modules share: the app, and the options that several verbs take."""

from typing import Annotated

import typer

app = typer.Typer(
    name="zimage-fp8",
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
        help="bf16_base, online_fp8, fp8-row, int8-rot, a static policy such as full or "
        "ffn-only, one of these with blocks (full[0-14], full[!15-29]), or a .toml file."
    ),
]


def parse_size(size: str | None) -> tuple[int, int] | None:
    """`WxH` as numbers. Raises UsageError."""
    from zimage_fp8.protocol import parse_size

    return parse_size(size) if size else None
