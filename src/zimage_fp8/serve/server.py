"""VERB serve: from the command line's options to a listening process."""

import contextlib
import logging
import socket
import sys

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


def serve(
    model: str,
    *,
    policy: str | None = None,
    quantization_config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    device: str | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    served_model_name: str | None = None,
    omni: bool = False,
    embed_metadata: bool = True,
    log_prompts: bool = False,
) -> None:
    """Serve `model` over HTTP until SIGINT or SIGTERM, then finish what was accepted.

    Options are vLLM-Omni's where it has them; `omni`, its switch for serving pictures at all, is
    accepted and changes nothing. Everything that can be wrong cheaply (options, port) is checked
    before the model is loaded. Raises UsageError, ModelError, CheckpointError, ZImageError.
    """
    _log_to_stderr()
    _refuse_tensor_parallel(tensor_parallel_size)
    chosen = _choose_policy(model, policy, quantization_config)
    options = ServeOptions(
        names=(served_model_name or model,), embed_metadata=embed_metadata, log_prompts=log_prompts
    )
    with contextlib.closing(bind(host, port)) as listener:
        limit_gpu_memory(gpu_memory_utilization, device)
        pipeline = load_pipeline(model, policy=chosen, dtype=dtype, device=device)
        _announce(pipeline, listener)
        _run(pipeline, options, listener)


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


def _run(engine: Engine, options: ServeOptions, listener: socket.socket) -> None:
    config = uvicorn.Config(
        build_app(engine, options),
        log_config=None,  # one log, on stderr; uvicorn's own would put access lines on stdout
        access_log=False,
        timeout_keep_alive=60,
    )
    # uvicorn drains on SIGINT and then raises KeyboardInterrupt, which is no failure here.
    with contextlib.suppress(KeyboardInterrupt):
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except OSError as error:  # bound but not listening, two servers can share an address
            raise ZImageError(f"cannot listen: {error.strerror or error}") from None


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
