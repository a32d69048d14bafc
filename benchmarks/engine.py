"""The denoise loop at full size: milliseconds per policy and size, sustained, with a ladder.

    python benchmarks/engine.py --out engine.json [--policies full bf16_base] [--seconds 8]
    python benchmarks/engine.py --ladder ladder.json
    python benchmarks/engine.py --profile profile.json --policies full

Random weights made on the GPU: speed and memory are real, pictures are meaningless. Static scales
come from one observed forward. Every loop is eight forwards, batch 1, guidance 0, with a caption of
64 tokens; it runs back to back for `--seconds`, on finite random data, since the GPU slows down at
its power limit; the median is reported with SM clock and power.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fake_model import random_tensor
from gpu import envelope, sampled_gpu
from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.engine.transformer import FusedTransformer
from zimage_fp8.kernels.attention import BACKENDS, Target, choose_backend
from zimage_fp8.layout import ZImageConfig, linear_shapes, members_of
from zimage_fp8.model.sampling import denoise, draw_latent, schedule, transformer_time
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.numerics import amax, scale_of
from zimage_fp8.quant.linear import QuantLinear, quantize_weight, weight_amax, weight_scales
from zimage_fp8.quant.policy import Plan, find_policy, resolve

SIZES = {"1024x512": (512, 1024), "1024x1024": (1024, 1024)}  # name -> height, width
POLICIES = ("bf16_base", "full", "online_fp8", "fp8-row", "int8-rot")
STEPS, SHIFT, CAPTION_TOKENS = 8, 3.0, 64
DEVICE = torch.device("cuda")


class RandomModel:
    """BF16 weights once; transformers of any policy from them; the amax that a forward saw."""

    def __init__(self, config: ZImageConfig) -> None:
        self.config = config
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        with torch.device("meta"):
            self.base = ZImageTransformer(config)
        for name, module in list(self.base.named_modules()):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                value = random_tensor(f"{name}.{leaf}", tuple(parameter.shape), self.generator)
                module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        self.base.eval()
        self.amax = self._observe()

    def transformer(self, policy: str) -> ZImageTransformer:
        """The model under a policy; layers that stay BF16 are shared with the others."""
        plan = resolve(find_policy(policy), linear_shapes(self.config))
        with torch.device("meta"):
            model = ZImageTransformer(self.config)
        for name, module in list(model.named_modules()):
            replacement = self._quantized(name, plan)
            if replacement is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, replacement)
                continue
            for leaf, _ in list(module.named_parameters(recurse=False)):
                shared = self.base.get_submodule(name).get_parameter(leaf)
                # adaLN is packed into one matrix by the engine, which moves the parameter
                module.register_parameter(leaf, nn.Parameter(shared.data, requires_grad=False))
        return model.eval()

    def _quantized(self, name: str, plan: Plan) -> QuantLinear | None:
        first = members_of(name)[0]
        spec = plan.entries[first].spec if first in plan.entries else None
        if spec is None:
            return None
        weight = self.base.get_submodule(name).weight
        (scale,) = weight_scales([weight_amax(weight, spec)], spec)
        static = scale_of(self.amax[name], spec.format) if spec.is_static else None
        return QuantLinear(spec, quantize_weight(weight, scale, spec), scale, static)

    @torch.inference_mode()
    def _observe(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found = amax(inputs[0])
                seen[name] = torch.maximum(seen[name], found) if name in seen else found

            return observe

        hooks = [
            module.register_forward_pre_hook(hook(name))
            for name, module in self.base.named_modules()
            if isinstance(module, nn.Linear)
        ]
        refined = self.base.refine_caption(*caption(self.config))
        for sigma in (1.0, 0.7, 0.3):
            self.base(latent(self.config, "1024x512"), transformer_time(sigma).cuda(), refined)
        for handle in hooks:
            handle.remove()
        return seen


def caption(config: ZImageConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, CAPTION_TOKENS, config.cap_feat_dim, generator=generator)
    is_pad = torch.arange(CAPTION_TOKENS)[None] >= CAPTION_TOKENS - 7
    return values.to(DEVICE, torch.bfloat16), is_pad.to(DEVICE)


def latent(config: ZImageConfig, size: str) -> Tensor:
    return draw_latent(0, config.in_channels, *SIZES[size]).to(DEVICE)


def loop_of(forward: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Callable[[], Tensor]:
    """A whole denoise loop, as the pipeline runs it."""
    sigmas = schedule(STEPS, SHIFT)

    def loop() -> Tensor:
        return denoise(lambda x, sigma: -forward(x, transformer_time(sigma)), start, sigmas)

    return loop


def engine_loop(engine: FusedTransformer, size: str) -> Callable[[], Tensor]:
    refined = engine.refine_caption(*caption(engine.config))
    return loop_of(lambda x, t: engine.forward(x, t, refined), latent(engine.config, size))


def plain_loop(model: ZImageTransformer, size: str) -> Callable[[], Tensor]:
    refined = model.refine_caption(*caption(model.config))
    return loop_of(lambda x, t: model(x, t.cuda(), refined).float(), latent(model.config, size))


def diffusers_loop(weights: ZImageTransformer, size: str) -> Callable[[], Tensor]:
    """diffusers' own transformer in BF16, eager, with the same weights."""
    from diffusers import ZImageTransformer2DModel

    config = weights.config
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            dim=config.dim,
            n_layers=config.n_layers,
            n_refiner_layers=config.n_refiner_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_heads,
            cap_feat_dim=config.cap_feat_dim,
        )
    state: dict[str, Tensor] = {}
    for name, module in weights.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            members = members_of(name)
            for member, part in zip(members, value.data.chunk(len(members)), strict=True):
                state[f"{member}.{leaf}" if member else leaf] = part
    model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise RuntimeError(f"diffusers' model has other parameters: {missing[:3]}")
    model.eval()
    values, is_pad = caption(config)
    feature = values[0, : int((~is_pad).sum())]

    def forward(x: Tensor, t: Tensor) -> Tensor:
        out = model([x[0].unsqueeze(1).bfloat16()], t.cuda(), [feature], return_dict=False)[0]
        return out[0].squeeze(1)[None].float()

    return loop_of(forward, latent(config, size))


@torch.inference_mode()
def sustained(loop: Callable[[], Tensor], seconds: float) -> dict[str, float]:
    """Median milliseconds of a loop over `seconds` of back-to-back work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first = loop()
    if not first.isfinite().all():
        raise RuntimeError("the loop's result is not finite: times would flatter")
    loop()
    torch.cuda.synchronize()
    times: list[float] = []
    with sampled_gpu() as gpu:
        while sum(times) < seconds * 1000 or len(times) < 5:
            start.record()
            loop()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    ordered = sorted(times)
    return {
        "ms": median(times),
        "ms_p10": ordered[len(times) // 10],
        "ms_p90": ordered[len(times) * 9 // 10],
        "loops": len(times),
        "torch_allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        **gpu,
    }


def engine_of(model: ZImageTransformer, backend: str = "auto") -> FusedTransformer:
    chosen, _ = choose_backend(backend, Target(DEVICE, torch.bfloat16, model.config.head_dim))
    return FusedTransformer(model, chosen, GraphCache(DEVICE))


def show(name: str, size: str, result: dict[str, float]) -> None:
    print(
        f"{name:44} {size:10} {result['ms']:7.1f} ms  "
        f"{result.get('sm_clock_mhz', 0):5.0f} MHz {result.get('power_w', 0):4.0f} W",
        flush=True,
    )


@torch.inference_mode()
def measure(model: RandomModel, policies: list[str], seconds: float, backend: str) -> list[Any]:
    rows = []
    for policy in policies:
        engine = engine_of(model.transformer(policy), backend)
        for size in SIZES:
            torch.cuda.reset_peak_memory_stats()
            result = sustained(engine_loop(engine, size), seconds)
            show(f"{policy} ({engine.attention.name})", size, result)
            gemm = {
                name: linear.chosen[max(linear.chosen)] for name, linear in engine.linears.items()
            }
            rows.append(
                {
                    "policy": policy,
                    "size": size,
                    "attention": engine.attention.name,
                    "gemm": gemm,
                    **result,
                }
            )
        engine.graphs.forget()
        del engine
        torch.cuda.empty_cache()
    return rows


@torch.inference_mode()
def ladder(model: RandomModel, seconds: float) -> list[dict[str, Any]]:
    """eager -> fused -> graph -> FP8 -> FA3, one thing at a time, in one process."""
    base = model.transformer("bf16_base")
    sdpa = BACKENDS["sdpa"]

    def fused(policy: str, backend: str, *, graph: bool) -> Callable[[str], Callable[[], Tensor]]:
        engine = FusedTransformer(
            model.transformer(policy),
            BACKENDS[backend],
            GraphCache(DEVICE if graph else torch.device("cpu")),
        )
        return lambda size: engine_loop(engine, size)

    rungs: list[tuple[str, str, Callable[[], Callable[[str], Callable[[], Tensor]]]]] = [
        (
            "diffusers, eager",
            "BF16, as shipped",
            lambda: lambda size: diffusers_loop(model.base, size),
        ),
        (
            "packed, eager",
            "our plain model: q, k, v and w1, w3 packed, the caption refined once",
            lambda: lambda size: plain_loop(base, size),
        ),
        (
            "fused kernels",
            "one kernel per norm, gate and rotation; adaLN once per timestep",
            lambda: fused("bf16_base", "sdpa", graph=False),
        ),
        ("CUDA graph", "one replay per step", lambda: fused("bf16_base", "sdpa", graph=True)),
        (
            "FP8",
            "static E4M3, quantized inside the fused kernels",
            lambda: fused("full", "sdpa", graph=True),
        ),
        (
            "FlashAttention-3",
            "instead of PyTorch's choice",
            lambda: fused("full", "fa3", graph=True),
        ),
    ]  # fmt: skip
    found = []
    for name, what, make in rungs:
        try:
            loops = make()
            results = {size: sustained(loops(size), seconds) for size in SIZES}
        except Exception as error:  # noqa: BLE001  one rung less is no reason to lose the others
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        for size, result in results.items():
            show(name, size, result)
        found.append(
            {"name": name, "what": what, "ms": {s: r["ms"] for s, r in results.items()}}
            | {"details": results}
        )
        del loops
        torch.cuda.empty_cache()
    print("PyTorch's own attention here:", sdpa.summary)
    return found


@torch.inference_mode()
def profile(model: RandomModel, policies: list[str], backend: str) -> list[dict[str, Any]]:
    """Where a loop's time goes, by kernel, under load."""
    tables = []
    for policy in policies:
        engine = engine_of(model.transformer(policy), backend)
        for size in SIZES:
            loop = engine_loop(engine, size)
            for _ in range(10):  # to the clock that lasts
                loop()
            torch.cuda.synchronize()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as recorded:
                for _ in range(3):
                    loop()
                torch.cuda.synchronize()
            spans: dict[str, list[float]] = defaultdict(list)
            for event in recorded.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    spans[event.name].append(event.device_time_total)
            kernels = [
                {"name": name[:120], "launches": len(times) // 3, "ms": sum(times) / 3000}
                for name, times in spans.items()
            ]
            kernels.sort(key=lambda row: -float(str(row["ms"])))
            total = sum(float(str(row["ms"])) for row in kernels)
            print(f"{policy} {size}: {total:.1f} ms in kernels")
            for row in kernels[:16]:
                print(f"  {row['ms']:8.2f} ms {row['launches']:5} x {str(row['name'])[:90]}")
            tables.append({"policy": policy, "size": size, "ms": total, "kernels": kernels[:40]})
        engine.graphs.forget()
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ladder", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    model = RandomModel(ZImageConfig())
    facts = envelope() | {
        "weights": "random: speed and memory are real, pictures are meaningless",
        "steps": STEPS,
        "caption_tokens": CAPTION_TOKENS,
    }
    if arguments.out:
        rows = measure(model, arguments.policies, arguments.seconds, arguments.attention)
        arguments.out.write_text(json.dumps(facts | {"loops": rows}, indent=1) + "\n")
    if arguments.profile:
        tables = profile(model, arguments.policies, arguments.attention)
        arguments.profile.write_text(json.dumps(facts | {"tables": tables}, indent=1) + "\n")
    if arguments.ladder:
        rungs = ladder(model, arguments.seconds)
        arguments.ladder.write_text(json.dumps(facts | {"rungs": rungs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
