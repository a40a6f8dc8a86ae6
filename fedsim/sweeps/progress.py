"""Live progress, drawn by the driver alone: a table on a terminal, a row a run; plain lines elsewhere.

A `ProgressListener` is told of one run; an `Overview` knows all runs and has a listener for each.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsim.core.terminal import say, shown
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment


REDRAW_SECONDS = 0.1
BAR_WIDTH = 12
AROUND_ROWS = 6  # lines of a terminal that a table's head, its counts and the prompt take


class Clock:
    """Estimates the time a run still needs from the rounds it did."""

    def __init__(self, first: int, rounds: int) -> None:
        self.first, self.rounds, self.started = first, rounds, time.monotonic()

    def left(self, round: int) -> str:
        """Time left after `round`, as `m:ss`. Round 0 (the local stage) says nothing of the others."""
        now = time.monotonic()
        if round == 0:
            self.first, self.started = 1, now
            return "?"
        seconds = int((now - self.started) / (round - self.first + 1) * (self.rounds - round))
        return f"{seconds // 60}:{seconds % 60:02d}"


def label_of(experiment: Experiment) -> str:
    """What a run is called in a display: `fedgrow (paper), seed 0`."""
    preset = experiment.algorithm.preset_name
    return f"{experiment.algorithm.name}{f' ({preset})' if preset else ''}, seed {experiment.seed}"


def labels_of(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Run id -> label. Where several runs share one, the beginning of the run id tells them apart."""
    labels = {experiment.run_id: label_of(experiment) for experiment in experiments}
    shared = Counter(labels.values())
    return {id_: label if shared[label] == 1 else f"{label}, {id_[:8]}" for id_, label in labels.items()}


def accuracy_of(row: dict[str, Any]) -> str:
    """Accuracy of a finished round, `-` where nothing was scored."""
    return "-" if row["accuracy_mean"] is None else f"{100 * row['accuracy_mean']:.1f} %"


def megabytes_of(row: dict[str, Any]) -> str:
    """MB sent up and down until the end of a finished round."""
    return f"{(row['bytes_up_total'] + row['bytes_down_total']) / 1e6:.2f}"


class Overview(Protocol):
    """What `fedsim.sweeps.runner.run_all` tells of its runs."""

    def begin(self, found: Sequence[tuple[Experiment, str]]) -> None:
        """All runs, each with what a results folder holds of it (`RunStore.status`)."""
        ...

    def of(self, run_id: str) -> ProgressListener:
        """What is told of one run."""
        ...

    def close(self) -> None:
        """Whatever happened, an interrupt included: leave the terminal as it was."""
        ...


def overview_for(console: Console) -> Overview:
    """The display that suits where the output goes."""
    return RunsTable(console) if console.is_terminal else Lines(console)


def say_found(console: Console, label: str, experiment: Experiment, status: str) -> None:
    """A line where a results folder holds all of a run."""
    if status == "finished":
        say(console, f"{label}: finished before, run {experiment.run_id}")


# plain lines ----------------------------------------------------------------------------------------------------------


class Lines:
    """One plain line a round, each with the label of its run: runs may take turns.

    - `progress`: is told of every run instead.
    """

    def __init__(self, console: Console, progress: ProgressListener | None = None) -> None:
        self.console, self.progress = console, progress

    def begin(self, found: Sequence[tuple[Experiment, str]]) -> None:
        labels = labels_of([experiment for experiment, _ in found])
        self.runs = {run_id: self.progress or RunLines(self.console, label) for run_id, label in labels.items()}
        for experiment, status in found:
            say_found(self.console, labels[experiment.run_id], experiment, status)

    def of(self, run_id: str) -> ProgressListener:
        return self.runs[run_id]

    def close(self) -> None:
        """Lines stay as they are."""


class RunLines(ProgressListener):
    """The lines of one run."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label

    def preparing(self, what: str) -> None:
        self._print(what)

    def begin(self, experiment: Experiment, first: int) -> None:
        self.rounds, self.clock = experiment.rounds, Clock(first, experiment.rounds)
        self._print(f"{experiment.rounds} rounds{f' (resumed at round {first})' if first else ''}")

    def finished(self, row: dict[str, Any]) -> None:
        figures = f"accuracy {accuracy_of(row)}, {megabytes_of(row)} MB sent, {self.clock.left(row['round'])} left"
        self._print(f"round {row['round']}/{self.rounds}: {row['participants']} participants, {figures}")

    def noted(self, text: str) -> None:
        self._print(text)

    def failed(self, reason: str) -> None:
        self._print(reason)

    def _print(self, text: str) -> None:
        say(self.console, f"{self.label}: {text}")


# a table --------------------------------------------------------------------------------------------------------------


STYLES: Mapping[str, str] = {
    "running": "cyan",
    "waiting": "dim",
    "finished": "green",
    "finished before": "dim green",
    "failed": "bold red",
}


class RunsTable:
    """A live table, one row a run: where it stands, what it reached and sent, and how long it still needs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, found: Sequence[tuple[Experiment, str]]) -> None:
        labels = labels_of([experiment for experiment, _ in found])
        self.rows: dict[str, TableRow] = {}
        for experiment, status in found:
            label, before = labels[experiment.run_id], status == "finished"
            row = TableRow(self.console, label, experiment.rounds, "finished before" if before else "waiting")
            self.rows[experiment.run_id] = row
            if not before:  # those are in the table, and they may be many
                say_found(self.console, label, experiment, status)
        self.screen = Live(
            console=self.console, get_renderable=self.table, refresh_per_second=1 / REDRAW_SECONDS, transient=False
        )
        self.screen.start(refresh=True)

    def of(self, run_id: str) -> ProgressListener:
        return self.rows[run_id]

    def close(self) -> None:
        self.screen.stop()

    def table(self) -> Table:
        """The rows that fit on the terminal, and how many runs there are of each status."""
        counts = Counter(row.status for row in self.rows.values())
        caption = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
        table = Table(caption=caption, caption_justify="left", pad_edge=False, box=None)
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        table.add_column("status", no_wrap=True)
        table.add_column("")
        for heading in ("round", "accuracy", "MB sent", "time left"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("now", no_wrap=True, style="dim")
        for row in self.shown(self.console.height - AROUND_ROWS):
            status = Text(row.status, style=STYLES[row.status])
            bar = ProgressBar(row.rounds, row.done, width=BAR_WIDTH) if row.status == "running" else ""
            table.add_row(shown(row.label), status, bar, row.round, row.accuracy, row.sent, row.left, row.now)
        return table

    def shown(self, most: int) -> "list[TableRow]":
        """At most so many rows, in order: first choice are those that run, then those that changed last."""
        rows = list(self.rows.values())
        chosen = sorted(rows, key=lambda row: (row.status != "running", -row.changed))[: max(1, most)]
        return [row for row in rows if row in chosen]


class TableRow(ProgressListener):
    """What the table shows of one run. Cells are text; `changed` orders rows by their last change of status."""

    def __init__(self, console: Console, label: str, rounds: int, status: str) -> None:
        self.console, self.label, self.rounds, self.status = console, label, rounds, status
        self.round, self.now, self.accuracy, self.sent, self.left = "", "", "", "", ""
        self.done, self.changed = 0, 0.0

    def preparing(self, what: str) -> None:
        self.now = what

    def begin(self, experiment: Experiment, first: int) -> None:
        self.clock, self.done = Clock(first, experiment.rounds), max(0, first - 1)
        self.round = f"{first - 1}/{self.rounds}" if first else f"-/{self.rounds}"
        self._becomes("running")

    def within(self, method: str, done: int, total: int) -> None:
        if total:
            self.now = f"{method} {done}/{total}"

    def finished(self, row: dict[str, Any]) -> None:
        self.round, self.done, self.now = f"{row['round']}/{self.rounds}", row["round"], ""
        self.accuracy, self.sent, self.left = accuracy_of(row), megabytes_of(row), self.clock.left(row["round"])

    def noted(self, text: str) -> None:
        say(self.console, f"{self.label}: {text}")

    def failed(self, reason: str) -> None:
        self._becomes("failed")
        self.noted(reason)

    def end(self) -> None:
        self._becomes("finished")

    def _becomes(self, status: str) -> None:
        self.status, self.changed, self.now, self.left = status, time.monotonic(), "", ""
