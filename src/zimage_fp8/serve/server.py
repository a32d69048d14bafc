"""VERB serve: from the command line's options to a listening process."""

import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import uvicorn

from zimage_fp8.checkpoint.dialects import algorithm_of, read_stored
from zimage_fp8.engine import EngineOptions
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.loading import DTYPES, find_device
from zimage_fp8.model.source import find_model
from zimage_fp8.serve.app import ServeOptions, build_app
from zimage_fp8.serve.catalog import Card
from zimage_fp8.serve.fleet import check_memory, load_all, name_variants, split_policies
from zimage_fp8.serve.job import Engine
from zimage_fp8.serve.logs import log_to_stderr
from zimage_fp8.serve.quantization_config import choose_policy, resolve
from zimage_fp8.serve.tracing import exporting_tracer

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    models: Sequence[str],
    options: ServeOptions | None = None,
    *,
    policy: str | None = None,
    quantization_config: str | None = None,
    served_model_name: str | None = None,
    quality: Mapping[str, Card] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    device: str | None = None,
    engine: EngineOptions | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    omni: bool = False,
    log_format: str = "human",
    traces: bool = False,
) -> None:
    """Serve models over HTTP until SIGINT or SIGTERM, then finish what was begun.

    models: several, or one under several policies, as `fleet.name_variants` says. quality: what was
    measured of each policy, for /v1/models. Options are vLLM-Omni's where it has them; `omni`, its
    switch for serving pictures at all, is accepted and changes nothing. Everything that can be
    wrong cheaply (options, port, memory) is checked before a model is loaded. Raises UsageError,
    ModelError, CheckpointError, ZImageError.
    """
    log_to_stderr(log_format)
    _refuse_tensor_parallel(tensor_parallel_size)
    where = find_device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}", param="dtype")
    policies = _choose_policies(models, policy, quantization_config)
    variants = name_variants(models, policies, served_model_name)
    options = options or ServeOptions()
    if traces:
        options = replace(options, tracer=exporting_tracer())
    with contextlib.closing(bind(host, port)) as listener:
        limit_gpu_memory(gpu_memory_utilization, device)
        sizes = check_memory(variants, dtype, where, gpu_memory_utilization)
        engines = load_all(variants, dtype, device, engine or EngineOptions())
        _announce(engines, listener)
        for name in sorted({it.policy for it in engines.values()} - set(quality or ())):
            if quality:
                log.warning("the record measured %s, not %s", ", ".join(quality), name)
        _warn_if_open(host, options)
        cards = {name: _card(engines[name], size, quality or {}) for name, size in sizes.items()}
        _run(engines, replace(options, cards=cards), listener)


def _card(engine: Engine, weights_bytes: int, quality: Mapping[str, Card]) -> Card:
    measured = quality.get(engine.policy)
    return {"weights_bytes": weights_bytes, **({"quality": measured} if measured else {})}


def api_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The keys of both sources, blank lines and `#` lines of the file left out.

    Raises UsageError for an empty key, and when the file cannot be read or holds none.
    """
    if not all(key.strip() for key in given):
        raise UsageError("--api-key is empty", param="api_key")
    if file is None:
        return tuple(given)
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}", param="api_key_file") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{file} holds no API key", param="api_key_file")
    return (*given, *found)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet: callers are refused until the model is loaded.

    Raises ZImageError when the address does not exist or is taken.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port}: expected 0 to 65535", param="port")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ZImageError(f"host {host!r} is not an address of this machine: {error}") from None
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ZImageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="choose another --port, or --port 0 for any free one",
        ) from None
    return listener


def _choose_policies(
    models: Sequence[str], policy: str | None, quantization_config: str | None
) -> list[str | None]:
    policies = split_policies(policy)
    if len(models) > 1 or len(policies) > 1:
        if quantization_config is not None:
            raise UsageError(
                "--quantization-config describes one model; use --policy for several",
                param="quantization_config",
            )
        return policies
    asked = resolve(quantization_config)
    chosen, warnings = choose_policy(asked, policies[0], stored_algo(models[0]), models[0])
    for warning in (*asked.warnings, *warnings):
        log.warning(warning)
    return [chosen]


def stored_algo(model: str) -> str | None:
    """The `quant_algo` of a quantized checkpoint, None for a BF16 model."""
    config, raw = read_config(find_model(model) / "transformer")
    stored = read_stored(raw, linear_shapes(config))
    return algorithm_of(stored.plan) if stored else None


def _refuse_tensor_parallel(size: int) -> None:
    if size != 1:
        raise UsageError(
            f"--tensor-parallel-size {size} is not available yet, only 1",
            param="tensor_parallel_size",
            hint="start one server per GPU",
        )


def limit_gpu_memory(share: float | None, device: str | None) -> None:
    """Cap this process at `share` of the card, before anything is allocated on it."""
    if share is None:
        return
    if not 0 < share <= 1:
        raise UsageError(
            f"--gpu-memory-utilization {share}: expected a share of the card, above 0 up to 1",
            param="gpu_memory_utilization",
        )
    if device == "cpu" or not torch.cuda.is_available():
        log.info("--gpu-memory-utilization %g has no effect on a CPU", share)
        return
    torch.cuda.set_per_process_memory_fraction(share, torch.device(device or "cuda").index)


def _announce(engines: Mapping[str, Engine], listener: socket.socket) -> None:
    for name, engine in engines.items():
        facts = ", ".join(f"{k} {v}" for k, v in engine.describe().items() if isinstance(v, str))
        log.info("model %s (%s)", name, facts)
    host, port = listener.getsockname()[:2]
    log.info("serving at http://%s:%d", f"[{host}]" if ":" in host else host, port)


class Server(uvicorn.Server):  # type: ignore[misc]  # mypy skips uvicorn
    """uvicorn, which waits for open requests, around an app that first refuses the queued ones."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.drain()
        await super().shutdown(sockets)


def _warn_if_open(host: str, options: ServeOptions) -> None:
    if not options.api_keys and host not in LOOPBACK:
        log.warning("whoever reaches %s may draw: there is no --api-key", host)


def _run(engines: Mapping[str, Engine], options: ServeOptions, listener: socket.socket) -> None:
    config = uvicorn.Config(
        build_app(engines, options),
        log_config=None,  # one log, on stderr; uvicorn's own would put access lines on stdout
        access_log=False,
        timeout_keep_alive=60,
    )
    server = Server(config)
    # uvicorn raises the signal again after the drain, which is no failure here.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        try:
            server.run(sockets=[listener])
        except OSError as error:  # bound but not listening, two servers can share an address
            raise ZImageError(f"cannot listen: {error.strerror or error}") from None
