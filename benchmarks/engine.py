"""The denoise loop at full size: milliseconds per policy and size, sustained, with a ladder.

    python benchmarks/engine.py --out engine.json [--policies full bf16_base] [--seconds 8]
    python benchmarks/engine.py --ladder ladder.json
    python benchmarks/engine.py --profile profile.json --policies full
    python benchmarks/engine.py --scale tiny --seconds 0 --ladder ladder.json    a dry run

Random weights made on the GPU: speed and memory are real, pictures are meaningless. Static scales
come from one observed forward. Every loop is eight forwards, batch 1, guidance 0, with a caption of
64 tokens; it runs back to back for `--seconds`, on finite random data, since the GPU slows down at
its power limit; the median is reported with SM clock and power.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fake_model import SCALES, random_tensor
from gpu import DEVICE, RANDOM_WEIGHTS, envelope, sustained, write_rows
from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.engine.transformer import FusedTransformer
from zimage_fp8.kernels.attention import BACKENDS, Target, choose_backend
from zimage_fp8.layout import ZImageConfig, linear_shapes, members_of
from zimage_fp8.model.sampling import denoise, draw_latent, schedule, transformer_time
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.numerics import amax, scale_of
from zimage_fp8.quant.linear import QuantLinear, quantize_weight, weight_amax, weight_scales
from zimage_fp8.quant.policy import Plan, find_policy, resolve

SIZES = {  # scale -> name -> height, width
    "full": {"1024x512": (512, 1024), "1024x1024": (1024, 1024)},
    "tiny": {"64x32": (32, 64), "64x64": (64, 64)},
}
POLICIES = ("bf16_base", "full", "online_fp8", "fp8-row", "int8-rot")
STEPS, SHIFT, CAPTION_TOKENS = 8, 3.0, 64
Size = tuple[int, int]  # height, width


class RandomModel:
    """BF16 weights once; transformers of any policy from them; the amax that a forward saw."""

    def __init__(self, scale: str) -> None:
        self.config, self.sizes = SCALES[scale].transformer, SIZES[scale]
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        with torch.device("meta"):
            self.base = ZImageTransformer(self.config)
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
            first = next(iter(self.sizes.values()))
            self.base(latent(self.config, first), transformer_time(sigma).to(DEVICE), refined)
        for handle in hooks:
            handle.remove()
        return seen


def caption(config: ZImageConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, CAPTION_TOKENS, config.cap_feat_dim, generator=generator)
    is_pad = torch.arange(CAPTION_TOKENS)[None] >= CAPTION_TOKENS - 7
    return values.to(DEVICE, torch.bfloat16), is_pad.to(DEVICE)


def latent(config: ZImageConfig, size: Size) -> Tensor:
    return draw_latent(0, config.in_channels, *size).to(DEVICE)


def loop_of(forward: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Callable[[], Tensor]:
    """A whole denoise loop, as the pipeline runs it."""
    sigmas = schedule(STEPS, SHIFT)

    def loop() -> Tensor:
        return denoise(lambda x, sigma: -forward(x, transformer_time(sigma)), start, sigmas)

    return loop


def engine_loop(engine: FusedTransformer, size: Size) -> Callable[[], Tensor]:
    refined = engine.refine_caption(*caption(engine.config))
    return loop_of(lambda x, t: engine.forward(x, t, refined), latent(engine.config, size))


def plain_loop(model: ZImageTransformer, size: Size) -> Callable[[], Tensor]:
    refined = model.refine_caption(*caption(model.config))
    return loop_of(lambda x, t: model(x, t.to(DEVICE), refined).float(), latent(model.config, size))


def diffusers_loop(weights: ZImageTransformer, size: Size) -> Callable[[], Tensor]:
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
            axes_dims=list(config.axes_dims),
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
        out = model([x[0].unsqueeze(1).bfloat16()], t.to(DEVICE), [feature], return_dict=False)[0]
        return out[0].squeeze(1)[None].float()

    return loop_of(forward, latent(config, size))


def measured(loop: Callable[[], Tensor], seconds: float) -> dict[str, float]:
    """`gpu.sustained`, of a loop whose result is finite: of others the times would flatter."""
    if not loop().isfinite().all():
        raise RuntimeError("the loop's result is not finite: times would flatter")
    found = sustained(loop, seconds)
    if DEVICE.type == "cuda":
        found["torch_allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def engine_of(model: ZImageTransformer, backend: str = "auto") -> FusedTransformer:
    chosen, _ = choose_backend(backend, Target(DEVICE, torch.bfloat16, model.config.head_dim))
    return FusedTransformer(model, chosen, GraphCache(DEVICE))


def show(name: str, size: str, result: dict[str, float]) -> None:
    print(
        f"{name:44} {size:10} {result['ms']:7.1f} ms  "
        f"{result.get('sm_clock_mhz', 0):5.0f} MHz {result.get('power_w', 0):4.0f} W",
        flush=True,
    )


def measure(
    model: RandomModel, policies: list[str], seconds: float, backends: list[str]
) -> Iterator[dict[str, Any]]:
    """The loop under every policy and attention, size by size."""
    for policy, backend in product(policies, backends):
        engine = engine_of(model.transformer(policy), backend)
        for name, size in model.sizes.items():
            with torch.inference_mode():
                reset_peak()
                result = measured(engine_loop(engine, size), seconds)
            show(f"{policy} ({engine.attention.name})", name, result)
            gemm = {
                layer: linear.chosen[max(linear.chosen)] for layer, linear in engine.linears.items()
            }
            facts = {"policy": policy, "size": name, "attention": engine.attention.name}
            yield facts | {"gemm": gemm, **result}
        engine.graphs.forget()
        del engine
        torch.cuda.empty_cache()


Loops = Callable[[Size], Callable[[], Tensor]]


def ladder(model: RandomModel, seconds: float) -> Iterator[dict[str, Any]]:
    """eager -> fused -> graph -> FP8 -> FA3 -> ours, one thing at a time, in one process."""
    base = model.transformer("bf16_base")
    no_graph = torch.device("cpu")

    def fused(policy: str, backend: str, graphs: torch.device) -> Loops:
        attention = BACKENDS[backend]
        engine = FusedTransformer(model.transformer(policy), attention, GraphCache(graphs))
        return lambda size: engine_loop(engine, size)

    rungs: tuple[tuple[str, str, Callable[[], Loops]], ...] = (
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
            lambda: fused("bf16_base", "sdpa", no_graph),
        ),
        ("CUDA graph", "one replay per step", lambda: fused("bf16_base", "sdpa", DEVICE)),
        (
            "FP8",
            "static E4M3, quantized inside the fused kernels",
            lambda: fused("full", "sdpa", DEVICE),
        ),
        (
            "FlashAttention-3",
            "instead of PyTorch's choice",
            lambda: fused("full", "fa3", DEVICE),
        ),
        (
            "own attention",
            "writes E4M3 for the layer behind it, and needs no wheel",
            lambda: fused("full", "hopper", DEVICE),
        ),
        (
            "attention in E4M3",
            "if asked for by name",
            lambda: fused("full", "fa3-fp8", DEVICE),
        ),
    )
    for name, what, make in rungs:
        details = {}
        try:
            with torch.inference_mode():
                loops = make()
                for size_name, size in model.sizes.items():
                    details[size_name] = measured(loops(size), seconds)
                    show(name, size_name, details[size_name])
        except Exception as error:  # noqa: BLE001  one rung less is no reason to lose the others
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        ms = {size: found["ms"] for size, found in details.items()}
        yield {"name": name, "what": what, "ms": ms, "details": details}
        del loops
        torch.cuda.empty_cache()


def profile(
    model: RandomModel, policies: list[str], backends: list[str]
) -> Iterator[dict[str, Any]]:
    """Where a loop's time goes, by kernel, under load."""
    on_gpu = DEVICE.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    for policy, backend in product(policies, backends):
        engine = engine_of(model.transformer(policy), backend)
        for size_name, size in model.sizes.items():
            with torch.inference_mode():
                loop = engine_loop(engine, size)
                for _ in range(10 if on_gpu else 1):  # to the clock that lasts
                    loop()
                with torch.profiler.profile(
                    activities=[activity.CUDA if on_gpu else activity.CPU], acc_events=True
                ) as recorded:
                    for _ in range(3):
                        loop()
                    if on_gpu:
                        torch.cuda.synchronize()
            spans: dict[str, list[float]] = defaultdict(list)
            for event in recorded.events():
                if not on_gpu:
                    spans[event.name].append(event.self_cpu_time_total)
                elif event.device_type == torch.autograd.DeviceType.CUDA:
                    spans[event.name].append(event.device_time_total)
            kernels = [
                {"name": name[:120], "launches": len(times) // 3, "ms": sum(times) / 3000}
                for name, times in spans.items()
            ]
            kernels.sort(key=lambda row: -float(str(row["ms"])))
            total = sum(float(str(row["ms"])) for row in kernels)
            print(f"{policy} {size_name}: {total:.1f} ms in kernels")
            for row in kernels[:16]:
                print(f"  {row['ms']:8.2f} ms {row['launches']:5} x {str(row['name'])[:90]}")
            facts = {"policy": policy, "attention": engine.attention.name, "size": size_name}
            yield facts | {"ms": total, "kernels": kernels[:40]}
        engine.graphs.forget()


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ladder", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--scale", choices=SIZES, default="full", help="tiny: a dry run")
    arguments = parser.parse_args()
    if arguments.scale == "full" and DEVICE.type == "cpu":
        parser.error("full size needs a GPU; --scale tiny proves the script without one")
    model = RandomModel(arguments.scale)
    facts = envelope() | {
        "weights": RANDOM_WEIGHTS,
        "steps": STEPS,
        "caption_tokens": CAPTION_TOKENS,
    }
    policies, backends, seconds = arguments.policies, arguments.attention, arguments.seconds
    for path, key, rows in (
        (arguments.out, "loops", measure(model, policies, seconds, backends)),
        (arguments.profile, "tables", profile(model, policies, backends)),
        (arguments.ladder, "rungs", ladder(model, seconds)),
    ):
        if path:
            write_rows(path, facts, key, rows)


if __name__ == "__main__":
    main()
