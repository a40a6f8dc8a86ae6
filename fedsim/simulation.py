"""`run(experiment, ...)`: the main loop of a simulation, from round 0 to the last, checkpointed after each."""

import functools
import time
from collections.abc import Callable

from fedsim.core.numerics import PORTABLE, in_force
from fedsim.engine.aggregator import Aggregator, ParticipantError
from fedsim.engine.cohort import Member, federation_sha256, label_histograms, members, round_cohort_of, scored_in
from fedsim.engine.cost import cost_of, too_small
from fedsim.engine.gpu import with_gpu_fractions
from fedsim.engine.participant import Participant, last_line
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.learning.meter import StepCost
from fedsim.learning.task import load_task
from fedsim.results.machine import SameEnvironment
from fedsim.results.provenance import code_sha256
from fedsim.results.rows import client_columns, profile_rows, round_row, run_row
from fedsim.results.store import TOKENIZER, RunStore
from fedsim.runtime.base import Call, Resources, Runtime
from fedsim.storage.place import Place, sent


MAX_LABELS = 1000  # label histograms of larger populations are left out of the runs table

COUNTED: dict[tuple, StepCost] = {}  # costs of training steps, shared by the runs of a sweep: a cache, nothing more


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
) -> str:
    """Run one experiment into a results folder that the caller has locked; the runtime stays open for the next.

    - `resume_anywhere`: also where the rounds to come would have other bits than the finished ones.
    - `profile`: write down where the time of every round went, as one more table.

    **Returns:** the run's id. **Raises:** `ValueError` for a request that cannot be met, before anything is computed;
    `RunFailed` for a run that broke, with everything finished so far on disk and a row saying why.
    """
    progress = progress or ProgressListener()
    experiment = with_gpu_fractions(experiment, runtime.probe)
    run_id = experiment.run_id
    task = load_task(experiment.task, data_dir)
    population = members(experiment, task)
    code, numerics = code_sha256(experiment.algorithm), in_force(runtime.numerics)
    store = RunStore(out, run_id, code)
    if resume:
        store.check_numerics(numerics, resume_anywhere)

    folder = out.absolute() / "checkpoints" / run_id
    environment = SameEnvironment.here(
        str(folder / "private"), numerics["fingerprint"] if numerics["name"] == PORTABLE else None
    )
    make_participants: dict[int, Callable[[], Participant]] = {
        member.info.id: functools.partial(_participant, environment, experiment, member, data_dir, COUNTED)
        for member in population
    }
    resources = {member.info.id: _asked_by(member) for member in population}
    infos = [member.info for member in population]
    make_aggregator = functools.partial(_aggregator, environment, experiment, infos, data_dir, str(folder))
    if any(tier.device for tier in experiment.tiers):  # what is too large is refused before hosts come up
        too_small(experiment, cost_of(experiment, COUNTED))
    runtime.start(make_aggregator, make_participants, resources, experiment.chunk)
    cost = cost_of(experiment, COUNTED)  # hosts come up meanwhile
    left_out = too_small(experiment, cost)
    excluded_ids = {member.info.id for member in population if member.info.tier in left_out}

    first = store.open(resume, numerics)
    if task.dataset is not None and task.dataset.tokenizer is not None:
        with sent(folder / TOKENIZER) as here:
            task.dataset.tokenizer.save_pretrained(here)
    make_run_row = functools.partial(
        run_row,
        experiment,
        run_id=run_id,
        suite=suite,
        code_sha256=code,
        cost=cost,
        federation=federation_sha256(experiment, population),
        command=command,
        numerics=numerics | {"before": store.numerics[:-1]},
        labels=label_histograms(population, task) if len(population) <= MAX_LABELS else None,
    )
    progress.begin(experiment, first)
    try:
        for round in range(first, experiment.rounds + 1):
            started, round_cohort = time.perf_counter(), round_cohort_of(experiment, round, excluded_ids)
            scored = tuple(id_ for id_ in scored_in(experiment, round) if id_ not in excluded_ids)
            report = runtime.ask("run_round", round, round_cohort, scored, watch=progress.within)
            previous_row = store.rounds[-1] if store.rounds else None
            round_seconds = time.perf_counter() - started
            row = round_row(experiment, run_id, round, round_cohort, report, previous_row, round_seconds)
            store.commit(round, row, client_columns(experiment, run_id, population, round, report["rows"]))
            if profile:
                seconds = time.perf_counter() - started
                spent = {"driver": {"write": seconds - round_seconds}} | report["spent"]
                store.add_profile(profile_rows(experiment, run_id, round, spent, seconds))
            progress.finished(row)
    except Exception as error:
        reason = error.text if isinstance(error, ParticipantError) else last_line(error)
        try:
            store.finish(make_run_row(wall_seconds=store.wall_seconds, error=_short(error)))
        except OSError as also:  # what came first is what is raised
            reason = f"{reason}\nand the row that says so is missing: {also}"
        progress.failed(reason)
        raise RunFailed(run_id, _short(error)) from error
    finally:
        progress.close()
    store.finish(make_run_row(wall_seconds=store.wall_seconds, error=None))
    progress.end()
    return run_id


def _asked_by(member: Member) -> Resources:
    tier = member.tier
    size = float(member.info.num_examples)
    return Resources(tier.num_cpus, tier.num_gpus, tier.memory_mb, tier.resources, kind=tier.name, size=size)


def _participant(
    environment: SameEnvironment,
    experiment: Experiment,
    member: Member,
    data_dir: str | None,
    counted: dict[tuple, StepCost],
) -> Participant:
    """What a runtime calls to make a participant, wherever it puts it."""
    environment.check()
    return Participant(experiment, member, data_dir, environment.folder, counted)


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
