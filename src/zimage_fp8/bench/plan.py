"""What a run measures: its rows, pass by pass, and the facts that make it this run and no other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from zimage_fp8.bench.engines import Engine, Start, shown
from zimage_fp8.bench.load import Client
from zimage_fp8.bench.profile import Floor, PassPlan, Profile
from zimage_fp8.bench.record import REFERENCE, FailedVariant, Parameters
from zimage_fp8.bench.session import Subject
from zimage_fp8.bench.variants import Variant, travelling_name
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.source import display_name
from zimage_fp8.protocol import parse_size
from zimage_fp8.provenance import commit, machine, versions

FLOOR_SUMMARIES: dict[Floor, str] = {
    "rerun": "BF16 again, in another process.",
    "attention": "BF16 with another attention backend.",
    "next_seed": "BF16 with the next seed: another picture of the same prompt.",
}


@dataclass(frozen=True)
class PlannedPass:
    """The rows of one table, the reference first, noise floors last.

    impossible: floors that cannot be measured, with the reason.
    """

    plan: PassPlan
    subjects: list[Subject]
    impossible: list[FailedVariant]


def plan_launched(
    profile: Profile,
    engine: Engine,
    variants: Sequence[Variant],
    model: str,
    parameters: Parameters,
) -> list[PlannedPass]:
    """Every pass of the profile, with servers that this run starts. Raises UsageError."""
    planned = []
    for number, one in enumerate(profile.passes):
        chosen = [v for v in variants if _is_in(one, v.policy)]
        subjects = [_launched(v, engine, model, parameters, one.attention) for v in chosen]
        floors = [] if number else [_floor(subjects[0], f, profile) for f in profile.floors]
        planned.append(PlannedPass(one, [*subjects, *floors], []))
    return planned


def _is_in(one: PassPlan, policy: str) -> bool:
    return policy == REFERENCE or one.policies is None or policy in one.policies


def _launched(
    variant: Variant, engine: Engine, model: str, parameters: Parameters, attention: str | None
) -> Subject:
    start = Start(
        model=model,
        policy=variant.asked,
        checkpoint=variant.checkpoint,
        dtype=parameters.dtype,
        device=parameters.device,
        attention=attention,
        max_pixels=max(width * height for width, height in map(parse_size, parameters.sizes)),
    )
    return Subject(
        name=variant.policy,
        policy=variant.policy,
        summary=variant.summary,
        engine_name=engine.name,
        shown=_shown(engine, start),
        engine=engine,
        start=start,
        extra=engine.body,
    )


def _shown(engine: Engine, start: Start) -> list[str]:
    model, policy = display_name(start.model), travelling_name(start.policy)
    return shown(engine, replace(start, model=model, policy=policy))


def _floor(reference: Subject, floor: Floor, profile: Profile) -> Subject:
    assert reference.engine
    assert reference.start
    start = reference.start
    if floor == "attention":
        start = replace(start, attention=profile.floor_attention)
    return replace(
        reference,
        name=f"{reference.name} ({floor})",
        summary=FLOOR_SUMMARIES[floor],
        floor=floor,
        start=start,
        shown=_shown(reference.engine, start),
    )


def plan_targets(profile: Profile, targets: Mapping[str, str], model: str) -> list[PlannedPass]:
    """One pass over servers that run already: name -> URL, bf16_base being the reference.

    Raises UsageError for a profile that sets their backends, ZImageError when one does not answer
    or says that it serves another model.
    """
    if [one.attention for one in profile.passes] != [None]:
        raise UsageError(
            f"profile {profile.name} sets attention backends, which a running server has already",
            param="profile",
            hint="take another profile, or --launch",
        )
    names = sorted(targets, key=lambda name: name != REFERENCE)
    subjects = [_running(name, targets[name], model) for name in names]
    floors: list[Subject] = []
    impossible: list[FailedVariant] = []
    if names[0] == REFERENCE:
        for floor in profile.floors:
            name = f"{REFERENCE} ({floor})"
            if floor == "attention":
                error = "the attention backend of a running server cannot be changed from here"
                impossible.append(
                    FailedVariant(name=name, policy=REFERENCE, floor=floor, error=error)
                )
                continue
            summary = FLOOR_SUMMARIES[floor].replace("in another process", "in the same process")
            floors.append(replace(subjects[0], name=name, floor=floor, summary=summary))
    return [PlannedPass(profile.passes[0], [*subjects, *floors], impossible)]


def _running(name: str, url: str, model: str) -> Subject:
    client = Client(url)
    try:
        served = client.served_models()
    except ZImageError as error:
        raise ZImageError(f"{name} at {url}: {error}", hint="start it, or check --target") from None
    finally:
        client.close()
    asked = display_name(model)
    if served and not any(_is_same_model(asked, one) for one in served):
        raise ZImageError(
            f"{name} at {url} serves {', '.join(served)}, not {asked}",
            hint="name the model that is served",
        )
    return Subject(
        name=name,
        policy=name,
        summary="A server that was running.",
        engine_name="other",
        shown=[],
        url=url,
        # Some servers refuse another name than their own, and some want one.
        extra={"model": served[0]} if served else {},
    )


def _is_same_model(asked: str, served: str) -> bool:
    """By the last part: servers may say a repository or the folder of its copy."""
    return asked.rstrip("/").rpartition("/")[2] == served.rstrip("/").rpartition("/")[2]


def parse_targets(targets: Sequence[str]) -> dict[str, str]:
    """`NAME=URL`, or `URL` for the only one. Raises UsageError."""
    found: dict[str, str] = {}
    for target in targets:
        name, has_name, url = target.partition("=")
        if not has_name or "://" in name:
            name, url = "target", target
        if not url.startswith(("http://", "https://")):
            raise UsageError(
                f"--target {target!r}: expected [NAME=]http://HOST:PORT", param="target"
            )
        if name in found:
            raise UsageError(f"--target names {name!r} twice", param="target")
        found[name] = url.rstrip("/").removesuffix("/v1")
    return found


def identity(
    model: str,
    folder: Path | None,
    profile: Profile,
    parameters: Parameters,
    planned: Sequence[PlannedPass],
) -> dict[str, JsonValue]:
    """What must be equal for a run to go on: everything that can change a number."""
    weights = None
    if folder is not None:
        with ShardReader(folder / "transformer") as reader:
            weights = reader.fingerprint()
    return {
        "model": display_name(model),
        "weights": weights,
        "profile": profile.digest,
        "parameters": parameters.model_dump(mode="json"),
        "servers": [
            [one.plan.name, subject.name, *subject.shown, subject.url or ""]
            for one in planned
            for subject in one.subjects
        ],
        "machine": {key: str(value) for key, value in machine().items()},
        "versions": dict(versions()),
        "commit": commit(),
    }
