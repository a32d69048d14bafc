"""OpenTelemetry spans: one per request, and below it one per stage of every picture.

The stages are timed by the engine anyway, so their spans are written when a picture is done, with
the times they had; nothing of this runs between two steps. A caller's `traceparent` is continued.
"""

import os
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage_fp8.errors import UsageError
from zimage_fp8.serve.job import Job
from zimage_fp8.serve.metrics import STAGES
from zimage_fp8.serve.reply import Drawn
from zimage_fp8.serve.request_log import PROBED

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SERVICE = "zimage-fp8"
NS = 1_000_000_000


def exporting_tracer() -> "Tracer":
    """A tracer that sends spans by OTLP over HTTP, to where OTEL_EXPORTER_OTLP_* say.

    Raises UsageError when the extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"--traces needs OpenTelemetry: {error}",
            param="traces",
            hint="pip install 'zimage-fp8[otel]'",
        ) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("zimage_fp8")


class Traces:
    """ASGI middleware: a server span around every request that is not a probe."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBED:
            await self.app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        method, path = scope["method"], scope["path"]
        with self.tracer.start_as_current_span(
            f"{method} {path}" if path.startswith("/v1/images/") else method,  # few names
            context=extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
        ) as span:

            async def watch(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            await self.app(scope, receive, watch)


def add_stages(tracer: "Tracer", job: Job, drawn: Drawn) -> None:
    """Spans of a finished picture: queue, the engine's stages in their order, and the file's."""
    request, image = job.request, drawn.image
    about: dict[str, str | int] = {
        "zimage_fp8.policy": job.engine.policy,
        "zimage_fp8.size": f"{request.width}x{request.height}",
        "zimage_fp8.nfe": image.nfe,
        "zimage_fp8.seed": request.seed,
    }
    stages = {"queue": drawn.queued_s}
    stages |= {STAGES.get(name, name): took_s for name, took_s in image.timings_s.items()}
    stages["picture"] = drawn.picture_s
    begin = int(job.submitted * NS)
    for name, took_s in stages.items():
        end = begin + int(took_s * NS)
        tracer.start_span(name, start_time=begin, attributes=about).end(end_time=end)
        begin = end
