"""One of several runs, computed in this process: what may go wrong with it ends this run and no other."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from fedsim.cluster.doctor import check_nodes
from fedsim.core.text import last_line, text_of
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.runtime.base import Runtime
from fedsim.simulation import RunFailed
from fedsim.storage.place import Place, Remote


LOCK_SECONDS = 30.0  # in which a worker of a sweep that was killed must have noticed

Compute = Callable[..., Any]  # `fedsim.simulation.run` with what is the same for all runs


@dataclass(frozen=True)
class PendingRun:
    """A run to compute, and whether it goes on where it was cut."""

    experiment: Experiment
    resume: bool


def attempt(
    compute: Compute,
    pending_run: PendingRun,
    out: Place,
    runtime: Callable[[], Runtime],
    progress: ProgressListener,
    worker: bool = False,
) -> None:
    """Compute one run, in this process.

    **Raises:** `ValueError` for a request that cannot be met; `RunFailed` for everything else that went wrong.
    """
    run_id = pending_run.experiment.run_id
    try:
        with _alone_with(run_id, out, worker):
            compute(pending_run.experiment, runtime=runtime(), resume=pending_run.resume, progress=progress)
    except (RunFailed, ValueError):
        raise
    except Exception as error:
        progress.failed(text_of(error))
        raise RunFailed(run_id, last_line(error)) from error


@contextlib.contextmanager
def _alone_with(run_id: str, out: Place, worker: bool) -> Iterator[None]:
    """Hold a run's lock, which only workers make: the folder's is held by who hands out runs, and if that process is
    killed, its workers live a moment longer. In an object store they are gone before its lock is taken over.

    **Raises:** `RuntimeError` if another process keeps the lock.
    """
    if isinstance(out, Remote):
        yield
        return
    path = out / "checkpoints" / f".{run_id}.lock"
    if worker:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.exists():
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise RuntimeError(f"another process has been writing it for {LOCK_SECONDS:g} s") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def opened(
    make_runtime: Callable[[], Runtime], out: Place, say: Callable[[str], None]
) -> Iterator[Callable[[], Runtime]]:
    """A runtime that is started when it is first needed (not at all if every run is finished) and always closed.

    The nodes of a cluster are looked at once (`check_nodes`); `say` is told what is odd about them.
    """
    made: list[Runtime] = []

    def runtime() -> Runtime:
        if not made:
            made.append(make_runtime())
            for found in check_nodes(made[0], out):
                say(f"{found.check}: {found.text}; {found.remedy}")
        return made[0]

    try:
        yield runtime
    finally:
        for one in made:
            one.close()
