"""Runs in this process: cut after a round, listened to, and their tables compared."""

from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.results.tables import Results, load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run


# What may differ between two computations of the same numbers.
INCIDENTAL = ["wall_seconds", "retries", "train_seconds", "peak_memory_bytes", "host", "node"]


class Interrupted(BaseException):
    """What Ctrl-C looks like: no `Exception`, so nothing on the way may swallow it."""


class Cut(ProgressListener):
    """Stops a run right after a round was finished."""

    def __init__(self, after: int) -> None:
        self.after = after

    def finished(self, row: dict[str, Any]) -> None:
        if row["round"] == self.after:
            raise Interrupted


class Told(ProgressListener):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.first: int | None = None
        self.within_calls: list[tuple[str, int, int]] = []

    def begin(self, experiment: Experiment, first: int) -> None:
        self.first = first

    def within(self, method: str, done: int, total: int) -> None:
        self.within_calls.append((method, done, total))

    def finished(self, row: dict[str, Any]) -> None:
        self.rounds.append(row["round"])


def inline(experiment: Experiment, out: Path, **fields: Any) -> str:
    runtime = InlineRuntime()
    try:
        return run(experiment, runtime=runtime, out=out, **fields)
    finally:
        runtime.close()


def numbers(results: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    rounds, clients = (frame.drop(columns=INCIDENTAL, errors="ignore") for frame in (results.rounds, results.clients))
    return rounds, clients


def assert_same_numbers(one: Path, other: Path) -> None:
    for left, right in zip(numbers(load(one)), numbers(load(other)), strict=True):
        assert len(left)
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    first, second = (load(path).runs.drop(columns=["wall_seconds"]) for path in (one, other))
    pd.testing.assert_frame_equal(first, second)
