"""The server: its state and its rounds. It reports numbers only: models stay here."""

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from fedsim.algorithm import ClientInfo, ClientUpdate, Partial, Payload, ServerContext
from fedsim.core import tree as trees
from fedsim.core.environment import use_large_pages
from fedsim.core.tree import State, Tree
from fedsim.engine.boundary import Sent, check_finite, check_state
from fedsim.engine.clients import Clients
from fedsim.engine.clock import Clock
from fedsim.engine.cohort import RoundCohort
from fedsim.engine.report import RoundReport
from fedsim.experiment import Experiment
from fedsim.learning.task import Task, load_task
from fedsim.runtime.base import Call
from fedsim.storage.checkpoint import Versions, state_sha256


class Aggregator:
    """A plain class: it runs wherever a runtime puts it.

    A call for round r starts from the state of round r-1, read from disk if this object does not hold it, so a server
    that was restarted, or a run that was resumed, goes on from the last finished round.
    """

    def __init__(
        self, experiment: Experiment, infos: Sequence[ClientInfo], data_dir: str | None, folder: str, call: Call
    ) -> None:
        use_large_pages()
        self.experiment, self.infos, self.data_dir, self.call = experiment, infos, data_dir, call
        self.clock = Clock(call)
        self.clients = Clients(experiment, infos, call, self.clock)
        self.versions = Versions(folder, "server")
        self.round: int | None = None
        self.state: State = {}

    def run_round(
        self, round: int, cohort: RoundCohort, scored: Sequence[int], sent: Mapping[str, Sent] | None = None
    ) -> RoundReport:
        """One round: broadcast, local work, aggregation, scores, checkpoint. Round 0 makes the states and scores them.

        - `cohort`: who trains. - `scored`: whose models are scored afterwards, in order of id.
        - `sent`: how updates look, by tier, as far as that is known.
        """
        ctx = self._open(round)
        if round == 0:
            self.state = _checked(self.experiment.algorithm.server_init(ctx), "server_init")
            self.clients.begin({*cohort.takes_part, *scored})
        else:
            begun = self._begin(cohort.reached, ctx)
            payloads = self._broadcast(begun, cohort.reached, ctx)
            updates = self.clients.train(round, cohort, payloads, sent or {})  # lazy: they train while it aggregates
            self.state = self._aggregate(begun, updates, ctx)
        accuracy_global = self._score(scored, ctx)
        state_sha256 = self._save(round)
        return self._report(round, cohort, state_sha256, accuracy_global)

    # parts ----------------------------------------------------------------------------------------------------------

    def _open(self, round: int) -> ServerContext:
        """Start the accounts anew, and hold the state of the round before."""
        self.call.reset()
        self.clock.reset()
        private = self.clients.private if round else {}
        if round and self.round != round - 1:
            found = self.versions.load(round)
            if found is None or found.number != round - 1:
                raise RuntimeError(f"{self.versions.folder}: no server state of round {round - 1} to go on from")
            self.state = found.state
            private = {int(id_): sha for id_, sha in json.loads(found.metadata["private"]).items()}
        self.clients.open(private)
        experiment = self.experiment
        task = Task(experiment.task)
        forms, ask = (experiment.middle, experiment.target), functools.partial(self.clients.ask, round)
        return ServerContext(experiment.seed, round, task, *forms, self.infos, experiment.start, ask)

    def _begin(self, ids: Collection[int], ctx: ServerContext) -> State:
        with self.clock.phase("broadcast"):
            return self.experiment.algorithm.server_begin(self.state, [self.infos[id_] for id_ in ids], ctx)

    def _broadcast(self, state: State, ids: Collection[int], ctx: ServerContext) -> Mapping[int, Payload]:
        with self.clock.phase("broadcast"):
            infos = [self.infos[id_] for id_ in ids]
            payloads = self.experiment.algorithm.server_broadcast(state, infos, ctx)
            if missing := [id_ for id_ in ids if id_ not in payloads]:
                raise ValueError(f"server_broadcast in round {ctx.round} leaves out participants {missing[:4]}")
            checked = {id(tensor) for tensor in trees.tensors(self.state)}
            for payload in {id(payload): payload for payload in payloads.values()}.values():
                field = f"a payload of server_broadcast in round {ctx.round}"
                tree = check_state(payload, field)
                check_finite({path: tensor for path, tensor in tree.items() if id(tensor) not in checked}, field)
            return payloads

    def _aggregate(self, begun: State, updates: Iterator[ClientUpdate | Partial], ctx: ServerContext) -> State:
        with self.clock.phase("sum"):
            state = self.experiment.algorithm.server_aggregate(begun, updates, ctx)
            for _ in updates:
                pass  # an algorithm that stopped early must not leave replies unread
            return _checked(state, f"server_aggregate in round {ctx.round}")

    def _score(self, ids: Sequence[int], ctx: ServerContext) -> float | None:
        """Score participants. **Returns:** the accuracy of the server's own model, where there is one."""
        if not ids:
            return None
        self.clients.score(ctx.round, self._broadcast(self.state, ids, ctx))
        with self.clock.phase("compute"):
            model = self.experiment.algorithm.server_model(self.state, ctx)
            if model is None:
                return None
            task = load_task(self.experiment.task, self.data_dir)
            assert task.dataset is not None
            return task.score(model, task.dataset.test).accuracy

    def _save(self, round: int) -> str:
        """Write the state down. **Returns:** `state_sha256`."""
        with self.clock.phase("write"):
            server = self.versions.save(round, self.state, {"private": json.dumps(self.clients.private)})
        self.round = round
        return state_sha256(server, self.clients.private)

    def _report(self, round: int, cohort: RoundCohort, state_sha256: str, accuracy_global: float | None) -> RoundReport:
        simulated = self.clients.settle(round, cohort)
        share, least = coverage(self.experiment.algorithm.server_covered(self.state))
        return RoundReport(
            clients=self.clients.reports,
            places=self.call.places(),
            traffic=self.call.traffic("train", "answer"),
            bytes_moved=self.call.moved(),
            retries=self.call.retries(),
            state_sha256=state_sha256,
            simulated_seconds=simulated,
            accuracy_global=accuracy_global,
            coverage=share,
            coverage_min=least,
            spent={
                "aggregator": self.clock.spent,
                **{f"host {host}": phases for host, phases in self.call.spent().items()},
            },
        )


def _checked(state: State, returned_by: str) -> State:
    """The server's state in order of name. **Raises:** `ValueError` naming a tensor that cannot be gone on from."""
    field = f"the state that {returned_by} returned"
    check_finite(check_state(state, field), field)
    return trees.ordered(state)


def coverage(covered: Tree | None) -> tuple[float | None, float | None]:
    """Share of all coordinates that were trained so far, and the smallest share of any matrix."""
    if not covered:
        return None, None
    share = {name: float(mask.float().mean(dtype=torch.float64)) for name, mask in covered.items()}
    total = sum(mask.numel() for mask in covered.values())
    of_all = sum(share[name] * mask.numel() for name, mask in covered.items()) / total
    return of_all, min((share[name] for name, mask in covered.items() if mask.ndim > 1), default=None)
