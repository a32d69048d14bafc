"""What Prometheus may read at /metrics: one registry per app, and no prompt in any label."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily

from zimage_fp8 import __version__
from zimage_fp8.model.request import GeneratedImage
from zimage_fp8.serve.catalog import Catalog
from zimage_fp8.serve.job import Engine, Job, JobCancelled
from zimage_fp8.serve.jobs import JobQueue

NAMESPACE = "zimage_fp8"
SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
BATCHES = (1, 2, 4, 8, 16)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

# The engine's stages under the names that operators know; `encode` is writing the file there.
STAGES = {
    "encode": "text_encode",
    "denoise": "denoise",
    "preview": "preview",
    "decode": "vae_decode",
}


class _PromptCache:
    """Counters that the engines keep themselves: read, not counted again."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            f"{NAMESPACE}_prompt_cache",
            "Prompts that were encoded already, and that were not.",
            labels=("model", "result"),
        )
        for name, engine in self._engines.items():
            family.add_metric((name, "hit"), engine.captions.hits)
            family.add_metric((name, "miss"), engine.captions.misses)
        yield family


class Metrics:
    """Counts answers and finished jobs; asks queue and engines for the rest when read."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, queue: JobQueue, catalog: Catalog) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=NAMESPACE, registry=registry)

        def seconds(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(
                name, text, labels, namespace=NAMESPACE, registry=registry, buckets=buckets
            )

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=NAMESPACE, registry=registry)

        self._requests = counter("requests_total", "Generations answered.", "status")
        self._duration = seconds("request_duration_seconds", "From request to last byte.")
        self._queue_wait = seconds("queue_wait_seconds", "A picture's wait before its first step.")
        self._step = seconds(
            "denoise_step_seconds", "Mean step of a finished picture.", buckets=STEP_SECONDS
        )
        self._stage = seconds("stage_seconds", "A stage of a finished picture.", "stage")
        self._batch = Histogram(
            "batch_size",
            "The most pictures that shared a forward with a finished one.",
            namespace=NAMESPACE,
            registry=registry,
            buckets=BATCHES,
        )
        self._images = counter("images_total", "Pictures drawn.", "model")
        self._pixels = counter("image_pixels_total", "Pixels drawn.")
        self._cancelled = counter("cancelled_total", "Pictures given up: the client left.")
        gauge("queue_depth", "Pictures waiting.").set_function(lambda: queue.num_waiting)
        gauge("requests_running", "Pictures being drawn.").set_function(lambda: queue.num_running)
        memory = gauge("gpu_memory_bytes", "Memory of the GPU that torch holds.", "kind")
        memory.labels("allocated").set_function(torch.cuda.memory_allocated)
        memory.labels("reserved").set_function(torch.cuda.memory_reserved)
        memory.labels("peak_allocated").set_function(torch.cuda.max_memory_allocated)
        build = gauge("build_info", "What runs here.", "version", "model", "policy", "gpu")
        for model, server in catalog.facts.items():
            build.labels(__version__, model, str(server["policy"]), str(server["device"])).set(1)
        registry.register(_PromptCache(catalog.engines))

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def count_answer(self, status: int, duration_s: float) -> None:
        self._requests.labels(str(status)).inc()
        self._duration.observe(duration_s)

    def count_file(self, took_s: float) -> None:
        """A picture was written as png, webp or jpeg."""
        self._stage.labels("encode").observe(took_s)

    def watch(self, job: Job, model: str) -> None:
        """Count `job` when it ends."""
        job.future.add_done_callback(lambda future: self._count(job, model, future))

    def _count(self, job: Job, model: str, future: Future[GeneratedImage]) -> None:
        error = future.exception()
        if isinstance(error, JobCancelled):
            self._cancelled.inc()
        if error is not None:
            return
        image = future.result()
        self._queue_wait.observe(job.queued_s)
        self._step.observe(image.timings_s["denoise"] / image.request.steps_to_run)
        for stage, took_s in image.timings_s.items():
            self._stage.labels(STAGES.get(stage, stage)).observe(took_s)
        self._batch.observe(image.company)
        self._images.labels(model).inc()
        self._pixels.inc(image.request.width * image.request.height)
