"""Several runs at once, each in a process of its own. This process hands them out, listens, and tells an overview.

A worker computes one run after another with the runtime it was handed. Whatever ends it (the out-of-memory killer, a
crash in native code) ends the run it was computing and nothing else: a pool of `concurrent.futures` would break as a
whole. A worker ends when this process does, however that happens.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.results.provenance import code_sha256
from fedsim.results.store import RunStore
from fedsim.runtime import Choice
from fedsim.simulation import RunFailed
from fedsim.storage.locking import check_held, lock_of
from fedsim.storage.place import Place
from fedsim.sweeps.attempt import Compute, PendingRun, attempt, opened
from fedsim.sweeps.progress import REDRAW_SECONDS, Overview


LET_GO_SECONDS = 10.0  # in which a worker that has nothing left to do lets go of its actors


def run_at_once(
    pending_runs: Sequence[PendingRun],
    *,
    jobs: int,
    choice: Choice,
    compute: Compute,
    out: Place,
    overview: Overview,
    say: Callable[[str], None],
) -> list[RunFailed]:
    """Compute runs, `jobs` at a time, the first ones first. **Returns:** those that failed.

    - `choice`, `compute`: picklable; each worker makes its runtime from the one and computes runs with the other.
    - `say`: told what the workers' runtimes say.

    **Raises:** `ValueError` for a request that cannot be met; the runs under way are then cut, as by an interrupt.
    """
    context = multiprocessing.get_context(choice.start_method)
    # What a server imports its children share: the platform, and the models that were checked here.
    context.set_forkserver_preload([__name__, *(name for name in sys.modules if ".modeling_" in name)])
    demands = [
        (pending_run.experiment.participants, max(t.num_cpus for t in pending_run.experiment.tiers))
        for pending_run in pending_runs
    ]
    lock = lock_of(out)
    waiting, workers, failures = deque(pending_runs), list[Worker](), list[RunFailed]()
    with choice.shared(jobs, demands) as shared:
        patience = 0.0
        try:
            while waiting or any(worker.experiment for worker in workers):
                while waiting and len(workers) < jobs:
                    workers.append(Worker(context, out, compute, shared))
                    workers[-1].give(waiting.popleft())
                check_held(out, lock)
                for worker in _with_news(workers):
                    match worker.receive():
                        case ("begin", first):
                            assert worker.experiment is not None
                            overview.of(worker.run_id).begin(worker.experiment, first)
                        case ("tell", method, *arguments):
                            getattr(overview.of(worker.run_id), method)(*arguments)
                        case ("say", text):
                            say(text)
                        case ("over", reason):
                            if reason is not None:
                                failures.append(RunFailed(worker.run_id, reason))
                            worker.give(waiting.popleft() if waiting else None)
                        case ("refused", text):
                            raise ValueError(text)
                        case None:
                            workers.remove(worker)
                            failures += _worker_died(worker, out, overview)
            patience = LET_GO_SECONDS
        finally:
            _end([worker.process for worker in workers], patience)
    return failures


class Worker:
    """A worker process, as this process sees it. `experiment`: what it computes; None once it has been let go."""

    def __init__(self, context: Any, out: Place, compute: Compute, choice: Choice) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, out, compute, choice), daemon=True)
        resource_tracker.ensure_running()  # first: it would unblock what is blocked now
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a terminal sends it to children as well
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.experiment: Experiment | None = None

    @property
    def run_id(self) -> str:
        assert self.experiment is not None
        return self.experiment.run_id

    def give(self, pending_run: PendingRun | None) -> None:
        """Hand it a run; None: there is nothing left to do."""
        self.experiment = pending_run.experiment if pending_run else None
        with contextlib.suppress(OSError):  # it is dead, as `receive` is about to say
            self.connection.send_bytes(cloudpickle.dumps(pending_run))  # also classes typed into a notebook

    def receive(self) -> tuple | None:
        """Its next message; None: there are no more, for it ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None


def _with_news(workers: Sequence[Worker]) -> list[Worker]:
    ready = multiprocessing.connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _worker_died(worker: Worker, out: Place, overview: Overview) -> list[RunFailed]:
    """The run that ended with its worker, if there is one and it was not finished."""
    worker.process.join()
    experiment = worker.experiment
    if experiment is None:
        return []
    if (
        RunStore(
            out, experiment.run_id, code_sha256(experiment.algorithm, experiment.task.family, experiment.start)
        ).status()
        == "finished"
    ):
        overview.of(experiment.run_id).end()
        return []
    code = worker.process.exitcode or 0
    reason = f"the process that computed it died ({f'signal {-code}' if code < 0 else f'exit status {code}'})"
    overview.of(experiment.run_id).failed(reason)
    return [RunFailed(experiment.run_id, reason)]


def _end(processes: Sequence[Any], patience: float) -> None:
    """Let processes end by themselves for so many seconds, then kill them: a run can be cut anywhere."""
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


# a worker -----------------------------------------------------------------------------------------------------------


def _work(connection: Connection, out: Place, compute: Compute, choice: Choice) -> None:
    """What a worker does: one run after another, until there is nothing left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the process that hands out runs decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender = Sender(connection)
    say = functools.partial(sender.send, "say")
    with (
        contextlib.suppress(EOFError),
        opened(replace(choice, say=say), out, say) as runtime,
    ):  # EOF: as the thread says
        while (pending_run := pickle.loads(connection.recv_bytes())) is not None:
            try:
                attempt(compute, pending_run, out, runtime, sender, worker=True)
            except RunFailed as failure:
                sender.send("over", failure.reason)
            except ValueError as error:
                sender.send("refused", str(error))
            else:
                sender.send("over", None)


def _end_with_parent() -> None:
    """End this process, at once, when the one that hands out runs has ended: nobody is left to be told anything."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


class Sender(ProgressListener):
    """Tells the process that hands out runs what a progress is told."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.next = connection, 0.0

    def preparing(self, what: str) -> None:
        self.send("tell", "preparing", what)

    def begin(self, experiment: Experiment, first: int) -> None:
        self.send("begin", first)  # the other process has the experiment

    def noted(self, text: str) -> None:
        self.send("tell", "noted", text)

    def within(self, method: str, done: int, total: int) -> None:
        if time.monotonic() >= self.next:  # a display draws no faster
            self.next = time.monotonic() + REDRAW_SECONDS
            self.send("tell", "within", method, done, total)

    def finished(self, row: dict[str, Any]) -> None:
        self.send("tell", "finished", row)

    def failed(self, reason: str) -> None:
        self.send("tell", "failed", reason)

    def end(self) -> None:
        self.send("tell", "end")

    def send(self, kind: str, *content: Any) -> None:
        try:
            self.connection.send((kind, *content))
        except OSError:  # nobody listens any more: a run must not be said to have failed for that
            os._exit(0)
