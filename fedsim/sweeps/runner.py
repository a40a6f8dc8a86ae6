"""Several runs into one results folder: finished ones are skipped, cut ones resumed, and one failure stops no other."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from fedsim.core import environment
from fedsim.core.numerics import in_force, settle
from fedsim.core.terminal import say
from fedsim.engine.cohort import check_checkpoints, check_forms, members
from fedsim.engine.content import Content, content_of, pinned
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.learning.task import load_task
from fedsim.results.longer import begin_from, shorter_runs
from fedsim.results.provenance import code_sha256
from fedsim.results.published import check_published
from fedsim.results.store import RunStore, config_of, run_ids_in, runs_in
from fedsim.results.tables import rows_of
from fedsim.runtime import Choice
from fedsim.runtime.base import Runtime
from fedsim.simulation import RunFailed, run
from fedsim.storage.locking import locked
from fedsim.storage.place import Place, place
from fedsim.sweeps.attempt import PendingRun, attempt, opened
from fedsim.sweeps.differences import told
from fedsim.sweeps.jobs import run_at_once
from fedsim.sweeps.progress import Lines, Overview, labels_of, overview_for


def check_data(experiments: Sequence[Experiment], data_dir: str | None, tell: Callable[[str], None]) -> None:
    """Read checkpoints, load the data and deal them: whatever they cannot do is said before anything starts.

    - `tell`: is told what was made of each data set's files.

    **Raises:** `ValueError` naming the field, and for a checkpoint the participants who were to start from it.
    """
    made = list[str]()
    for experiment in experiments:
        check_forms(experiment)
        check_checkpoints(experiment)
        task = load_task(experiment.task, data_dir)
        members(experiment, task)
        if task.dataset and task.dataset.made:
            made.append(f"{experiment.task.data.name}: {task.dataset.made}")
    for text in dict.fromkeys(made):
        tell(text)


def check_folder(out: Place, experiments: Sequence[Experiment], resume: bool) -> None:
    """Refuse (`ValueError`) a folder that holds other experiments, or an unfinished run that is not to be resumed."""
    wanted = {experiment.run_id: experiment for experiment in experiments}
    shorter = shorter_runs(out, experiments)
    others = sorted(run_ids_in(out) - set(wanted) - {run_id for _, run_id in shorter.values()})
    if others:
        there, (here, *_) = config_of(out, others[0]), wanted.values()
        fields = f": {told(there, here.canonical_json())}" if there else ""
        raise ValueError(
            f"--out={str(out)!r}: holds a different experiment (run {', '.join(others[:3])}; this one is "
            f"{', '.join(list(wanted)[:3])}){fields}: give another folder, or the settings that run was started with"
        )
    for run_id, experiment in wanted.items():
        status = RunStore(
            out, run_id, code_sha256(experiment.algorithm, experiment.task.family, experiment.start)
        ).status()
        if status == "unfinished" and not resume:
            raise ValueError(
                f"--out={str(out)!r}: holds run {run_id}, which is unfinished: add --resume to go on with it"
            )
        if status == "absent" and run_id in shorter and not resume:
            rounds, before = shorter[run_id]
            raise ValueError(
                f"--out={str(out)!r}: holds run {before}, which is the same but for rounds={rounds} "
                f"(here {experiment.rounds}): add --resume to go on from there"
            )


def store_of(out: Place, experiment: Experiment, data_dir: str | None) -> RunStore:
    """An experiment's place in a results folder, with the content that it would read now."""
    content = content_of(experiment, data_dir)
    store = RunStore(
        out, experiment.run_id, code_sha256(experiment.algorithm, experiment.task.family, experiment.start), content
    )
    store.config = experiment.canonical_json()
    return store


def check_joined(out: Place, experiments: Sequence[Experiment], stores: Mapping[str, RunStore]) -> None:
    """Refuse (`ValueError`) a folder whose other runs have read the same data, or checkpoints, with another content."""
    if not run_ids_in(out) - stores.keys():
        return
    ours = {_reads(experiment.canonical_json()): stores[experiment.run_id].content for experiment in experiments}
    for row in rows_of(runs_in(out), "runs"):
        if (run_id := row["run_id"]) in stores:
            continue
        before, (data, checkpoints) = Content(row["data_sha256"], row["checkpoints_sha256"]), _reads(row["config"])
        for (our_data, our_checkpoints), content in ours.items():
            assert content is not None
            alike = dataclasses.replace(
                content,
                data_sha256=content.data_sha256 if data == our_data else None,
                checkpoints_sha256=content.checkpoints_sha256 if checkpoints == our_checkpoints else None,
            )
            if alike.change_from(before):
                change = alike.change_from(RunStore(out, run_id, "").content_read())  # which also knows files
                raise ValueError(
                    f"--out={str(out)!r}: holds run {run_id}, which has read something else under the same name: "
                    f"{change}; bring it back, or give another folder"
                )


def _reads(config: str) -> tuple[str, str]:
    """What names the data in an experiment's canonical JSON, and what names the rest that is read."""
    experiment = json.loads(config)
    data = experiment["task"].pop("data")
    return json.dumps(data), json.dumps(list(_named(experiment)))


def _named(value: Any) -> Iterator[Any]:
    """All checkpoints and data in a part of an experiment's canonical JSON."""
    if isinstance(value, dict) and value.get("class", "").endswith((".Checkpoint", ".DataConfig")):
        yield value
    elif isinstance(value, dict | list):
        yield from (each for item in (value.values() if isinstance(value, dict) else value) for each in _named(item))


def run_all(
    experiments: Sequence[Experiment],
    *,
    out: Place,
    make_runtime: Callable[[], Runtime],
    suite: str = "",
    data_dir: str | None = None,
    console: Console | None = None,
    progress: ProgressListener | None = None,
    overview: Overview | None = None,
    jobs: int = 1,
    command: str | None = None,
    profile: bool = False,
    resume_anywhere: bool = False,
    keep_updates: bool = False,
    publish: bool = False,
) -> list[RunFailed]:
    """Compute what is missing, in order: here, or, with `jobs` above 1, so many runs at once, each in its own process.

    - `make_runtime`: with several jobs a `Choice`, which other processes can be handed. A script that asks for several
      must do so under `if __name__ == "__main__"`, for the processes import it.
    - `progress`: is told of every run. - `overview`: is told of all runs instead; None: `overview_for(console)`.
    - `command`: what was typed, for the runs table. - `profile`: write the table `profile` as well.
    - `resume_anywhere`: go on with a run although the rounds to come would have other bits than its finished ones.
    - `keep_updates`: keep what participants receive and send, for `fedsim audit`.
    - `publish`: leave what is private out of the tables; refused in a folder whose tables hold such things.

    **Returns:** the runs that failed. The caller holds the folder's lock (`locked`) and has made its checks.

    **Raises:** `ValueError` for a request that cannot be met.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: must be at least 1")
    choice, console = make_runtime, console or Console(quiet=True)
    tell = functools.partial(say, console)
    if jobs > 1 and not isinstance(choice, Choice):
        raise ValueError(f"jobs={jobs}: the runtimes of several jobs are made from a fedsim.runtime.Choice")
    if publish:
        check_published(out, keep_updates)
    if overview is None:
        overview = overview_for(console) if progress is None else Lines(console, progress)
    compute = functools.partial(
        run,
        out=out,
        suite=suite,
        data_dir=data_dir,
        command=command,
        profile=profile,
        resume_anywhere=resume_anywhere,
        keep_updates=keep_updates,
        publish=publish,
        counted={},
    )

    stores = {one.run_id: store_of(out, one, data_dir) for one in experiments}
    check_joined(out, experiments, stores)
    absent = [one for one in experiments if stores[one.run_id].status() == "absent"]
    for run_id, (rounds, shorter) in shorter_runs(out, absent).items():
        if begin_from(stores[run_id], rounds, shorter):
            tell(f"run {run_id} goes on where run {shorter} ended, which is the same with rounds={rounds}")
    found = [(one, stores[one.run_id].status()) for one in {one.run_id: one for one in experiments}.values()]
    pending_runs = [
        PendingRun(pinned(experiment, data_dir), status == "unfinished")  # whatever changes from here on is refused
        for experiment, status in found
        if status != "finished"
    ]
    if isinstance(choice, Choice):
        for pending_run in pending_runs:
            if pending_run.resume:
                stores[pending_run.experiment.run_id].check_numerics(in_force(choice.numerics), resume_anywhere)
        finished = [stores[one.run_id].finished_with() for one, status in found if status == "finished"]
        if others := sum(numerics != choice.numerics for numerics in finished):
            tell(f"finished runs that were not computed with {choice.numerics} numerics, kept as they are: {others}")
    labels = labels_of([experiment for experiment, _ in found])
    for experiment, status in found:
        if status == "outdated":
            why = stores[experiment.run_id].outdated_by()
            tell(f"{labels[experiment.run_id]}: computed again, {why}; what there was is moved to {out}/outdated")
    overview.begin(found)
    try:
        if isinstance(choice, Choice) and jobs > 1 and pending_runs:
            return run_at_once(
                pending_runs,
                jobs=min(jobs, len(pending_runs)),
                choice=choice,
                compute=compute,
                out=out,
                overview=overview,
                say=tell,
            )
        failures: list[RunFailed] = []
        with opened(make_runtime, out, tell) as runtime:
            for pending_run in pending_runs:
                try:
                    attempt(compute, pending_run, out, runtime, overview.of(pending_run.experiment.run_id))
                except RunFailed as failure:
                    failures.append(failure)
        return failures
    finally:
        overview.close()


def run_in(
    experiments: Sequence[Experiment],
    *,
    out: Place | str,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    suite: str = "",
    alone: bool = False,
    numerics: str | None = None,
    resume_anywhere: bool = False,
    keep_updates: bool = False,
    publish: bool = False,
    **where: Any,
) -> None:
    """`fedsim.run` and `fedsim.sweep`: check the request, lock the folder, and compute what is missing.

    - `alone`: a folder that holds other experiments is refused. - `where`: of `fedsim.runtime.Choice`.

    **Raises:** `ValueError`, before anything starts; `RunFailed` for the first run that broke.
    """
    folder, data_dir, console = place(out), environment.data_dir(), Console()
    experiments = list(experiments) if isinstance(experiments, Iterable) else [experiments]
    for each in experiments:
        if not isinstance(each, Experiment):
            raise ValueError(f"experiments: {each!r} must be an Experiment; a function that makes one is to be called")
    choice = Choice(where.pop("runtime"), **where)
    if seeds is not None:
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        if not seeds:
            raise ValueError("seeds=[]: must be at least one")
        experiments = [dataclasses.replace(each, seed=seed) for seed in dict.fromkeys(seeds) for each in experiments]
    if not experiments:
        raise ValueError("experiments=[]: must be at least one")
    here, tell = choice.name == "inline" and jobs == 1, functools.partial(say, console)
    choice = dataclasses.replace(choice, numerics=settle(numerics, here=here, say=tell))
    check_data(experiments, data_dir, tell)
    with locked(folder) as folder:
        if alone:
            check_folder(folder, experiments, resume=True)
        failures = run_all(
            experiments,
            out=folder,
            make_runtime=choice,
            suite=suite,
            data_dir=data_dir,
            console=console,
            jobs=jobs,
            resume_anywhere=resume_anywhere,
            keep_updates=keep_updates,
            publish=publish,
        )
    if failures:
        raise failures[0]


__all__ = ["check_data", "check_folder", "locked", "run_all", "run_in"]
