"""Live progress, drawn by the driver alone: a rich display on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from fedsim.experiment import Experiment


REDRAW_SECONDS = 0.1


class Silent:
    """Says nothing. Also the list of what a progress is told."""

    def begin(self, experiment: Experiment, first: int) -> None:
        """A run begins with round `first` (0, or later when it is resumed)."""

    def within(self, method: str, done: int, total: int) -> None:
        """Participants that are done with one method of the round that is under way."""

    def finished(self, row: dict[str, Any]) -> None:
        """A round is finished and on disk; `row` is its row of the rounds table."""

    def failed(self, reason: str) -> None:
        """The run broke."""

    def end(self) -> None:
        """The run finished."""

    def close(self) -> None:
        """Whatever happened, an interrupt included: leave the terminal as it was."""


Progress = Silent


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


def figures_of(row: dict[str, Any]) -> str:
    """Accuracy and MB of a finished round."""
    accuracy = "-" if row["accuracy_mean"] is None else f"{100 * row['accuracy_mean']:.1f} %"
    sent = (row["bytes_up_total"] + row["bytes_down_total"]) / 1e6
    return f"accuracy {accuracy}, {sent:.2f} MB sent"


class Lines(Silent):
    """One plain line a round."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, experiment: Experiment, first: int) -> None:
        self.rounds, self.clock = experiment.rounds, Clock(first, experiment.rounds)
        resumed = f" (resumed at round {first})" if first else ""
        self.console.print(f"{label_of(experiment)}: {experiment.rounds} rounds{resumed}", highlight=False)

    def finished(self, row: dict[str, Any]) -> None:
        line = f"  round {row['round']}/{self.rounds}: {row['participants']} participants, {figures_of(row)}"
        self.console.print(f"{line}, {self.clock.left(row['round'])} left", highlight=False)

    def failed(self, reason: str) -> None:
        self.console.print(reason, highlight=False, markup=False)


class Live(Silent):
    """A bar for the rounds of a run and one for the participants of the round under way."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, experiment: Experiment, first: int) -> None:
        self.label, self.clock = label_of(experiment), Clock(first, experiment.rounds)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            refresh_per_second=1 / REDRAW_SECONDS,
        )
        self.rounds_bar: TaskID = self.bars.add_task(
            self.label, total=experiment.rounds, completed=first, unit="rounds", note=""
        )
        self.clients_bar: TaskID = self.bars.add_task("", total=experiment.participants, unit="participants", note="")
        self.bars.start()

    def within(self, method: str, done: int, total: int) -> None:
        if total:
            self.bars.update(self.clients_bar, description=f"  {method}", completed=done, total=total)

    def finished(self, row: dict[str, Any]) -> None:
        note = f"{figures_of(row)}, {self.clock.left(row['round'])} left"
        self.bars.update(self.rounds_bar, completed=row["round"], note=note)
        self.last = row

    def failed(self, reason: str) -> None:
        self.bars.stop()
        self.console.print(reason, highlight=False, markup=False)

    def end(self) -> None:
        self.bars.stop()
        if hasattr(self, "last"):
            self.console.print(f"{self.label}: {figures_of(self.last)}", highlight=False)

    def close(self) -> None:
        self.bars.stop()


def progress_for(console: Console) -> Silent:
    """The display that suits where the output goes."""
    return Live(console) if console.is_terminal else Lines(console)
