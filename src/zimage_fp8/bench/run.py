"""Measuring: one variant after the other, each in a fresh server process, over HTTP."""

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.bench.launch import Server, start_server
from zimage_fp8.bench.load import Client, Drawn
from zimage_fp8.bench.memory import SAMPLING_HZ, Sampler, describe_gpus, probes_for
from zimage_fp8.bench.progress import OnStage
from zimage_fp8.bench.quality import compare, pixels
from zimage_fp8.bench.record import (
    REFERENCE,
    Machine,
    Parameters,
    Pass,
    ProfileFacts,
    Record,
    RequestRecord,
    VariantRecord,
)
from zimage_fp8.bench.variants import Variant
from zimage_fp8.bench.workload import is_test_model
from zimage_fp8.errors import ZImageError
from zimage_fp8.model.source import display_name
from zimage_fp8.provenance import commit, machine, versions


@dataclass(frozen=True)
class Workload:
    """What every variant is put through, and where its pictures and logs go."""

    model: str
    parameters: Parameters
    out: Path
    on_gpu: bool
    on_stage: OnStage


def measure_all(
    model: str,
    variants: Sequence[Variant],
    parameters: Parameters,
    out: Path,
    on_stage: OnStage,
) -> list[VariantRecord]:
    """Measure the variants in order. Stops at the first that does other work than the reference."""
    on_gpu = parameters.device != "cpu" and bool(describe_gpus())
    workload = Workload(model, parameters, out, on_gpu, on_stage)
    measured: list[VariantRecord] = []
    for variant in variants:
        measured.append(measure(variant, workload))
        refuse_unequal_work(measured)
    return measured


def measure(variant: Variant, workload: Workload) -> VariantRecord:
    """Start a server, warm it up, draw, and write down everything it did."""
    parameters = workload.parameters
    arguments = variant.serve_arguments(workload.model, parameters.dtype, parameters.device)
    with start_server(arguments, workload.out / "logs" / f"{variant.policy}.log") as server:
        with Sampler(probes_for(server.pid, on_gpu=workload.on_gpu)) as sampler:
            workload.on_stage(variant.policy, "starting")
            load_s = server.wait_until_healthy()
            warmup, drawn = _draw_all(server, variant.policy, workload)
    requests = [_keep(run, one, variant.policy, workload) for run, one in enumerate(drawn)]
    return VariantRecord(
        name=variant.policy,
        policy=variant.policy,
        attention=str(drawn[-1].facts.server.get("attention")),
        cold_start_s=None,
        sigmas=drawn[-1].facts.sigmas,
        summary=variant.summary,
        command=variant.recorded_command(workload.model, parameters.dtype, parameters.device),
        server=drawn[-1].facts.server,
        load_s=load_s,
        warmup_latencies_s=[one.latency_s for one in warmup],
        requests=requests,
        peak_memory_bytes=sampler.peaks | _reported_peaks(drawn),
        memory_sampling_hz=SAMPLING_HZ,
        num_memory_samples=sampler.num_samples,
    )


def _draw_all(server: Server, policy: str, workload: Workload) -> tuple[list[Drawn], list[Drawn]]:
    parameters = workload.parameters
    client = Client(server.url)

    def draw(prompt: int, seed: int) -> Drawn:
        return client.draw(
            parameters.prompts[prompt],
            seed=seed,
            size=parameters.size,
            steps=parameters.steps,
            guidance=parameters.guidance,
        )

    warmup, drawn = [], []
    try:
        for index in range(parameters.warmup):
            workload.on_stage(policy, f"warm-up {index + 1} of {parameters.warmup}")
            warmup.append(draw(0, max(0, parameters.seeds[0] - 1)))
        for run in range(parameters.runs):
            workload.on_stage(policy, f"run {run + 1} of {parameters.runs}")
            prompt = run % len(parameters.prompts)
            drawn.append(draw(prompt, parameters.seeds[prompt]))
    except ZImageError as error:
        raise server.failure(f"{policy}: {error}") from None
    finally:
        client.close()
    return warmup, drawn


def _keep(run: int, drawn: Drawn, policy: str, workload: Workload) -> RequestRecord:
    """Save the picture and turn the answer into a row."""
    parameters = workload.parameters
    round_, prompt = divmod(run, len(parameters.prompts))
    again = f"-round{round_}" if round_ else ""
    picture = Path("pictures") / policy / f"prompt{prompt}{again}.png"
    path = workload.out / picture
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.png)
    return RequestRecord(
        prompt=prompt,
        size=parameters.size,
        is_timed=True,
        position=run,
        sent_s=None,
        seed=parameters.seeds[prompt],
        latency_s=drawn.latency_s,
        nfe=drawn.facts.nfe,
        timings_s=drawn.facts.timings_s,
        picture=picture.as_posix(),
        sha256=hashlib.sha256(drawn.png).hexdigest(),
    )


def _reported_peaks(drawn: Sequence[Drawn]) -> dict[str, int]:
    """The server's own peaks. They never fall, so the last answer has the highest."""
    return drawn[-1].facts.peak_memory_bytes


def refuse_unequal_work(variants: Sequence[VariantRecord]) -> None:
    """Latencies of different numbers of forwards must not share a table."""
    forwards = {v.policy: sorted({request.nfe for request in v.requests}) for v in variants}
    if len({tuple(counts) for counts in forwards.values()}) > 1:
        listed = ", ".join(f"{policy} {counts}" for policy, counts in forwards.items())
        raise ZImageError(f"the variants ran different numbers of forwards per picture: {listed}")


def with_quality(variants: Sequence[VariantRecord], folder: Path) -> list[VariantRecord]:
    """Every picture compared with the reference's picture of the same (prompt, seed)."""
    reference = next(variant for variant in variants if variant.policy == REFERENCE)
    originals = {
        (request.prompt, request.seed): pixels((folder / request.picture).read_bytes())
        for request in reference.requests
    }

    def judged(request: RequestRecord) -> RequestRecord:
        picture = pixels((folder / request.picture).read_bytes())
        quality = compare(picture, originals[request.prompt, request.seed])
        return request.model_copy(update={"quality": quality})

    return [
        variant
        if variant.policy == REFERENCE
        else variant.model_copy(update={"requests": [judged(r) for r in variant.requests]})
        for variant in variants
    ]


def describe_run(
    model: str,
    folder: Path,
    command: Sequence[str],
    parameters: Parameters,
    variants: Sequence[VariantRecord],
) -> Record:
    """The record of a finished run: when, where and with what it was made.

    folder: where `model` was found. command: how to repeat the run, without paths of this machine.
    """
    now = datetime.datetime.now(datetime.UTC)
    return Record(
        created=now.isoformat(timespec="seconds"),
        command=list(command),
        model=display_name(model),
        is_test_model=is_test_model(folder),
        machine=Machine.model_validate({**machine(), "gpus": describe_gpus()}),
        versions=versions(),
        commit=commit(),
        profile=ProfileFacts(name="default", digest=""),
        parameters=parameters,
        passes=[
            Pass(
                name="A",
                attention=None,
                order="sequential",
                order_reason="one after the other",
                variants=list(variants),
            )
        ],
    )
