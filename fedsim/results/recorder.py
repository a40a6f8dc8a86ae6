"""From what the rounds of a run report to what lies on disk."""

import time
from collections import Counter
from collections.abc import Sequence

from fedsim.algorithm import Trainings
from fedsim.engine.cohort import Member, RoundCohort
from fedsim.engine.report import RoundReport
from fedsim.results.columns import columns_of, row_of
from fedsim.results.records import ClientRecord, ProfileRecord, RoundRecord, Row, RunFacts, RunRecord
from fedsim.results.store import RunStore


NO_UPDATE = (None, "excluded")  # outcomes of who was not asked for one; who was late or dropped out was


class Recorder:
    """Writes a run's rows. A round's `wall_seconds` go from the writing of the round before to its report.

    - `profile`: whether to write down where the time of every round went.
    - `publish`: leave out what is private (`fedsim.results.columns`), also of what displays are told.
    """

    def __init__(
        self, store: RunStore, run: RunFacts, population: Sequence[Member], profile: bool, publish: bool = False
    ) -> None:
        self.store, self.run, self.population, self.profile, self.publish = store, run, population, profile, publish
        self.started = time.perf_counter()
        rows = store.clients.select(["client", "outcome", "stage"]).to_pylist()  # of rounds that were finished before
        asked = (row for row in rows if row["outcome"] not in NO_UPDATE and row["stage"] == "federated")
        self.updates = Counter[int](row["client"] for row in asked)

    def round(self, round: int, cohort: RoundCohort, report: RoundReport) -> Row:
        """A round is finished. **Returns:** its row, once it is on disk."""
        run, stage, seconds = self.run, self.run.stage(round), time.perf_counter() - self.started
        before = self.store.rounds[-1] if self.store.rounds else None
        if stage == "federated":
            self.updates.update(id_ for id_, each in report.clients.items() if each.outcome not in NO_UPDATE)
        row = row_of("rounds", RoundRecord(run, round, cohort, report, before, seconds, self._trained()), self.publish)
        clients = [
            ClientRecord(run, round, stage, self.population[id_].info, each, report.places.get(id_, {}))
            for id_, each in sorted(report.clients.items())
        ]
        self.store.commit(round, row, columns_of("clients", clients, self.publish))
        if self.profile:
            total = time.perf_counter() - self.started
            spent = {"driver": {"write": total - seconds}} | dict(report.spent)
            places = [ProfileRecord(run, round, place, phases, total) for place, phases in spent.items()]
            self.store.add_profile([row_of("profile", place) for place in places])
        self.started = time.perf_counter()
        return row

    def _trained(self) -> list[Trainings]:
        """Of each participant that was asked for an update: what made its private state, and each of its rounds."""
        costs, found = {cost.tier: cost for cost in self.run.cost.participants}, []
        for id_, rounds in self.updates.items():
            info = self.population[id_].info
            each = [(size, epochs * rounds) for size, epochs in costs[info.tier].round_epochs]
            found.append(Trainings(info.num_examples, (*costs[info.tier].begun_epochs, *each)))
        return found

    def finish(self, error: str | None = None) -> None:
        """The run finished, or failed with `error`."""
        self.store.finish(row_of("runs", RunRecord(self.run, self.store.wall_seconds, error), self.publish))
