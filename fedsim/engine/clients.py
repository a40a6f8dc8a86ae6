"""The aggregator's side of its participants: it calls them, sums what comes, and keeps the accounts of the round.

It reaches them through one callable and cannot tell where they are.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedsim.algorithm import Algorithm, ClientInfo, ClientUpdate, Partial, Payload
from fedsim.core import tree as trees
from fedsim.core.sealed import is_damage
from fedsim.core.tree import State
from fedsim.devices import Device
from fedsim.engine.boundary import Sent
from fedsim.engine.clock import Clock
from fedsim.engine.cohort import RoundCohort
from fedsim.engine.participant import Reply
from fedsim.engine.report import ClientReport
from fedsim.experiment import Experiment
from fedsim.learning.steps import run_alone, run_batched
from fedsim.runtime.base import Call, Failure, Policy


NOTHING: Mapping[int, Payload] = {}


class ParticipantError(RuntimeError):
    """A participant raised and the policy is to stop. `client` is its id; the text ends in its traceback."""

    def __init__(self, client: int, text: str) -> None:
        super().__init__(client, text)
        self.client, self.text = client, text

    def __str__(self) -> str:
        return f"participant {self.client} raised: {self.text}"


@dataclasses.dataclass(frozen=True)
class ChunkSum:
    """The summed updates of a chunk of consecutive participants, and its replies without them."""

    updates: list[ClientUpdate | Partial]
    replies: list[tuple[int, Reply | Failure]]


@dataclasses.dataclass(frozen=True)
class SumChunk:
    """Adds up the updates of one chunk, where they are. Picklable: it travels to the hosts.

    - `devices`: by participant. - `deadline`: simulated seconds after which an update is left out; None: none is.
    """

    algorithm: Algorithm
    devices: Mapping[int, Device | None] = dataclasses.field(default_factory=dict)
    deadline: float | None = None

    def __call__(self, replies: Sequence[tuple[int, Any]]) -> ChunkSum:
        in_time = [(id_, self._in_time(id_, reply)) for id_, reply in replies]
        updates = [reply.update for _, reply in in_time if isinstance(reply, Reply) and reply.update is not None]
        partial = self._combined(updates) if updates else None
        stripped = [
            (id_, Reply(None, reply.report, reply.state_sha256) if isinstance(reply, Reply) else reply)
            for id_, reply in in_time
        ]
        return ChunkSum([partial] if partial is not None else list(updates), stripped)

    def _combined(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        """**Raises:** `ValueError` for what no mean can be taken of."""
        partial = self.algorithm.combine(updates)
        if partial is None or (isinstance(partial, Partial) and (0 < partial.weight < math.inf or not partial.tree)):
            return partial
        found = f"a Partial of weight {partial.weight!r}" if isinstance(partial, Partial) else type(partial).__name__
        raise ValueError(f"{self.algorithm.name}.combine returned {found}: must be None, or a Partial of finite weight")

    def _in_time(self, id_: int, reply: Any) -> Any:
        """A reply without its update if that came too late."""
        if self.deadline is None or not isinstance(reply, Reply):
            return reply
        seconds = reply.report.client_round_seconds(self.devices[id_])
        return drop_straggler(reply) if seconds is not None and seconds > self.deadline else reply


def drop_straggler(reply: Reply) -> Reply:
    """A reply whose update is left out, as it came when the round was over."""
    return dataclasses.replace(reply, update=None, report=dataclasses.replace(reply.report, outcome="late"))


class Clients:
    """The participants of an experiment, as the aggregator calls them; `reports` are those of the round under way.

    - `private`: hash of each participant's private state, by id, from its last reply on.
    """

    def __init__(self, experiment: Experiment, infos: Sequence[ClientInfo], call: Call, clock: Clock) -> None:
        tiers = {tier.name: tier.simulated for tier in experiment.tiers}
        self.devices = {client.id: tiers[client.tier] for client in infos}
        self.experiment, self.call, self.clock = experiment, call, clock
        together = run_batched if experiment.batched else None
        self.policy = Policy(experiment.on_error == "retry", run_alone, together, seconds=experiment.call_seconds)
        self.private: dict[int, str] = {}
        self.reports: dict[int, ClientReport] = {}

    def open(self, private: Mapping[int, str]) -> None:
        """A round begins, before which private states have these hashes."""
        self.private, self.reports = dict(private), {}

    def begin(self, ids: Collection[int]) -> None:
        """Have private states made."""
        nothing: Payload = {}
        for replies in self.clock.awaited(
            self.call("begin", 0, dict.fromkeys(sorted(ids), nothing), policy=self.policy)
        ):
            self._note(replies)

    def ask(self, round: int, questions: Mapping[int, Payload]) -> dict[int, State]:
        """A further exchange within a round. **Returns:** answers, of those who gave one."""
        answers: dict[int, State] = {}
        policy = dataclasses.replace(self.policy, together=None)  # nobody trains
        for replies in self.clock.awaited(self.call("answer", round, questions, policy=policy)):
            self._note(replies, questions)
            answers |= {id_: reply.update.tree for id_, reply in replies if isinstance(reply, Reply) and reply.update}
        return answers

    def train(
        self, round: int, cohort: RoundCohort, payloads: Mapping[int, Payload], sent: Mapping[str, Sent]
    ) -> Iterator[ClientUpdate | Partial]:
        """Updates in cohort order, one chunk in memory at a time, without those of stragglers.

        - `sent`: how updates look, by tier.
        """
        for id_ in cohort.dropped_out:  # what it received is all that is ever known of its round from now on
            report = ClientReport(outcome="dropped_out", bytes_down=trees.nbytes(payloads[id_]))
            self.reports[id_] = self.reports.get(id_, ClientReport()).then(report)
        payloads = {id_: payloads[id_] for id_ in cohort.takes_part}
        policy = dataclasses.replace(self.policy, told=sent)
        conditions = self.experiment.conditions
        sum_chunk = SumChunk(self.experiment.algorithm, self.devices, conditions.deadline)
        if conditions.over_selection:
            replies = list(self.clock.awaited(self.call("train", round, payloads, policy=policy)))
            chunks = map(sum_chunk, self._first(replies))
        else:
            chunks = self.clock.awaited(self.call("train", round, payloads, sum_chunk, policy))
        for chunk in chunks:
            self._note(chunk.replies, payloads)
            yield from chunk.updates

    def score(self, round: int, payloads: Mapping[int, Payload]) -> None:
        """Have the models scored that participants would deploy."""
        policy = dataclasses.replace(self.policy, together=None)  # nobody trains
        for replies in self.clock.awaited(self.call("score", round, payloads, policy=policy)):
            self._note(replies)

    def settle(self, round: int, cohort: RoundCohort) -> float | None:
        """Complete the reports of a round. **Returns:** simulated seconds that the server waited; None if unknown."""
        for id_ in cohort.excluded:
            self.reports[id_] = ClientReport(outcome="excluded")
        return self._simulated(round)

    # parts ----------------------------------------------------------------------------------------------------------

    def _note(self, replies: Sequence[tuple[int, Reply | Failure]], payloads: Mapping[int, Payload] = NOTHING) -> None:
        """Take down what participants answered. `payloads`: what they had received, where that counts."""
        for id_, reply in replies:
            before = self.reports.get(id_)
            if isinstance(reply, Failure):
                if self.experiment.on_error != "drop" or is_damage(reply.text):
                    raise ParticipantError(id_, reply.text)
                received = ClientReport(bytes_down=trees.nbytes(payloads[id_]) if payloads else 0)
                report = received if before is None else before.then(received)
                self.reports[id_] = report.failed(reply.text.strip().splitlines()[-1])
                continue
            report = reply.report
            if self.experiment.batched and report.train_seconds:  # all took the time that they took together
                report = dataclasses.replace(report, train_seconds=report.train_seconds / len(replies))
            self.reports[id_] = report if before is None else before.then(report)
            self.private[id_] = reply.state_sha256

    def _first(self, chunks: Sequence[Sequence[tuple[int, Any]]]) -> Iterator[list[tuple[int, Any]]]:
        """The same chunks of replies, with only so many updates as the cohort wants: those that are there first."""
        times = {
            id_: reply.report.client_round_seconds(self.devices[id_])
            for chunk in chunks
            for id_, reply in chunk
            if isinstance(reply, Reply)
        }
        kept = {*sorted(times, key=lambda id_: (times[id_], id_))[: self._wanted]}
        for chunk in chunks:
            yield [(id_, drop_straggler(reply) if id_ in times and id_ not in kept else reply) for id_, reply in chunk]

    @property
    def _wanted(self) -> int:
        return self.experiment.cohort or self.experiment.participants

    def _simulated(self, round: int) -> float | None:
        """Note every participant's simulated time. **Returns:** how long the server waited; None if any is unknown."""
        waited = []
        for id_, report in self.reports.items():
            device = self.devices[id_]
            init, busy = report.init_seconds(device), report.client_round_seconds(device)
            if round and not report.trained:  # scored, or not heard of: nobody waits for it
                if report.init_flops:
                    self.reports[id_] = dataclasses.replace(report, simulated_seconds=init)
                continue
            total = None if init is None or busy is None else init + busy
            if total is not None:
                self.reports[id_] = dataclasses.replace(report, simulated_seconds=total)
            waited.append((init if round == 0 else busy, report.outcome == "late"))
        if any(seconds is None for seconds, _ in waited):
            return None
        deadline, in_time = self.experiment.conditions.deadline, [seconds for seconds, late in waited if not late]
        missing = len(in_time) < len(waited) or any(r.outcome == "dropped_out" for r in self.reports.values())
        if deadline is not None and round and missing and len(in_time) < self._wanted:
            return deadline
        return max(in_time, default=0.0)
