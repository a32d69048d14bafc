"""Softmax attention over all tokens, by one of several backends.

No mask: Z-Image's padding tokens are learned and attended, so the dense kernels are exact. Every
backend states what it needs; a choice that cannot run is refused with the reason, and only `auto`
may take another, saying why.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage_fp8.errors import UsageError
from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.hopper import Program, needs_hopper
from zimage_fp8.kernels.hopper_attention import HEAD_DIM, hopper_attention, programs

SAGE_TILE = 64

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
RunCodes = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Write = Callable[[Tensor, Tensor, Tensor, Output], Activation]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: [batch, tokens, heads, head_dim]. Returns [batch, tokens, heads · head_dim].

    PyTorch's scaled_dot_product_attention with the backend that PyTorch chooses: the reference.
    """
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Target:
    """Where attention shall run: what decides which backends can."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @property
    def capability(self) -> tuple[int, int]:
        """(0, 0) without CUDA."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_capability(self.device) if is_cuda else (0, 0)


@dataclass(frozen=True)
class Backend:
    """run: as `attention`. refusal: why it cannot run on a target, or None. run_codes: the same on
    E4M3 codes and their scale, fp32 [3, batch, heads], for backends that compute on those where
    they can be had. write: the same as `run`, written as the next layer reads it, for backends that
    can; programs: what has to be compiled for that."""

    name: str
    summary: str
    run: Run
    refusal: Callable[[Target], str | None]
    run_codes: RunCodes | None = None
    write: Write | None = None
    programs: Callable[[Output], Iterable[Program]] = lambda _: ()


def choose_backend(name: str, target: Target) -> tuple[Backend, list[str]]:
    """The backend of this name, or for `auto` the fastest that runs; and why others do not.

    Names are ours or those of DIFFUSION_ATTENTION_BACKEND (`ALIASES`), in any case. Raises
    UsageError for unknown names and for explicit choices that cannot run.
    """
    candidates = AUTO if name == "auto" else ALIASES.get(name.upper(), (name.lower(),))
    refused: list[str] = []
    for candidate in candidates:
        if candidate not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS, *ALIASES])
            raise UsageError(
                f"attention backend {name!r}: expected one of {known}", param="attention_backend"
            )
        backend = BACKENDS[candidate]
        reason = backend.refusal(target)
        if reason is None:
            return backend, refused
        refused.append(f"{candidate}: {reason}")
    raise UsageError(
        f"attention backend {name!r} cannot run here: {'; '.join(refused)}",
        param="attention_backend",
        hint="leave the choice to --attention-backend auto; zimage-fp8 doctor lists what runs",
    )


def refusals(target: Target) -> dict[str, str | None]:
    """Every backend and why it cannot run on the target; None where it can."""
    return {name: backend.refusal(target) for name, backend in BACKENDS.items()}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v)


def _hopper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hopper_attention(q, k, v).values.reshape(*q.shape[:2], -1)


def _fa3(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """Of values, or of E4M3 codes under their scale.

    By the wheel's operator: its Python around it, written for training, imports torch._dynamo at
    the first call, which takes 5 s.
    """
    importlib.import_module("fa3_fwd._C")  # makes the operator known
    names = ("q_descale", "k_descale", "v_descale")
    scales = {} if scale is None else dict(zip(names, scale, strict=True))
    mixed: Tensor = torch.ops.fa3_fwd.fwd(q, k, v, **scales, num_splits=1)[0]
    return mixed.flatten(2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Overwrites k with the same less its mean."""
    from sageattention import sageattn

    mixed: Tensor = sageattn(q, k, v, tensor_layout="NHD")
    if k.shape[1] % SAGE_TILE:
        # Version 1.0.6 fills its last tile up with keys of zeros and counts them in the sum of
        # probabilities: 17.8 dB at 257 tokens. What values of one become is the share that is ours.
        mixed = mixed / sageattn(q, k, torch.ones_like(v), tensor_layout="NHD")
    return mixed.flatten(2)


def _anywhere(target: Target) -> str | None:
    return None


def _needs(
    target: Target,
    *,
    capability: tuple[int, int],
    below: tuple[int, int] = (99, 0),
    half: bool = True,
    package: str | None = None,
    head_dims: tuple[int, ...] = (),
) -> str | None:
    found = target.capability
    if target.device.type != "cuda":
        return "it needs a CUDA device"
    if not capability <= found < below:
        upto = f" and below {below[0]}.{below[1]}" if below < (99, 0) else ""
        return (
            f"it needs compute capability {capability[0]}.{capability[1]}{upto}, "
            f"this GPU has {found[0]}.{found[1]}"
        )
    if half and target.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes 16-bit values, not {str(target.dtype).removeprefix('torch.')}"
    if head_dims and target.head_dim not in head_dims:
        return f"it takes heads of {' or '.join(map(str, head_dims))}, not {target.head_dim}"
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package.replace('_', '-')} is missing"
    return None


def _no_hopper(target: Target) -> str | None:
    if reason := _needs(target, capability=(9, 0), below=(10, 0), head_dims=(HEAD_DIM,)):
        return reason
    if target.dtype != torch.bfloat16:
        return "it takes BF16, not float16"
    return needs_hopper(target.capability)


_no_fa3 = partial(
    _needs,
    capability=(9, 0),
    below=(10, 0),
    package="fa3_fwd",
    head_dims=(64, 128),
)

_TABLE = (
    Backend("sdpa", "PyTorch chooses", attention, _anywhere),
    Backend(
        "math", "plain matrix products and a softmax", partial(_sdpa, SDPBackend.MATH), _anywhere
    ),
    Backend(
        "hopper",
        "a kernel of our own",
        _hopper,
        _no_hopper,
        write=hopper_attention,
        programs=programs,
    ),
    Backend(
        "fa3",
        "FlashAttention-3, the wheel fa3-fwd",
        _fa3,
        _no_fa3,
    ),
    Backend(
        "fa3-fp8",
        "FlashAttention-3 in E4M3: lossy",
        _fa3,  # captions, which are short, stay in 16 bits
        _no_fa3,
        run_codes=_fa3,
    ),
    Backend(
        "cudnn",
        "cuDNN through PyTorch",
        partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        partial(_needs, capability=(8, 0)),
    ),
    Backend(
        "flash2",
        "FlashAttention-2 through PyTorch",
        partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        partial(_needs, capability=(8, 0)),
    ),
    Backend(
        "sage",
        "SageAttention: q and k in INT8, lossy",
        _sage,
        partial(_needs, capability=(8, 0), package="sageattention", head_dims=(64, 96, 128)),
    ),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _TABLE}

# The fastest first, lossy ones never. An H200 at 4,160 tokens: 407 us for our own, 424 for
# FlashAttention-3, 510 for cuDNN; at 2,112 tokens 116, 113 and 137, but only our own writes codes.
# FlashAttention-2 took 212 where FlashAttention-3 took 108.
AUTO = ("hopper", "fa3", "cudnn", "flash2", "sdpa")

# What vLLM-Omni's DIFFUSION_ATTENTION_BACKEND calls them.
ALIASES = {
    "TORCH_SDPA": ("sdpa",),
    "FLASH_ATTN": ("fa3", "flash2"),
    "SAGE_ATTN": ("sage",),
}
