"""`--quantization-config` in every spelling that vLLM-Omni 0.20 to 0.30 takes.

Two things can be meant. `fp8`: quantize while loading, which is our policy `online_fp8`. ModelOpt's
dictionaries: the checkpoint on disk is quantized already; it then describes itself, so that the
dictionary only has to agree with it. Everything else is refused with what is accepted.

    {"method": "fp8"}    fp8    "fp8"                                            online
    {"method": "modelopt", "quant_method": "FP8", "exclude_modules": [...]}      0.20
    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [...]}           0.22 and later
    {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", ...}}     ModelOpt's own
    {"transformer": {...}, "text_encoder": null}                                 one per component
    none    null                                                                 as the model is
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from zimage_fp8.errors import UsageError

PARAM = "quantization_config"
EXAMPLES = """'{"method":"fp8"}' or '{"method":"modelopt","quant_algo":"FP8","ignore":[…]}'"""

MODELOPT_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")

# Keys that have a meaning here, or that agree with what happens anyway. Others are named in a
# warning: vLLM-Omni ignores some of them silently, and that is how checkpoints get corrupted.
KNOWN_KEYS: dict[str, frozenset[str]] = {
    "fp8": frozenset({
        "method", "quant_method", "activation_scheme", "is_checkpoint_fp8_serialized",
        "ignored_layers",
    }),
    "modelopt": frozenset({
        "method", "quant_method", "quant_algo", "ignore", "exclude_modules", "producer",
        "is_checkpoint_fp8_serialized", "kv_cache_quant_method", "kv_cache_quant_algo",
        "kv_cache_scheme", "quantization",
    }),
}  # fmt: skip
COMPONENTS = ("transformer", "text_encoder", "vae", "default")


@dataclass(frozen=True)
class Asked:
    """What a configuration asks for.

    policy: the policy to load with, None for "as the model is". stored_algo: the `quant_algo` that
    the checkpoint must already hold, "any" when it need only be quantized, None when no matter.
    """

    policy: str | None = None
    stored_algo: str | None = None
    warnings: tuple[str, ...] = ()


def resolve(text: str | None) -> Asked:
    """What `text` asks for. Raises UsageError when it cannot be read or is not supported."""
    config = _parse(text)
    if config is None:
        return Asked()
    config, warnings = _transformer_part(config)
    if config is None:
        return Asked(warnings=warnings)
    method = _method(config)
    warnings += _unknown_keys(method, config)
    return RESOLVERS[method](config, warnings)


def _parse(text: str | None) -> dict[str, object] | None:
    text = (text or "").strip()
    if text.lower() in ("", "none", "null"):
        return None
    if text[0] not in '{["':
        return {"method": text}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _refused(f"is not valid JSON ({error})") from None
    if isinstance(value, str):
        return _parse(value)
    if not isinstance(value, dict):
        raise _refused("must be a JSON object or the name of a method")
    return value


def _transformer_part(
    config: dict[str, object],
) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    """One configuration per component: only the transformer's can be honoured."""
    if not any(component in config for component in COMPONENTS):
        return config, ()
    chosen = config.get("transformer", config.get("default"))
    warnings = tuple(
        f"quantization config: {component} stays BF16; only the transformer is quantized"
        for component in ("text_encoder", "vae")
        if config.get(component) is not None
    )
    if isinstance(chosen, dict):
        return chosen, warnings
    return _parse(str(chosen)), warnings


def _method(config: Mapping[str, object]) -> str:
    producer = config.get("producer")
    produced_by = producer.get("name") if isinstance(producer, dict) else None
    for name in (config.get("method"), config.get("quant_method"), produced_by):
        if isinstance(name, str) and name.lower() in KNOWN_KEYS:
            return name.lower()
    found = config.get("method", config.get("quant_method"))
    raise _refused(f"names the method {found!r}" if found else "names no method")


def _unknown_keys(method: str, config: Mapping[str, object]) -> tuple[str, ...]:
    unknown = sorted(set(config) - KNOWN_KEYS[method])
    return tuple(f"quantization config: {key!r} is unknown and was ignored" for key in unknown)


def _resolve_fp8(config: Mapping[str, object], warnings: tuple[str, ...]) -> Asked:
    if config.get("is_checkpoint_fp8_serialized"):
        return Asked(stored_algo="any", warnings=warnings)
    if config.get("activation_scheme", "dynamic") != "dynamic":
        raise UsageError(
            "online fp8 computes activation scales at run time, so activation_scheme must be "
            f"'dynamic', not {config['activation_scheme']!r}",
            param=PARAM,
            hint="static scales need a checkpoint: zimage-fp8 quantize MODEL --policy full",
        )
    if config.get("ignored_layers"):
        raise UsageError(
            "ignored_layers is not supported with online fp8",
            param=PARAM,
            hint="choose layers with --policy, for example --policy 'online_fp8[!15-29]'",
        )
    return Asked(policy="online_fp8", warnings=warnings)


def _resolve_modelopt(config: Mapping[str, object], warnings: tuple[str, ...]) -> Asked:
    nested = config.get("quantization")
    inner = {**config, **nested} if isinstance(nested, dict) else config
    for key in ("kv_cache_quant_method", "kv_cache_quant_algo", "kv_cache_scheme"):
        if inner.get(key) is not None:
            warnings += (f"quantization config: {key} has no effect, this model has no KV cache",)
    algo = _algo(inner)
    if algo not in (*MODELOPT_ALGOS, "any"):
        raise _refused(f"asks for {algo}, and of ModelOpt only {' and '.join(MODELOPT_ALGOS)} run")
    return Asked(stored_algo=algo, warnings=warnings)


def _algo(config: Mapping[str, object]) -> str:
    """0.22 and later say `quant_algo`; 0.20 says it in `quant_method`, next to `method`."""
    for name in (config.get("quant_algo"), config.get("quant_method")):
        if isinstance(name, str) and name.lower() != "modelopt":
            return name.upper()
    return "any"


RESOLVERS = {"fp8": _resolve_fp8, "modelopt": _resolve_modelopt}


def _refused(what: str) -> UsageError:
    return UsageError(
        f"the quantization config {what}; accepted are {EXAMPLES}",
        param=PARAM,
        hint="or name a policy: --policy online_fp8",
    )


def choose_policy(
    asked: Asked, option: str | None, stored_algo: str | None, model: str
) -> tuple[str | None, tuple[str, ...]]:
    """The policy to load `model` with, and warnings. None: as the model is on disk.

    option: `--policy`. stored_algo: the `quant_algo` of the checkpoint, None when it is not
    quantized. Raises UsageError when the three contradict each other.
    """
    if asked.policy and option and asked.policy != option:
        raise UsageError(
            f"--policy {option} contradicts --quantization-config, which asks for {asked.policy}",
            param="policy",
            hint="give one of them",
        )
    if asked.stored_algo and stored_algo is None:
        raise UsageError(
            f"the quantization config describes a quantized checkpoint, but {model} is not one",
            param=PARAM,
            hint="""use '{"method":"fp8"}', or make one: zimage-fp8 quantize MODEL --policy full""",
        )
    if asked.stored_algo not in (None, "any", stored_algo):
        raise UsageError(
            f"the quantization config says {asked.stored_algo}, but {model} holds {stored_algo}",
            param=PARAM,
            hint="leave the option out: the checkpoint describes itself",
        )
    if asked.policy and stored_algo:
        return None, (f"{model} is already quantized ({stored_algo}): its own scales are used",)
    return option or asked.policy, ()
