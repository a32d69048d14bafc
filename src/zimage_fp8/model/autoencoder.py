"""Z-Image's autoencoder, which is Flux's: diffusers' AutoencoderKL as far as it is used here.

Parameters are named as diffusers names them. diffusers' own class cannot be imported without all
of its models and PyTorch's compiler: 3.6 s of processor time, half of what serving imported
(decisions/015). One half is built and read at a time, since a picture needs one.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import CheckpointError, ModelError
from zimage_fp8.layout import read_object

EPS = 1e-6
FLOATS = ("BF16", "F16", "F32")

Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, ...] = ("encoder", "decoder")
M = TypeVar("M", bound=nn.Module)


class AutoencoderConfig(BaseModel):
    """The keys of config.json that shape the computation, with diffusers' defaults for those that
    its older versions did not write; the other keys say nothing about it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    block_out_channels: list[int] = Field(min_length=1)
    layers_per_block: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    norm_num_groups: int = Field(gt=0)
    scaling_factor: float = Field(gt=0)
    shift_factor: float | None = None
    sample_size: int = Field(1024, gt=0)
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    act_fn: Literal["silu", "swish"] = "silu"  # two names of one function
    down_block_types: list[Literal["DownEncoderBlock2D"]]
    up_block_types: list[Literal["UpDecoderBlock2D"]]
    latents_mean: None = None
    latents_std: None = None


def read_autoencoder_config(folder: Path) -> AutoencoderConfig:
    """The config of a vae/ folder. Raises ModelError, naming the key, for any other kind."""
    path = folder / "config.json"
    try:
        return AutoencoderConfig.model_validate(read_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f" is {first['input']!r}"
        raise ModelError(f"{path}: {where}{value}: {first['msg']}") from None


class Autoencoder(nn.Module):
    """One half of it: the encoder makes latents of pictures, the decoder pictures of latents."""

    def __init__(self, config: AutoencoderConfig, half: Half) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        if half == "encoder":
            self.encoder = Encoder(config)
            self.quant_conv = (
                nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
            )
        else:
            self.decoder = Decoder(config)
            self.post_quant_conv = (
                nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, picture: Tensor) -> Tensor:
        """picture [batch, 3, 8h, 8w] in −1 to 1 -> the mean of its latent's distribution."""
        moments: Tensor = self.encoder(picture)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z [batch, channels, h, w] -> picture [batch, 3, 8h, 8w] in about −1 to 1."""
        picture: Tensor = self.decoder(
            z if self.post_quant_conv is None else self.post_quant_conv(z)
        )
        return picture


def load_autoencoder(
    folder: Path, half: Half, dtype: torch.dtype, device: torch.device
) -> Autoencoder:
    """One half of the autoencoder in a vae/ folder.

    Raises ModelError for another kind of model, and CheckpointError listing every tensor of either
    half that is missing, unexpected, mis-shaped or mis-typed.
    """
    config = read_autoencoder_config(folder)
    with torch.device("meta"):
        halves = {name: Autoencoder(config, name) for name in HALVES}
    with ShardReader(folder) as reader:
        if problems := list(_tensor_problems(reader, halves.values())):
            raise CheckpointError(str(folder), problems, hint="copy the VAE again")
        model = halves[half]
        state = {name: reader.read(name, device).to(dtype) for name in model.state_dict()}
        # On the CPU what was read in its own type is pages of the file, which is closed now.
        model.load_state_dict(
            {name: x.clone() if x.device.type == "cpu" else x for name, x in state.items()},
            assign=True,
        )
    return model.requires_grad_(False).eval()


def _tensor_problems(reader: ShardReader, halves: Iterable[Autoencoder]) -> Iterator[str]:
    known = {name: tuple(x.shape) for half in halves for name, x in half.state_dict().items()}
    yield from (f"{name}: missing" for name in known if name not in reader.infos)
    for name, info in reader.infos.items():
        if name not in known:
            yield f"{name}: not part of an autoencoder of this config"
        elif info.shape != known[name]:
            yield f"{name}: shape {list(info.shape)}, expected {list(known[name])}"
        elif info.dtype not in FLOATS:
            yield f"{name}: type {info.dtype}, expected one of {', '.join(FLOATS)}"


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = _modules(
            DownBlock(config, before, after, is_last=index == len(widths) - 1)
            for index, (before, after) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return moments


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = _modules(
            UpBlock(config, before, after, is_last=index == len(widths) - 1)
            for index, (before, after) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        picture: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return picture


class DownBlock(nn.Module):
    def __init__(
        self, config: AutoencoderConfig, before: int, after: int, *, is_last: bool
    ) -> None:
        super().__init__()
        self.resnets = _modules(
            Resnet(config, after if index else before, after)
            for index in range(config.layers_per_block)
        )
        self.downsamplers = _modules([] if is_last else [Downsampler(after)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, config: AutoencoderConfig, before: int, after: int, *, is_last: bool
    ) -> None:
        super().__init__()
        self.resnets = _modules(
            Resnet(config, after if index else before, after)
            for index in range(config.layers_per_block + 1)
        )
        self.upsamplers = _modules([] if is_last else [Upsampler(after)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class MidBlock(nn.Module):
    """Where all pixels see each other, at an eighth of the size."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        attends = config.mid_block_add_attention
        self.resnets = _modules(Resnet(config, width, width) for _ in range(2))
        self.attentions = _modules([Attention(config, width)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Resnet(nn.Module):
    def __init__(self, config: AutoencoderConfig, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = _norm(config, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden
        return out


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, config: AutoencoderConfig, width: int) -> None:
        super().__init__()
        self.group_norm = _norm(config, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = _modules([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # [batch, pixels, width]
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        out: Tensor = mixed.transpose(1, 2).reshape(x.shape) + x
        return out


class Downsampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _modules(modules: Iterable[M]) -> Sequence[M]:
    """A ModuleList whose members' type is known."""
    return cast(Sequence[M], nn.ModuleList(modules))


def _norm(config: AutoencoderConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, width, eps=EPS)
