"""Sweeps that a test can kill, forked from a server that has imported everything: a start takes no seconds."""

import contextlib
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

import fedsim
from baselines.fedavg import FedAvg
from benchmarks import suites, sweep
from benchmarks.suites import tiny
from fedsim.experiment import Experiment, with_settings
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.counting import COUNTED, count_once
from tests.support.disturbed import TINY_SETTINGS, Disturbed


# Columns that say when, where and by whom numbers were computed.
ELSEWHERE = ["wall_seconds", "train_seconds", "host", "node", "retries", "peak_memory_bytes", "command"]

FORKING = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server that forks sweeps, their workers, and those of this process. It ends with this process."""
    FORKING.set_forkserver_preload([__name__, "tests.support.light_family"])
    forkserver.ensure_running()


def growing() -> Experiment:
    return with_settings(tiny(), [*TINY_SETTINGS, "task.family=tests.support.light_family"])


def averaging(rounds: int = 2) -> Experiment:
    return replace(growing(), algorithm=FedAvg(lr=1e-3), rounds=rounds)


def disturbed(event: str, folder: Path, **changes: Any) -> Experiment:
    """`averaging` with an event (see `Disturbed`) in round 1 of participant 1."""
    folder.mkdir(exist_ok=True)
    algorithm = Disturbed(averaging().algorithm, event, str(folder), round=1)
    return replace(averaging(), algorithm=algorithm, **changes)


def undisturbed(experiments: Sequence[Experiment], out: Path) -> Path:
    """Compute experiments one after another, in this process. What they cost is then counted for other processes."""
    assert run_all(experiments, out=out, make_runtime=InlineRuntime, suite="small") == []
    return out


def tables_of(out: Path) -> dict[str, pd.DataFrame]:
    """The three tables in one order, without the columns that say when, where and by whom they were computed."""
    results = fedsim.load(out)
    keys = ["run_id", "round", "client"]
    tables = {}
    for name, frame in {"runs": results.runs, "rounds": results.rounds, "clients": results.clients}.items():
        ordered = frame.sort_values([key for key in keys if key in frame], ignore_index=True)
        tables[name] = ordered.drop(columns=ELSEWHERE, errors="ignore")
    return tables


def assert_same_tables(left: Path, right: Path) -> None:
    ours, theirs = tables_of(left), tables_of(right)
    for name, frame in ours.items():
        pd.testing.assert_frame_equal(frame, theirs[name], check_exact=True)


def rounds_done(out: Path) -> dict[str, int]:
    """Run id -> the last round that its manifest vouches for."""
    manifests = (json.loads(path.read_text()) for path in (out / "checkpoints").glob("*/manifest.json"))
    return {manifest["run_id"]: manifest["round"] for manifest in manifests}


def one_suite(experiments: Sequence[Experiment]) -> Callable[[], list[Experiment]]:
    """A suite named `small`, as `benchmarks.suites` would hold it."""

    def small() -> list[Experiment]:
        return list(experiments)

    small.__module__ = suites.__name__
    return small


class Sweep:
    """`benchmarks/sweep.py` of some experiments in a process of its own."""

    def __init__(self, experiments: Sequence[Experiment], out: Path, *words: str) -> None:
        self.log = out.with_suffix(".log")
        self.words = ["--suite", "small", "--out", str(out), *words]
        start_server()
        self._others = _children_of_the_server()
        self.process = FORKING.Process(target=_swept, args=(self.words, experiments, COUNTED, self.log), daemon=False)
        self.process.start()

    def said(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[psutil.Process]:
        """Its worker processes: forked by the same server or, on Ray, started by itself."""
        forked = _children_of_the_server() - self._others - {self.process.pid}
        spawned = [
            one for one in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(one.cmdline())
        ]
        return [*map(psutil.Process, forked), *spawned]

    def end(self, number: signal.Signals) -> int:
        """Send a signal, wait for the end and return the exit status."""
        assert self.process.pid is not None
        psutil.Process(self.process.pid).send_signal(number)
        return self.wait()

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # had a test ended it, this does nothing

    def wait(self, seconds: float = 900) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.said()
        return self.process.exitcode


def _children_of_the_server() -> set[int]:
    server = [one for one in psutil.Process().children() if any("forkserver" in word for word in one.cmdline())]
    return {child.pid for one in server for child in one.children() if child.status() != psutil.STATUS_ZOMBIE}


def _swept(words: Sequence[str], experiments: Sequence[Experiment], counted: Mapping[tuple, Any], log: Path) -> None:
    # A server of forks that was started while a sweep of several jobs blocked Ctrl-C hands that on.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what started all this may ignore Ctrl-C
    forkserver._forkserver.ensure_running = lambda: None  # or it would start a server of its own, for seconds
    COUNTED.update(counted)
    count_once()
    suites.small = one_suite(experiments)  # pyright: ignore[reportAttributeAccessIssue]
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(sweep.main(words))


def wait_for(condition: Callable[[], Any], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)
