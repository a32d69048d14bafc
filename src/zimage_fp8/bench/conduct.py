"""A whole run: check what was asked, quantize what is missing, measure, write the record."""

import datetime
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from zimage_fp8.bench.assemble import pass_record, with_quality
from zimage_fp8.bench.engines import find_engine, travelling_word
from zimage_fp8.bench.gpu import Driver, find_driver, utilization_now
from zimage_fp8.bench.journal import FOLDER, Journal
from zimage_fp8.bench.launch import end_orphans
from zimage_fp8.bench.perceptual import Judge, find_metrics
from zimage_fp8.bench.plan import (
    PlannedPass,
    identity,
    parse_targets,
    plan_launched,
    plan_targets,
)
from zimage_fp8.bench.profile import Profile, find_profile
from zimage_fp8.bench.progress import OnStage, show_progress
from zimage_fp8.bench.record import (
    REFERENCE,
    Flag,
    Machine,
    Parameters,
    Pass,
    Record,
    write_record,
)
from zimage_fp8.bench.run import PassRun
from zimage_fp8.bench.session import Setting
from zimage_fp8.bench.variants import (
    CHECKPOINTS,
    Variant,
    check_policies,
    find_missing,
    make_checkpoints,
    plan_variants,
)
from zimage_fp8.bench.workload import (
    Wishes,
    check_sizes,
    choose_parameters,
    default_profile,
    effective_profile,
    is_test_model,
    recorded_command,
)
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.source import EMBEDDED, display_name, find_model
from zimage_fp8.provenance import commit, machine, versions

BUSY_GPU = 0.05  # share of a second; an idle desktop draws a little
BUSY_CPU = 0.25
LOOK_S = 0.5

NO_REFERENCE = f"no server is named {REFERENCE}, so there is nothing to compare with"


@dataclass(frozen=True)
class Choices:
    """What the user chose beside the workload; see `bench.bench`."""

    policies: tuple[str, ...] = ("all",)
    engine: str = "zimage-fp8"
    launch: str | None = None
    targets: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    no_quality: str | None = None
    allow_busy: bool = False

    def as_options(self) -> list[str]:
        """For the recorded command."""
        words = ["--engine", self.engine] if self.engine != Choices.engine else []
        if self.launch:
            words += ["--launch", shlex.join(map(travelling_word, shlex.split(self.launch)))]
        words += [word for target in self.targets for word in ("--target", target)]
        words += [word for metric in self.metrics for word in ("--metric", metric)]
        words += ["--no-quality", self.no_quality] if self.no_quality else []
        return [*words, *(["--allow-busy"] if self.allow_busy else [])]


def conduct(model: str, out: Path, wishes: Wishes, choices: Choices) -> Record:
    """Measure everything that `out` does not hold yet and write record.json there."""
    run = prepare(model, out, wishes, choices)
    journal = Journal(out / FOLDER)
    is_measured = all(passing(run, one, out, journal).is_done() for one in run.planned)
    flags = [] if is_measured else list(refuse_busy(run.driver, choices.allow_busy))
    judge = Judge(find_metrics(choices.metrics)) if choices.metrics else None
    make_folder(out)
    journal.open(identity(model, run.folder, run.profile, run.parameters, run.planned))
    of_the_run = journal.progress("", "run")
    for flag in flags:
        of_the_run.flag(flag.kind, flag.text)
    end_orphans(journal.server_notes)
    missing = [one for one in run.missing if one.checkpoint and not one.checkpoint.exists()]
    notes, places = journal.server_notes, out / CHECKPOINTS
    make_checkpoints(model, missing, places, wishes.dtype, wishes.device, notes)
    passes = measure(run, out, journal)
    if run.no_quality is None:
        passes = [with_quality(one, out, run.parameters, judge) for one in passes]
    if not passes[0].variants:
        raise nothing_measured(passes[0])
    command = recorded_command(model, choices.policies, wishes, out, choices.as_options())
    record = Record(
        created=began(journal),
        command=command,
        model=display_name(model),
        is_test_model=bool(run.folder and is_test_model(run.folder)),
        machine=Machine.model_validate(
            {**machine(), "gpus": [run.driver.describe()] if run.driver else []}
        ),
        versions=versions(),
        commit=commit(),
        profile=run.profile.facts(is_changed=wishes.change_the_profile),
        parameters=run.parameters,
        passes=passes,
        no_quality=run.no_quality,
        flags=of_the_run.flags,
    )
    write_record(record, out / "record.json")
    return record


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked. folder: the model's, None for a target's that is not here."""

    folder: Path | None
    profile: Profile
    parameters: Parameters
    planned: list[PlannedPass]
    missing: list[Variant]
    driver: Driver | None
    no_quality: str | None


def prepare(model: str, out: Path, wishes: Wishes, choices: Choices) -> Prepared:
    """Everything that can be wrong is found here, before a server starts or a folder is made."""
    engine = find_engine(choices.engine, choices.launch)
    targets = parse_targets(choices.targets)
    if targets and (choices.launch or choices.policies != Choices.policies):
        raise UsageError(
            "--target measures servers that run already: it goes with neither --launch nor "
            "--policies",
            param="target",
        )
    asked = find_profile(wishes.profile) if wishes.profile else None
    variants = [] if targets else plan_variants(choices.policies, out / CHECKPOINTS, engine)
    if asked is None:
        asked = find_profile("card")  # what no model can do is refused before one is downloaded
        choose_parameters(effective_profile(asked, wishes), wishes)
    is_here = not targets or model == EMBEDDED or Path(model).exists()
    folder = find_model(model) if is_here else None
    if wishes.profile is None:
        asked = find_profile(default_profile(folder) if folder else "quick")
    profile = effective_profile(asked, wishes)
    parameters = choose_parameters(profile, wishes)
    if folder:
        check_sizes(parameters, folder)
    missing: list[Variant] = []
    if folder and variants:
        check_policies(variants, folder)
        missing = find_missing(variants, model, folder, wishes.dtype)
    if not targets:
        engine.check()
    planned = (
        plan_targets(profile, targets, model)
        if targets
        else plan_launched(profile, engine, variants, model, parameters)
    )
    no_quality = choices.no_quality
    if no_quality is None and targets and REFERENCE not in targets:
        no_quality = NO_REFERENCE
    driver = find_driver(wishes.device)
    return Prepared(folder, profile, parameters, planned, missing, driver, no_quality)


def measure(run: Prepared, out: Path, journal: Journal) -> list[Pass]:
    """All passes, one after the other, without the quality of pictures."""
    passes = []
    with show_progress(num_pieces(run)) as on_stage:
        for planned in run.planned:
            passes.append(measure_pass(run, planned, out, journal, on_stage))
    return passes


def measure_pass(
    run: Prepared, planned: PlannedPass, out: Path, journal: Journal, on_stage: OnStage
) -> Pass:
    its = passing(run, planned, out, journal, on_stage)
    outcome = its.run()
    outcome.failures += planned.impossible
    return pass_record(
        planned.plan.name,
        planned.plan.attention,
        planned.subjects,
        {subject.name: its.progress(subject) for subject in planned.subjects},
        outcome,
        run.parameters,
    )


def passing(
    run: Prepared,
    planned: PlannedPass,
    out: Path,
    journal: Journal,
    on_stage: OnStage = lambda *_: None,
) -> PassRun:
    setting = Setting(planned.plan.name, run.parameters, out, journal, run.driver, on_stage)
    return PassRun(run.profile, setting, planned.subjects)


def num_pieces(run: Prepared) -> int:
    """About how many times the progress bar will move."""
    parameters, profile = run.parameters, run.profile
    cases = len(parameters.prompts) * len(parameters.sizes)
    each = parameters.runs * len(parameters.sizes) + parameters.warmup * len(parameters.sizes)
    each += cases if profile.draw_before_timing else 0
    return sum((1 + each) * len(one.subjects) for one in run.planned)


def refuse_busy(driver: Driver | None, allow_busy: bool) -> Iterator[Flag]:
    """Flag a machine that others use now. Raises ZImageError for a GPU, unless it is allowed."""
    if driver is None:
        busy = psutil.cpu_percent(LOOK_S) / 100
        if busy > BUSY_CPU:
            yield Flag(
                kind="busy_machine",
                text=f"Other programs used {busy:.0%} of the CPU just before the run.",
            )
        return
    share = utilization_now(driver)
    if share is None or share <= BUSY_GPU:
        return
    text = f"Another program used {share:.0%} of the GPU just before the run."
    if not allow_busy:
        raise ZImageError(text, hint="end it, or say --allow-busy; the record will tell")
    yield Flag(kind="busy_gpu", text=text)


def nothing_measured(one: Pass) -> ZImageError:
    """The main pass is empty: nothing can be compared, so there is no record."""
    first = one.failures[0]
    return ZImageError(
        f"pass {one.name} measured nothing; {first.name} failed first: {first.error}",
        hint="run the same command again to go on from what is measured",
    )


def began(journal: Journal) -> str:
    """When the run was first started, which is when its plan was written."""
    seconds = (journal.folder / "plan.json").stat().st_mtime
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZImageError(f"cannot write to {folder}: {error.strerror}") from None
