"""The server: its state, its rounds, and the accounts of what crossed the network.

It reaches participants through one callable and cannot tell where they are. It reports numbers only: models stay here.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from fedsim.algorithm import Algorithm, ClientInfo, ClientUpdate, Partial, Payload, ServerContext
from fedsim.core import tree as trees
from fedsim.core.environment import use_large_pages
from fedsim.core.tree import Tree
from fedsim.devices import Device, client_round_seconds, init_seconds
from fedsim.engine.cohort import RoundCohort
from fedsim.engine.participant import Reply
from fedsim.experiment import Experiment
from fedsim.learning.steps import run_alone, run_batched
from fedsim.learning.task import Task, load_task
from fedsim.runtime.base import PHASES, Call, Failure, Policy
from fedsim.storage.checkpoint import Versions


T = TypeVar("T")


class ParticipantError(RuntimeError):
    """A participant raised and the policy is to stop. `client` is its id; the text ends in its traceback."""

    def __init__(self, client: int, text: str) -> None:
        super().__init__(client, text)
        self.client, self.text = client, text

    def __str__(self) -> str:
        return f"participant {self.client} raised: {self.text}"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is left of the replies of a chunk of consecutive participants once their updates are added up."""

    updates: list[ClientUpdate | Partial]
    replies: list[tuple[int, Reply | Failure]]


@dataclasses.dataclass(frozen=True)
class Fold:
    """Adds up the updates of one chunk, where they are. Picklable: it travels to the hosts.

    - `devices`: by participant. - `deadline`: simulated seconds after which an update is left out; None: none is.
    """

    algorithm: Algorithm
    devices: Mapping[int, Device | None] = dataclasses.field(default_factory=dict)
    deadline: float | None = None

    def __call__(self, replies: Sequence[tuple[int, Any]]) -> Chunk:
        replies = [(id_, self._in_time(id_, reply)) for id_, reply in replies]
        updates = [reply.update for _, reply in replies if isinstance(reply, Reply) and reply.update is not None]
        partial = self.algorithm.combine(updates) if updates else None
        stripped = [
            (id_, Reply(None, reply.row, reply.state_sha256) if isinstance(reply, Reply) else reply)
            for id_, reply in replies
        ]
        return Chunk([partial] if partial is not None else list(updates), stripped)

    def _in_time(self, id_: int, reply: Any) -> Any:
        """A reply without its update if that came too late."""
        if self.deadline is None or not isinstance(reply, Reply):
            return reply
        seconds = client_round_seconds(self.devices[id_], reply.row)
        return drop_straggler(reply) if seconds is not None and seconds > self.deadline else reply


def drop_straggler(reply: Reply) -> Reply:
    """A reply whose update is left out, as it came when the round was over."""
    return dataclasses.replace(reply, update=None, row=reply.row | {"late": True})


class Aggregator:
    """A plain class: it runs wherever a runtime puts it.

    A call for round r starts from the state of round r-1, read from disk if this object does not hold it, so a server
    that was restarted, or a run that was resumed, goes on from the last finished round.
    """

    def __init__(
        self, experiment: Experiment, clients: Sequence[ClientInfo], data_dir: str | None, folder: str, call: Call
    ) -> None:
        use_large_pages()
        tiers = {tier.name: tier.simulated for tier in experiment.tiers}
        self.devices = {client.id: tiers[client.tier] for client in clients}
        self.experiment, self.clients, self.data_dir, self.call = experiment, clients, data_dir, call
        self.versions = Versions(folder, "server")
        self.round: int | None = None
        self.spent: dict[str, float] = dict.fromkeys((*PHASES, "idle"), 0.0)  # seconds of the round under way
        self.policy = Policy(experiment.on_error == "retry", run_alone, run_batched if experiment.batched else None)
        self.state: Tree = {}
        self.private: dict[int, str] = {}  # id -> hash of that participant's private state

    def run_round(self, round: int, round_cohort: RoundCohort, scored: Sequence[int]) -> dict[str, Any]:
        """One round: broadcast, local work, aggregation, checkpoint, scores. Round 0 makes the states and scores them.

        **Returns:** what the round's rows are made of: rows per participant, traffic, `state_sha256`; no tensors.
        """
        self.call.reset()
        self.spent = dict.fromkeys(self.spent, 0.0)
        rows: dict[int, dict[str, Any]] = {}
        context = self._context(round)
        if round == 0:
            self.state, self.private = trees.ordered(self.experiment.algorithm.server_init(context)), {}
            chosen = sorted({*round_cohort.takes_part, *scored})
            nothing: Payload = {}
            for chunk in self._awaited(self.call("begin", round, dict.fromkeys(chosen, nothing), policy=self.policy)):
                self._note(chunk, rows)
        else:
            self._enter(round)
            with self._spending("broadcast"):
                payloads = self.experiment.algorithm.server_broadcast(
                    self.state, self._infos(round_cohort.reached), context
                )
            for id_ in round_cohort.dropped_out:  # what it received is all that is ever known of its round
                rows[id_] = empty_report() | {"bytes_down": trees.nbytes(payloads[id_]), "dropped_out": True}
            arriving = self._updates(round, {id_: payloads[id_] for id_ in round_cohort.takes_part}, rows)
            with self._spending("sum"):
                state = self.experiment.algorithm.server_aggregate(self.state, arriving, context)
                for _ in arriving:
                    pass  # an algorithm that stopped early must not leave replies unread
            self.state = trees.ordered(state)
        trained = self.call.traffic("train")
        scores = self._scores(round, scored, rows) if scored else {}
        with self._spending("write"), ThreadPoolExecutor(1) as pool:  # one waits for the disk, the other computes
            state_sha256 = pool.submit(self._sha256)
            self.versions.save(round, self.state, {"private": json.dumps(self.private)})
        self.round = round
        for id_, place in self.call.places().items():
            rows[id_].update(place)
        for id_ in round_cohort.excluded:
            rows[id_] = empty_report() | {"excluded": True}
        return {
            "rows": rows,
            "simulated_seconds": self._simulated(round, rows),
            "seam_bytes_up": trained.up,
            "seam_bytes_down": trained.down,
            "bytes_moved": self.call.moved(),
            "retries": self.call.retries(),
            "state_sha256": state_sha256.result(),
            "spent": {
                "aggregator": self.spent,
                **{f"host {host}": phases for host, phases in self.call.spent().items()},
            },
            **coverage(self.experiment.algorithm.server_covered(self.state)),
            **scores,
        }

    # parts ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _spending(self, phase: str) -> Iterator[None]:
        """Count the seconds of something, but for those of waiting within it."""
        started, idle = time.perf_counter(), self.spent["idle"]
        yield
        self.spent[phase] += time.perf_counter() - started - (self.spent["idle"] - idle)

    def _awaited(self, answers: Iterator[T]) -> Iterator[T]:
        """The same, with the seconds of waiting for them counted."""
        while True:
            started, folded = time.perf_counter(), self.call.folded()
            try:
                answer = next(answers)
            except StopIteration:
                return
            finally:
                folding = self.call.folded() - folded
                self.spent["idle"] += time.perf_counter() - started
                self.spent["sum"] += folding
                self.spent["idle"] -= folding
            yield answer

    def _enter(self, round: int) -> None:
        if self.round == round - 1:
            return
        found = self.versions.load(round)
        if found is None or found[0] != round - 1:
            raise RuntimeError(f"{self.versions.folder}: no server state of round {round - 1} to go on from")
        _, self.state, metadata = found
        self.private = {int(id_): sha for id_, sha in json.loads(metadata["private"]).items()}

    def _context(self, round: int) -> ServerContext:
        experiment = self.experiment
        return ServerContext(
            experiment.seed, round, Task(experiment.task), experiment.intermediate, experiment.target, self.clients
        )

    def _infos(self, ids: Sequence[int]) -> list[ClientInfo]:
        return [self.clients[id_] for id_ in ids]

    def _updates(
        self, round: int, payloads: Mapping[int, Payload], rows: dict[int, dict[str, Any]]
    ) -> Iterator[ClientUpdate | Partial]:
        """Updates in cohort order, one chunk in memory at a time; rows and hashes are noted as they pass."""
        conditions = self.experiment.conditions
        fold = Fold(self.experiment.algorithm, self.devices, conditions.deadline)
        if conditions.over_selection:
            chunks = map(
                fold, self._first(list(self._awaited(self.call("train", round, payloads, policy=self.policy))))
            )
        else:
            chunks = self._awaited(self.call("train", round, payloads, fold, self.policy))
        for chunk in chunks:
            self._note(chunk.replies, rows)
            yield from chunk.updates

    def _first(self, chunks: Sequence[Sequence[tuple[int, Any]]]) -> Iterator[list[tuple[int, Any]]]:
        """The same chunks of replies, with only so many updates as the cohort wants: those that are there first."""
        times = {
            id_: client_round_seconds(self.devices[id_], reply.row)
            for chunk in chunks
            for id_, reply in chunk
            if isinstance(reply, Reply)
        }
        wanted = self.experiment.cohort or self.experiment.participants
        kept = {*sorted(times, key=lambda id_: (times[id_], id_))[:wanted]}
        for chunk in chunks:
            yield [(id_, drop_straggler(reply) if id_ in times and id_ not in kept else reply) for id_, reply in chunk]

    def _simulated(self, round: int, rows: dict[int, dict[str, Any]]) -> float | None:
        """Simulated seconds that the server waited, noted for every participant as well; None if any is unknown."""
        waited = []
        for id_, row in rows.items():
            if round and "bytes_up" not in row:
                continue  # scored, or not heard of
            device = self.devices[id_]
            begun, busy = init_seconds(device, row), client_round_seconds(device, row)
            row["simulated_seconds"] = None if begun is None or busy is None else begun + busy
            waited.append((begun if round == 0 else busy, row))
        deadline = self.experiment.conditions.deadline
        gone = any("dropped_out" in row for row in rows.values())
        if any(seconds is None for seconds, _ in waited):
            return None
        there = max((seconds for seconds, row in waited if "late" not in row), default=0.0)
        missing = gone or any("late" in row for _, row in waited)
        enough = sum("late" not in row for _, row in waited) >= (self.experiment.cohort or self.experiment.participants)
        return deadline if deadline is not None and round and missing and not enough else there

    def _note(self, replies: Sequence[tuple[int, Reply | Failure]], rows: dict[int, dict[str, Any]]) -> None:
        for id_, reply in replies:
            row = rows.setdefault(id_, empty_report())
            if isinstance(reply, Failure):
                if self.experiment.on_error != "drop":
                    raise ParticipantError(id_, reply.text)
                row["error"] = reply.text.strip().splitlines()[-1]
                continue
            noted = reply.row
            if self.experiment.batched and "accuracy" not in noted:  # all of them took the time that they took together
                noted = noted | {"train_seconds": noted["train_seconds"] / len(replies)}
            row.update(combined_work(row, noted))
            self.private[id_] = reply.state_sha256

    def _scores(self, round: int, scored: Sequence[int], rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Scores of participants, noted in their rows, and of the server's own model where there is one."""
        context = self._context(round)
        payloads = self.experiment.algorithm.server_broadcast(self.state, self._infos(scored), context)
        again = dataclasses.replace(self.policy, together=None)  # nobody trains
        for replies in self._awaited(self.call("score", round, payloads, policy=again)):
            self._note(replies, rows)
        with self._spending("compute"):
            model = self.experiment.algorithm.server_model(self.state, context)
            if model is None:
                return {"accuracy_global": None}
            task = load_task(self.experiment.task, self.data_dir)
            assert task.dataset is not None
            return {"accuracy_global": task.score(model, task.dataset.test).accuracy}

    def _sha256(self) -> str:
        """Over the server's state and, in order of id, the hash of each participant's private state."""
        private = ";".join(f"{id_}:{self.private[id_]}" for id_ in sorted(self.private))
        return trees.sha256_of_text(f"{trees.sha256(self.state)}|{private}")


def empty_report() -> dict[str, Any]:
    """The row of a participant that has not been called yet."""
    return {"host": None, "node": None, "retries": 0}


def coverage(covered: Tree | None) -> dict[str, float | None]:
    """Share of all coordinates that were trained so far, and the smallest share of any matrix."""
    if not covered:
        return {"coverage": None, "coverage_min": None}
    share = {name: float(mask.float().mean(dtype=torch.float64)) for name, mask in covered.items()}
    total = sum(mask.numel() for mask in covered.values())
    of_all = sum(share[name] * mask.numel() for name, mask in covered.items()) / total
    return {"coverage": of_all, "coverage_min": min(share[n] for n, mask in covered.items() if mask.ndim > 1)}


def combined_work(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A participant's row after one more call in the same round: seconds and FLOPs add up, marks take the highest."""
    if "train_seconds" not in row:  # its first
        scored_only = {"train_seconds": 0.0} if "accuracy" in more else {}
        return {"flops": 0, "init_flops": 0, "trainable_params": 0} | row | more | scored_only
    merged = row | {name: value for name, value in more.items() if value is not None or name not in row}
    for name in ("flops", "init_flops", "trainable_params"):
        merged[name] = row.get(name, 0) + more.get(name, 0)
    if "accuracy" in more:
        merged["train_seconds"] = row["train_seconds"]  # scoring is not training
    else:
        merged["train_seconds"] = row["train_seconds"] + more["train_seconds"]
    merged["peak_memory_bytes"] = max(row.get("peak_memory_bytes") or 0, more["peak_memory_bytes"] or 0) or None
    return merged
