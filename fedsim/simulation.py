"""`run(experiment, ...)`: the main loop of a simulation, from round 0 to the last, checkpointed after each."""

import functools
import json

from fedsim.core.numerics import PORTABLE, in_force
from fedsim.core.text import last_line
from fedsim.engine.aggregator import Aggregator
from fedsim.engine.clients import ParticipantError
from fedsim.engine.cohort import Member, federation_sha256, label_histograms, members, round_cohort_of, scored_in
from fedsim.engine.content import content_of, pinned
from fedsim.engine.cost import cost_of, too_small
from fedsim.engine.gpu import with_gpu_fractions
from fedsim.engine.inbox import Inbox
from fedsim.engine.participant import Participant
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.learning.meter import StepCost
from fedsim.learning.task import load_task
from fedsim.models.checkpoint import check_content
from fedsim.results.machine import SameEnvironment
from fedsim.results.provenance import code_sha256
from fedsim.results.recorder import Recorder
from fedsim.results.records import RunFacts
from fedsim.results.store import RunStore
from fedsim.runtime.base import Call, Resources, Runtime
from fedsim.storage.place import Place


MAX_LABELS = 1000  # label histograms of larger populations are left out of the runs table


class RunFailed(RuntimeError):
    """A run failed after it had started; every finished round is on disk."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(run_id, reason)
        self.run_id, self.reason = run_id, reason

    def __str__(self) -> str:
        return f"run {self.run_id} failed: {self.reason}"


def run(
    experiment: Experiment,
    *,
    runtime: Runtime,
    out: Place,
    suite: str = "",
    resume: bool = False,
    data_dir: str | None = None,
    progress: ProgressListener | None = None,
    command: str | None = None,
    profile: bool = False,
    resume_anywhere: bool = False,
    counted: dict[tuple, StepCost] | None = None,
    keep_updates: bool = False,
    publish: bool = False,
) -> str:
    """Run one experiment into a results folder that the caller has locked; the runtime stays open for the next.

    Arguments:
        suite, command: for the table `runs`.
        resume: go on after the last finished round; otherwise what the folder holds of this run is moved aside.
        resume_anywhere: also where the rounds to come would have other bits than the finished ones.
        profile: write down where the time of every round went, as one more table.
        counted: costs of training steps that are known; receives those of this run. For the next run of a sweep.
        keep_updates: keep what every participant receives and sends, for `fedsim audit`.
        publish: leave what is private out of the tables.

    **Returns:** the run's id. **Raises:** `ValueError` for a request that cannot be met, before anything is computed;
    `RunFailed` for a run that broke, with everything finished so far on disk and a row saying why.
    """
    progress = progress or ProgressListener()
    counted = {} if counted is None else counted
    experiment = pinned(with_gpu_fractions(experiment, runtime.probe), data_dir)
    numerics = in_force(runtime.numerics)
    task = load_task(experiment.task, data_dir)
    population = members(experiment, task)
    content = content_of(experiment, data_dir)
    store = RunStore(
        out, experiment.run_id, code_sha256(experiment.algorithm, experiment.task.family, experiment.start), content
    )
    if resume:
        store.check_numerics(numerics, resume_anywhere)
    if any(tier.device for tier in experiment.tiers):  # what is too large is refused before hosts come up
        too_small(experiment, cost_of(experiment, counted))
    progress.preparing("placing participants, counting what a step costs")
    _start(experiment, population, runtime, store.folder.absolute(), data_dir, numerics, counted, keep_updates)
    cost = cost_of(experiment, counted)  # hosts come up meanwhile
    tiers_left_out = too_small(experiment, cost)
    excluded_ids = {member.info.id for member in population if member.info.tier in tiers_left_out}

    store.config = experiment.canonical_json()
    first = store.open(resume, numerics)
    store.classes = task.dataset.class_names if task.dataset else ()
    labels = json.dumps(label_histograms(population, task)) if len(population) <= MAX_LABELS else None
    facts = RunFacts(
        experiment=experiment,
        run_id=experiment.run_id,
        suite=suite,
        code_sha256=store.code_sha256,
        content=store.content_read() if first else content,
        cost=cost,
        federation_sha256=federation_sha256(experiment, population),
        labels=labels,
        numerics=numerics | {"before": store.numerics[:-1]},
        command=command,
    )
    recorder = Recorder(store, facts, population, profile, publish)
    progress.begin(experiment, first)
    if store.damage:
        progress.noted(store.damage)
    try:
        store.check_content()
        store.save_tokenizer(task.dataset.tokenizer if task.dataset else None)
        for round in range(first, experiment.rounds + 1):
            cohort = round_cohort_of(experiment, round, excluded_ids)
            scored = scored_in(experiment, round, excluded_ids)
            known = experiment.algorithm.stage(round) == "federated" and not experiment.algorithm.updates_vary
            sent = cost.sent if known else {}
            report = runtime.ask("run_round", round, cohort, scored, sent, watch=progress.within)  # of Aggregator
            progress.finished(recorder.round(round, cohort, report))
    except Exception as error:
        reason = error.text if isinstance(error, ParticipantError) else last_line(error)
        try:
            recorder.finish(_short(error))
        except OSError as also:  # what came first is what is raised
            reason = f"{reason}\nand the row that says so is missing: {also}"
        progress.failed(reason)
        raise RunFailed(experiment.run_id, _short(error)) from error
    finally:
        progress.close()
    recorder.finish()
    progress.end()
    return experiment.run_id


def _start(
    experiment: Experiment,
    population: list[Member],
    runtime: Runtime,
    folder: Place,
    data_dir: str | None,
    numerics: dict,
    counted: dict[tuple, StepCost],
    keep_updates: bool,
) -> None:
    """Have the runtime place the aggregator and the participants."""
    bits = numerics["fingerprint"] if numerics["name"] == PORTABLE else None
    environment, inbox = SameEnvironment.here(str(folder / "private"), bits), Inbox()
    make_participants = {
        member.info.id: functools.partial(
            _participant, environment, experiment, member, data_dir, counted, inbox, keep_updates
        )
        for member in population
    }
    resources = {member.info.id: _resources_of(member) for member in population}
    infos = [member.info for member in population]
    make_aggregator = functools.partial(_aggregator, environment, experiment, infos, data_dir, str(folder))
    runtime.start(make_aggregator, make_participants, resources, experiment.chunk)


def _resources_of(member: Member) -> Resources:
    tier = member.tier
    size = float(member.info.num_examples)
    return Resources(tier.num_cpus, tier.num_gpus, tier.memory_mb, tier.resources, kind=tier.name, size=size)


def _participant(
    environment: SameEnvironment,
    experiment: Experiment,
    member: Member,
    data_dir: str | None,
    counted: dict[tuple, StepCost],
    inbox: Inbox,
    keep_updates: bool,
) -> Participant:
    """What a runtime calls to make a participant, wherever it puts it.

    **Raises:** `ValueError` where the data or its checkpoint hold something else than they did for the driver.
    """
    environment.check()
    load_task(experiment.task, data_dir)
    if member.info.checkpoint is not None:
        check_content(member.info.checkpoint)
    return Participant(experiment, member, data_dir, environment.folder, counted, inbox, keep_updates)


def _aggregator(
    environment: SameEnvironment, experiment: Experiment, infos, data_dir: str | None, folder: str, call: Call
) -> Aggregator:
    """What a runtime calls to make the aggregator, wherever it puts it."""
    environment.check()
    return Aggregator(experiment, infos, data_dir, folder, call)


def _short(error: BaseException) -> str:
    """Which participant, if one, and the traceback's last line."""
    if isinstance(error, ParticipantError):
        return f"participant {error.client}: {error.text.strip().splitlines()[-1]}"
    return last_line(error)
