"""VERB serve: from the command line's options to a listening process."""

import contextlib
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn

from zimage_fp8.checkpoint.dialects import algorithm_of, read_stored
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.serve.app import ServeOptions, build_app
from zimage_fp8.serve.jobs import Engine
from zimage_fp8.serve.quantization_config import choose_policy, resolve

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str,
    options: ServeOptions | None = None,
    *,
    policy: str | None = None,
    quantization_config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    device: str | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    omni: bool = False,
) -> None:
    """Serve `model` over HTTP until SIGINT or SIGTERM, then finish what was begun.

    Options are vLLM-Omni's where it has them; `omni`, its switch for serving pictures at all, is
    accepted and changes nothing. Everything that can be wrong cheaply (options, port) is checked
    before the model is loaded. Raises UsageError, ModelError, CheckpointError, ZImageError.
    """
    _log_to_stderr()
    _refuse_tensor_parallel(tensor_parallel_size)
    chosen = _choose_policy(model, policy, quantization_config)
    options = options or ServeOptions(names=(model,))
    with contextlib.closing(bind(host, port)) as listener:
        limit_gpu_memory(gpu_memory_utilization, device)
        pipeline = load_pipeline(model, policy=chosen, dtype=dtype, device=device)
        _announce(pipeline, listener)
        _warn_if_open(host, options)
        _run(pipeline, options, listener)


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


def _choose_policy(model: str, policy: str | None, quantization_config: str | None) -> str | None:
    asked = resolve(quantization_config)
    chosen, warnings = choose_policy(asked, policy, stored_algo(model), model)
    for warning in (*asked.warnings, *warnings):
        log.warning(warning)
    return chosen


def stored_algo(model: str) -> str | None:
    """The `quant_algo` of a quantized checkpoint, None for a BF16 model."""
    config, raw = read_config(find_model(model) / "transformer")
    stored = read_stored(raw, list(linear_shapes(config)))
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


def _announce(engine: Engine, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    facts = ", ".join(f"{k} {v}" for k, v in engine.describe().items() if isinstance(v, str))
    log.info("serving at http://%s:%d (%s)", f"[{host}]" if ":" in host else host, port, facts)


class Server(uvicorn.Server):  # type: ignore[misc]  # mypy skips uvicorn
    """uvicorn, which waits for open requests, around an app that first refuses the queued ones."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.drain()
        await super().shutdown(sockets)


def _warn_if_open(host: str, options: ServeOptions) -> None:
    if not options.api_keys and host not in LOOPBACK:
        log.warning("whoever reaches %s may draw: there is no --api-key", host)


def _run(engine: Engine, options: ServeOptions, listener: socket.socket) -> None:
    config = uvicorn.Config(
        build_app(engine, options),
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


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
