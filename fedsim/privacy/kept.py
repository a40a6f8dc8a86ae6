"""A finished run whose updates were kept, as audits read it: exchanges, private states, and who holds which data."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from fedsim.core.canonical import parsed, revived
from fedsim.core.seeding import numpy_generator
from fedsim.data.source import Split
from fedsim.engine.cohort import Member, members
from fedsim.engine.content import content_of
from fedsim.engine.cost import DryRun
from fedsim.experiment import Experiment
from fedsim.learning.meter import StepCost
from fedsim.learning.task import Task, load_task
from fedsim.privacy.attacks import membership
from fedsim.privacy.attacks.replay import Exchange, Replay, knowledge
from fedsim.privacy.dp import COUNT
from fedsim.privacy.pairs import bare
from fedsim.results.export import finished_run, offline
from fedsim.results.provenance import code_sha256
from fedsim.results.store import RunStore
from fedsim.storage.checkpoint import RECEIVED, SENT, exchanges_of, private_of
from fedsim.storage.place import Place


class Uncounted(dict[tuple, StepCost]):
    """Costs of steps that nobody asks for: none is measured."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: tuple) -> StepCost:
        return StepCost((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run whose updates were kept. `rounds`: those with exchanges, and who took part in each."""

    directory: Place
    row: Mapping[str, Any]
    experiment: Experiment
    task: Task
    population: Sequence[Member]
    rounds: Mapping[int, Sequence[int]]

    @property
    def run_id(self) -> str:
        return self.row["run_id"]

    @property
    def method(self) -> str:
        return self.row["method"]

    @property
    def private(self) -> Place:
        return self.directory / "checkpoints" / self.run_id / "private"

    def exchange(self, round: int, client: int) -> Exchange:
        """What a participant received and sent, of the method that is inside all pairs."""
        found = exchanges_of(self.private, client).load(round + 1)
        assert found is not None and found.number == round
        sent = {name: part for name, part in found.state.get(SENT, {}).items() if name != COUNT}  # of an adaptive clip
        return Exchange(round, client, found.state.get(RECEIVED, {}), sent)

    def replays(self, round: int, client: int) -> dict[str, Replay]:
        """An exchange as it looks at each level of knowledge."""
        found = self.exchange(round, client)
        algorithm, received = bare(self.experiment.algorithm, found.received)
        found = dataclasses.replace(found, received=received)
        versions = private_of(self.private, client)
        held = versions.load(round) or versions.load(round + 1)  # a state made in its first round has that number
        ctx = DryRun(self.experiment, Uncounted()).client(self.population[client].info, round)
        levels = knowledge(algorithm, held.state if held else {}, dataclasses.replace(ctx, round=0))
        return {level: Replay(algorithm, found, state, ctx) for level, state in levels.items()}

    def shard(self, client: int) -> Split:
        assert self.task.dataset is not None
        return self.task.dataset.train.select(self.population[client].train)

    def others(self, client: int) -> Split:
        """Examples nobody trained on: the test set; the participant's own validation part where data have groups."""
        assert self.task.dataset is not None
        train = self.task.dataset.train
        return self.task.dataset.test if train.groups is None else train.select(self.population[client].validation)

    def pairs(self, client: int, most: int) -> tuple[Split, Split] | None:
        """As many members as others, of equally many of each class; None where they are too few."""
        stream = numpy_generator(self.experiment.seed, "audit/pairs", client=client)
        splits = self.shard(client), self.others(client)
        places = membership.matched(splits[0].labels, splits[1].labels, stream)
        kept = stream.permutation(len(places[0]))[:most]
        if len(kept) < membership.FEWEST:
            return None
        return splits[0].select(places[0][kept]), splits[1].select(places[1][kept])


def opened_run(directory: Place, run_id: str, data_dir: str | None, modules: Sequence[ModuleType]) -> Run:
    """**Raises:** `ValueError` as `fedsim.privacy.audit.audit` does."""
    row = finished_run(directory, run_id)
    with offline():
        try:
            experiment: Experiment = revived(parsed(row["config"]), Experiment, modules)
        except ValueError as error:
            raise ValueError(f"run {run_id}: {error}") from error
        code = code_sha256(experiment.algorithm, experiment.task.family, experiment.start)
        if why := RunStore(directory, run_id, code, content_of(experiment, data_dir)).outdated_by():
            raise ValueError(f"run {run_id}: {why} since it was computed, so its rounds cannot be replayed")
        task = load_task(experiment.task, data_dir)
        population = members(experiment, task)
    private, rounds = directory / "checkpoints" / run_id / "private", dict[int, list[int]]()
    for client in range(experiment.participants):
        for round in exchanges_of(private, client).stored():
            rounds.setdefault(round, []).append(client)
    if not rounds:
        raise ValueError(
            f"{private}: run {run_id} kept no updates: compute it with --keep-updates, and audit before clean"
        )
    return Run(directory, row, experiment, task, population, dict(sorted(rounds.items())))
