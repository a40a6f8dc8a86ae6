"""Several runs into one results folder: finished ones are skipped, cut ones resumed, and one failure stops no other."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from fedsim.cohort import check_checkpoints, members
from fedsim.experiment import Experiment
from fedsim.progress import Progress, label_of, progress_for
from fedsim.provenance import code_sha256
from fedsim.runtime.base import Runtime
from fedsim.simulation import RunFailed, run
from fedsim.store import RunStore, locked, run_ids_in
from fedsim.task import load_task


def check_data(experiments: Sequence[Experiment], data_dir: str | None) -> None:
    """Read checkpoints, load the data and deal them: whatever they cannot do is said before anything starts.

    **Raises:** `ValueError` naming the field, and for a checkpoint the participants who were to start from it.
    """
    for experiment in experiments:
        check_checkpoints(experiment)
        members(experiment, load_task(experiment.task, data_dir))


def check_folder(out: Path, experiments: Sequence[Experiment], resume: bool) -> None:
    """Refuse (`ValueError`) a folder that holds other experiments, or an unfinished run that is not to be resumed."""
    wanted = {experiment.run_id: experiment for experiment in experiments}
    others = sorted(run_ids_in(out) - set(wanted))
    if others:
        raise ValueError(
            f"--out={str(out)!r}: holds a different experiment (run {', '.join(others[:3])}; this one is "
            f"{', '.join(list(wanted)[:3])}): give another folder, or the settings that run was started with"
        )
    for run_id, experiment in wanted.items():
        status = RunStore(out, run_id, code_sha256(experiment.algorithm)).status()
        if status == "unfinished" and not resume:
            raise ValueError(
                f"--out={str(out)!r}: holds run {run_id}, which is unfinished: add --resume to go on with it"
            )


def run_all(
    experiments: Sequence[Experiment],
    *,
    out: Path,
    make_runtime: Callable[[], Runtime],
    suite: str = "",
    data_dir: str | None = None,
    console: Console | None = None,
    progress: Progress | None = None,
) -> list[RunFailed]:
    """Compute what is missing, in order, on one runtime. **Returns:** the runs that failed.

    The caller holds the folder's lock (`locked`) and has made its checks.
    """
    console = console or Console(quiet=True)
    failures: list[RunFailed] = []
    with _opened(make_runtime) as runtime:
        for experiment in experiments:
            store = RunStore(out, experiment.run_id, code_sha256(experiment.algorithm))
            status = store.status()
            if status == "finished":
                console.print(f"{label_of(experiment)}: finished before, run {experiment.run_id}", highlight=False)
                continue
            if status == "outdated":
                console.print(f"{label_of(experiment)}: computed again, the code has changed", highlight=False)
            try:
                run(
                    experiment,
                    runtime=runtime(),
                    out=out,
                    suite=suite,
                    resume=status == "unfinished",
                    data_dir=data_dir,
                    progress=progress or progress_for(console),
                )
            except RunFailed as failure:
                failures.append(failure)
    return failures


@contextlib.contextmanager
def _opened(make_runtime: Callable[[], Runtime]) -> Iterator[Callable[[], Runtime]]:
    """A runtime that is started when it is first needed (not at all if every run is finished) and always closed."""
    made: list[Runtime] = []

    def runtime() -> Runtime:
        if not made:
            made.append(make_runtime())
        return made[0]

    try:
        yield runtime
    finally:
        for one in made:
            one.close()


__all__ = ["check_data", "check_folder", "locked", "run_all"]
