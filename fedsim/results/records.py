"""What the rows of the tables are made of. `fedsim.results.columns` says which column takes what from a record."""

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fedsim.algorithm import ClientInfo, Trainings
from fedsim.engine.cohort import RoundCohort
from fedsim.engine.content import Content
from fedsim.engine.cost import Cost, whole
from fedsim.engine.report import ClientReport, RoundReport
from fedsim.experiment import Experiment
from fedsim.results.machine import versions
from fedsim.results.provenance import git_commit, hardware
from fedsim.runtime.base import PHASES


Row = dict[str, Any]
SCORES = (
    *("accuracy", "accuracy_local", "accuracy_val", "accuracy_val_even", "loss", "train_loss"),
    *("precision", "recall", "f1"),
)


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What is the same for all rows of a run.

    - `labels`: label histograms of the participants, as JSON. - `numerics`: with the name, the bits and those before.
    """

    experiment: Experiment
    run_id: str
    suite: str
    code_sha256: str
    content: Content
    cost: Cost
    federation_sha256: str
    labels: str | None
    numerics: Mapping[str, Any]
    command: str | None

    @property
    def preset(self) -> str | None:
        return self.experiment.algorithm.preset_name or None

    @property
    def method(self) -> str:
        return f"{self.experiment.algorithm.name} ({self.preset})" if self.preset else self.experiment.algorithm.name

    @property
    def alpha(self) -> float | None:
        partition = self.experiment.partition
        return partition.alpha if partition.scheme in ("dirichlet", "by_size") else None

    @property
    def cohort(self) -> int:
        return self.experiment.cohort or self.experiment.participants

    def stage(self, round: int) -> str:
        return stage_of(self.experiment, round)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run that finished, or failed with `error`."""

    run: RunFacts
    wall_seconds: float
    error: str | None

    @property
    def status(self) -> str:
        return "failed" if self.error else "finished"

    @property
    def trainable_params(self) -> float:
        return float(self.run.cost.mean("trainable_params"))

    @property
    def upload_params(self) -> float:
        return float(self.run.cost.mean("upload_params"))

    @property
    def bytes_per_upload(self) -> int:
        return round(whole(self.run.cost.mean("upload_bytes")))

    @property
    def held_bytes(self) -> int:
        return max(each.private_bytes + each.download_bytes for each in self.run.cost.participants)

    @property
    def peak_bytes(self) -> int:
        return max(each.peak_bytes for each in self.run.cost.participants)

    @property
    def git_commit(self) -> str | None:
        return git_commit()

    @property
    def versions(self) -> str:
        return json.dumps(versions())

    @property
    def hardware(self) -> str:
        return json.dumps(hardware() | {"numerics": self.run.numerics})

    @property
    def config(self) -> str:
        return self.run.experiment.canonical_json()

    @property
    def model(self) -> str:
        return str(self.run.experiment.target)


class Statistics(NamedTuple):
    """Over the participants that have a value; None where nobody has."""

    mean: float | None
    std: float | None
    min: float | None


@dataclasses.dataclass(frozen=True)
class RoundRecord:
    """A finished round. `before`: the row of the round before, from which totals go on. `trained`: of each participant
    that was asked for an update so far."""

    run: RunFacts
    round: int
    cohort: RoundCohort
    report: RoundReport
    before: Row | None
    wall_seconds: float
    trained: Collection[Trainings] = ()

    @property
    def stage(self) -> str:
        return self.run.stage(self.round)

    def of_clients(self, field: str) -> list[Any]:
        """A field of the participants' reports."""
        return [getattr(report, field) for report in self.report.clients.values()]

    @functools.cached_property
    def scores(self) -> SimpleNamespace:
        """`Statistics` of every score and loss."""
        return SimpleNamespace(**{name: statistics(self.of_clients(name)) for name in SCORES})

    @functools.cached_property
    def spent(self) -> SimpleNamespace:
        """Of privacy, by name; None where nothing is promised."""
        experiment = self.run.experiment
        nothing = dict.fromkeys(("epsilon", "delta", "noise_multiplier"))
        return SimpleNamespace(**nothing | {**experiment.algorithm.spent(experiment, self.round, self.trained)})

    @property
    def clipped_share(self) -> float | None:
        """Of the updates in time; None where none could be."""
        told = [each.metrics or {} for each in self.report.clients.values() if each.outcome == "in_time"]
        return statistics([metrics.get("clipped") for metrics in told]).mean

    @property
    def bytes_up(self) -> int:
        return sum(self.of_clients("bytes_up"))

    @property
    def bytes_down(self) -> int:
        return sum(self.of_clients("bytes_down"))

    @property
    def bytes_once(self) -> int:
        return sum(self.of_clients("bytes_once"))

    @property
    def bytes_up_total(self) -> int:
        return self.bytes_up + (self.before["bytes_up_total"] if self.before else 0)

    @property
    def bytes_down_total(self) -> int:
        return self.bytes_down + self.bytes_once + (self.before["bytes_down_total"] if self.before else 0)

    @property
    def flops(self) -> int:
        return sum(flops or 0 for flops in self.of_clients("flops"))

    @property
    def participants(self) -> int:
        return len(self.cohort.reached) + len(self.cohort.excluded)

    @property
    def failed(self) -> int:
        return sum(error is not None for error in self.of_clients("error"))

    @property
    def late(self) -> int:
        return self.of_clients("outcome").count("late")

    @property
    def dropped_out(self) -> int:
        return len(self.cohort.dropped_out)

    @property
    def excluded(self) -> int:
        return len(self.cohort.excluded)

    @property
    def metrics(self) -> str | None:
        return mean_metrics(list(self.report.clients.values()))


@dataclasses.dataclass(frozen=True)
class ClientRecord:
    """A participant in a finished round."""

    run: RunFacts
    round: int
    stage: str
    info: ClientInfo
    report: ClientReport
    place: Mapping[str, Any]

    @property
    def host(self) -> str | None:
        return None if self.place.get("host") is None else str(self.place["host"])

    @property
    def node(self) -> str | None:
        return self.place.get("node")

    @property
    def retries(self) -> int:
        return self.place.get("retries", 0)

    @property
    def model(self) -> str:
        return str(self.info.form)

    @property
    def metrics(self) -> str | None:
        return None if self.report.metrics is None else json.dumps(self.report.metrics)


@dataclasses.dataclass(frozen=True)
class ProfileRecord:
    """Where the `seconds` of a round went in one place, by phase."""

    run: RunFacts
    round: int
    place: str
    spent: Mapping[str, float]
    seconds: float

    @functools.cached_property
    def phases(self) -> SimpleNamespace:
        """Seconds of each phase; `idle` is what is not accounted for."""
        known = {phase: self.spent.get(phase, 0.0) for phase in PHASES}
        return SimpleNamespace(**known, idle=max(0.0, self.seconds - sum(known.values())))


@dataclasses.dataclass(frozen=True)
class AttackRecord:
    """A value that an attack measured. `run`: with the run's `run_id`, `experiment` and `method`, as `RunFacts`.

    - `low`, `high`: ends of a 95 % interval; None where a single value has none.
    """

    run: Any
    attack: str
    knowledge: str
    round: int
    client: int | None
    metric: str
    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class CurveRecord:
    """A point of the curve of an attack that scores examples. `run`: as of `AttackRecord`."""

    run: Any
    attack: str
    knowledge: str
    round: int
    client: int | None
    fpr: float
    tpr: float


def mean_metrics(reports: Sequence[ClientReport]) -> str | None:
    """JSON of each metric's mean over updates in time, by their weights; None if there is nothing."""
    totals: dict[str, list[float]] = {}
    for report in [each for each in reports if each.outcome == "in_time"]:
        for name, value in (report.metrics or {}).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + report.weight * value, total[1] + report.weight
    means = {name: total / weight for name, (total, weight) in sorted(totals.items()) if weight}
    return json.dumps(means) if means else None


def statistics(values: Sequence[float | None]) -> Statistics:
    """Mean, standard deviation and minimum of what is known."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return Statistics(None, None, None)
    return Statistics(float(known.mean()), float(known.std()), float(known.min()))


def stage_of(experiment: Experiment, round: int) -> str:
    """Round 0 is each participant alone; what the others are, the algorithm says."""
    return "local" if round == 0 else experiment.algorithm.stage(round)
