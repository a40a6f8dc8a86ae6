"""What a sweep would compute, and what that costs: `python benchmarks/sweep.py --dry-run`. Nothing is written."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.core.terminal import say, shown
from fedsim.data.source import load
from fedsim.engine.cohort import cohort_of, members, scored_in, tiers_of
from fedsim.experiment import Experiment
from fedsim.learning.task import Task
from fedsim.results.provenance import code_sha256
from fedsim.results.store import RunStore
from fedsim.storage.place import Place
from fedsim.sweeps.calibration import Calibration
from fedsim.sweeps.outline import Outline
from fedsim.sweeps.progress import label_of


PIXELS = 8  # side of the images that are loaded to be counted: whatever their size, they are dealt alike
SETTING = ("method", "preset", "data", "participants", "alpha")
FOLDED = ("preset", "data")  # columns that give way where the terminal is narrow
COST = ("runs", "rounds", "MB", "FLOPs", "core\nhours", "hours")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs are to be computed on: `runtime`, `hosts` and `jobs` as of `sweep.py`, and this machine's `cores`."""

    runtime: str
    hosts: int | None
    jobs: int
    cores: int

    def at_work(self, experiment: Experiment) -> int:
        """Processes that compute at a time, on a core each: those of one run times runs, as far as there are cores."""
        cohort = experiment.cohort or experiment.participants
        of_one_run = 1 if self.runtime == "inline" else min(self.hosts or cohort, cohort)
        return min(self.jobs * of_one_run, self.cores)

    def __str__(self) -> str:
        hosts = f"{self.hosts} hosts" if self.hosts else "as many hosts as its cohort has members"
        of_one_run = "one process" if self.runtime == "inline" else f"up to {hosts}"
        return f"--runtime {self.runtime}: {of_one_run} a run, --jobs {self.jobs}, at most the {self.cores} cores here"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What runs cost. Without data, `flops` and seconds are not numbers.

    - `sent`: bytes in both directions. - `flops`: what the column of `rounds` adds up to. - `core_seconds`: on one
      core. - `seconds`: on as many as are at work.
    """

    runs: int = 0
    rounds: int = 0
    sent: int = 0
    flops: float = 0.0
    core_seconds: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def cells(self) -> list[str]:
        """In the order of `COST`."""
        sent, hours = self.sent / 1e6, (self.core_seconds / 3600, self.seconds / 3600)
        known = [f"{self.flops:.2e}", *(f"{each:.3g}" if each < 100 else f"{each:,.0f}" for each in hours)]
        unknown = ["-" if number == "nan" else number for number in known]
        return [str(self.runs), str(self.rounds), f"{sent:,.1f}" if sent < 1e4 else f"{sent:,.0f}", *unknown]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many examples there are: each participant's, for training and for validation, and the test set's."""

    train: np.ndarray  # (participants,)
    validation: np.ndarray  # (participants,)
    test: int


class Planner:
    """Estimates runs, and remembers what they have in common.

    - `unknown`: why data could not be dealt; every reason once.
    """

    def __init__(self, data_dir: str | None, machine: Machine) -> None:
        self.data_dir, self.machine = data_dir, machine
        self.calibration = Calibration()
        self.dealt: dict[tuple, Shards | None] = {}
        self.unknown: list[str] = []

    def estimate(self, experiment: Experiment) -> Estimate:
        """What one run costs."""
        shards = self._shards(experiment)
        outline = self.calibration.outline(experiment, timing=shards is not None)
        trained, scored = _times(experiment, outline)
        names = [tier.name for tier in experiment.tiers]
        tiers = np.array([names.index(tier.name) for tier in tiers_of(experiment)])
        belongs = [tiers == number for number in range(len(names))]

        rounds = [
            (part, trained[number] * mine)
            for number, phase in enumerate(outline.phases)
            for part, mine in zip(phase.parts, belongs, strict=True)
        ]
        sent = sum(part.sent * int(times.sum()) for part, times in rounds)
        if shards is None:
            return Estimate(1, experiment.rounds, sent, math.nan, math.nan, math.nan)

        begun = (trained + scored).any(axis=0)
        parts = [(part, begun * mine) for part, mine in zip(outline.begun, belongs, strict=True)] + rounds
        flops = sum(float(times @ part.flops(shards.train)) for part, times in parts)
        seconds = sum(float(times @ part.seconds(shards.train)) for part, times in parts)
        seconds += sum(phase.averaging * times.sum() for phase, times in zip(outline.phases, trained, strict=True))
        seconds += _seconds_of_scoring(experiment, outline, shards, scored, belongs)
        return Estimate(1, experiment.rounds, sent, flops, seconds, seconds / self.machine.at_work(experiment))

    def _shards(self, experiment: Experiment) -> Shards | None:
        data = experiment.task.data
        if data.kind == "image":
            data = dataclasses.replace(data, image_size=min(data.image_size, PIXELS))
        dealing = (experiment.partition, experiment.participants, experiment.validation_share, experiment.seed)
        if (data, *dealing) not in self.dealt:
            self.dealt[data, *dealing] = None
            try:
                dataset = load(data, self.data_dir)
                population = members(experiment, Task(experiment.task, dataset))
            except ValueError as error:
                self.unknown += [str(error)] if str(error) not in self.unknown else []
            else:
                train = np.array([len(member.train) for member in population])
                validation = np.array([len(member.validation) for member in population])
                self.dealt[data, *dealing] = Shards(train, validation, len(dataset.test))
        return self.dealt[data, *dealing]


def _times(experiment: Experiment, outline: Outline) -> tuple[np.ndarray, np.ndarray]:
    """How often each participant trains, and is scored, in each phase: `(phases, participants)`. Round 0, in which
    states are scored before anything is trained, is taken for one of the first phase."""
    trained = np.zeros((len(outline.phases), experiment.participants), dtype=int)
    scored = np.zeros_like(trained)
    for number, (first, last) in enumerate(phase.span for phase in outline.phases):
        for round in range(first, last + 1):
            trained[number, list(cohort_of(experiment, round))] += 1
            scored[number, list(scored_in(experiment, round))] += 1
    scored[0, list(scored_in(experiment, 0))] += 1
    return trained, scored


def _seconds_of_scoring(
    experiment: Experiment, outline: Outline, shards: Shards, scored: np.ndarray, belongs: Sequence[np.ndarray]
) -> float:
    """Of what participants deploy on the test set and their validation examples, and of the server's on the first."""
    test, total = np.array(shards.test), 0.0
    for times, phase in zip(scored, outline.phases, strict=True):
        for part, mine in zip(phase.parts, belongs, strict=True):
            if part.model:
                total += float((times * mine) @ part.model.seconds(test, shards.validation))
        first, last = phase.span
        if phase.model:
            rounds = range(0 if first == 1 else first, last + 1)
            total += sum(bool(scored_in(experiment, round)) for round in rounds) * float(phase.model.seconds(test))
    return total


# what is printed ------------------------------------------------------------------------------------------------------


def print_plan(
    wanted: Mapping[str, Sequence[Experiment]],
    *,
    out: Place,
    data_dir: str | None,
    machine: Machine,
    console: Console,
) -> None:
    """For every suite a table of what is left to compute, a row a method and setting, and the ids of its runs."""
    planner = Planner(data_dir, machine)
    if not console.is_terminal:
        console.width = 120
    for suite, experiments in wanted.items():
        finished = _finished(experiments, out)
        left = [experiment for experiment in experiments if experiment.run_id not in finished]
        before = f", {len(finished)} of them finished before" if finished else ""
        say(console, f"suite {suite}: {len(experiments)} runs{before}")
        if left:
            console.print(_table(left, planner))
        for experiment in experiments:
            what = "finished before, run" if experiment.run_id in finished else "run"
            _, _, *where = _setting(experiment)
            setting = "{}, participants {}, alpha {}".format(*where)
            say(console, f"  {label_of(experiment)}, {setting}: {what} {experiment.run_id}")
    say(console, "core hours: of training, scoring and averaging on one core, from steps timed on this machine")
    say(console, f"hours: core hours, divided by the processes at work ({machine})")
    everything = [experiment for experiments in wanted.values() for experiment in experiments]
    if torch.cuda.is_available() and any(tier.num_gpus for each in everything for tier in each.tiers):
        say(console, "Steps were timed on the CPU: participants that have a GPU will take less.")
    for reason in planner.unknown:
        say(console, f"FLOPs and hours cannot be told without the data: {reason}")


def _finished(experiments: Sequence[Experiment], out: Place) -> set[str]:
    """Ids of the runs that a sweep would skip."""
    if not out.exists():
        return set()
    kinds = [(type(each.algorithm), each.task.family, type(each.start)) for each in experiments]
    made_of = dict(zip(kinds, experiments, strict=True))
    codes = {kind: code_sha256(each.algorithm, each.task.family, each.start) for kind, each in made_of.items()}
    stores = [RunStore(out, each.run_id, codes[kind]) for each, kind in zip(experiments, kinds, strict=True)]
    return {store.run_id for store in stores if store.status() == "finished"}


def _table(experiments: Sequence[Experiment], planner: Planner) -> Table:
    rows: dict[tuple[str, ...], Estimate] = {}
    for experiment in experiments:
        setting = _setting(experiment)
        rows[setting] = rows.get(setting, Estimate()) + planner.estimate(experiment)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    total = ("in all", *[""] * (len(SETTING) - 1), *sum(rows.values(), Estimate()).cells())
    for number, (heading, footer) in enumerate(zip((*SETTING, *COST), total, strict=True)):
        folded = heading in FOLDED
        justify = "left" if number < len(SETTING) else "right"
        table.add_column(heading, Text(footer), justify=justify, no_wrap=not folded, overflow="fold")
    for setting, estimate in rows.items():
        table.add_row(*map(shown, (*setting, *estimate.cells())))
    return table


def _setting(experiment: Experiment) -> tuple[str, ...]:
    """In the order of `SETTING`."""
    population, cohort, dealt = (
        experiment.participants,
        experiment.cohort or experiment.participants,
        experiment.partition,
    )
    return (
        experiment.algorithm.name,
        experiment.algorithm.preset_name,
        experiment.task.data.name,
        str(population) if cohort == population else f"{cohort} of {population}",
        f"{dealt.alpha:g}" if dealt.scheme in ("dirichlet", "by_size") else dealt.scheme,
    )
