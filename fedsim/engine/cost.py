"""What an experiment costs, counted from the tensors it would really train and send, before any data are loaded.

Every tier's participant is run for real, on an empty shard: it builds its trees, trains nothing, makes its update, as
in the last federated round: where models grow on the way, that is the largest.
"""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedsim.algorithm import ClientContext, ClientInfo, ClientUpdate, Payload, ServerContext
from fedsim.core import tree as trees
from fedsim.core.fields import refuse
from fedsim.core.text import last_line
from fedsim.core.tree import State
from fedsim.data.source import Split
from fedsim.devices import MEBIBYTE
from fedsim.engine.boundary import Sent, check_outcome, check_state, layout_of
from fedsim.engine.cohort import check_checkpoints, check_forms, scored_in, tiers_of
from fedsim.experiment import Experiment, Tier, of_tier
from fedsim.learning.meter import PRETRAIN, Meter, StepCost, Work, forward_flops
from fedsim.learning.steps import run_client
from fedsim.learning.task import Task


BYTES = 4  # fp32


@dataclasses.dataclass(frozen=True)
class ParticipantCost:
    """One participant of a tier. `trainable` by stage; its own small model's training is no part of the federation."""

    tier: str
    form: str
    count: int  # participants of this tier
    small_params: int
    trainable: dict[str, int]
    upload_params: int
    upload_bytes: int
    download_bytes: int
    private_bytes: int
    flops_per_step: dict[str, int]
    peak_bytes: int
    begun_epochs: tuple[tuple[int, int], ...] = ()  # of trainings that make its private state: batch size, epochs
    round_epochs: tuple[tuple[int, int], ...] = ()  # ... and of those of a round

    @property
    def trainable_params(self) -> int:
        return sum(self.trainable.values())


@dataclasses.dataclass(frozen=True)
class Cost:
    """Means are over the participants of the population. `sent`: how updates look, by tier; none that is empty."""

    target_params: int
    participants: list[ParticipantCost]
    sent: Mapping[str, Sent] = dataclasses.field(default_factory=dict)

    def mean(self, name: str) -> float:
        total = sum(participant.count for participant in self.participants)
        return sum(getattr(participant, name) * participant.count for participant in self.participants) / total

    @property
    def fedavg_upload_bytes(self) -> int:
        return self.target_params * BYTES

    @property
    def communication_saved(self) -> float:
        return 1 - self.mean("upload_bytes") / self.fedavg_upload_bytes

    @property
    def trainable_saved(self) -> float:
        return 1 - self.mean("trainable_params") / self.target_params

    def as_json(self, experiment: Experiment) -> dict[str, Any]:
        """The object `fedsim inspect --json` prints."""
        of_tier = {cost.tier: cost for cost in self.participants}
        participants = []
        for id_, tier in enumerate(tiers_of(experiment)):
            cost = of_tier[tier.name]
            figures = dataclasses.asdict(cost) | {"trainable_params": cost.trainable_params}
            participants.append({"participant": id_} | figures)
        return {
            "algorithm": experiment.algorithm.name,
            "preset": experiment.algorithm.preset_name,
            "run_id": experiment.run_id,
            "target_params": self.target_params,
            "trainable_params": whole(self.mean("trainable_params")),
            "local_params": whole(self.mean("trainable_params") - self.mean("upload_params")),
            "upload_params": whole(self.mean("upload_params")),
            "upload_bytes": whole(self.mean("upload_bytes")),
            "fedavg_upload_bytes": self.fedavg_upload_bytes,
            "communication_saved": self.communication_saved,
            "trainable_saved": self.trainable_saved,
            "scored_models": sum(len(scored_in(experiment, round)) for round in range(experiment.rounds + 1)),
            "score_flops_per_example": forward_flops(Task(experiment.task), experiment.target),
            "peak_bytes": max(cost.peak_bytes for cost in self.participants),
            "private_bytes": sum(cost.private_bytes * cost.count for cost in self.participants),
            "participants": participants,
        }


@dataclasses.dataclass(frozen=True)
class DryRunState:
    """What the aggregator and one participant a tier hold between two rounds."""

    server: State
    private: tuple[State, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a participant without data did when it was called: it trained nothing, and built and sent everything.

    - `payload`, `update`: what it received and sent; nothing when it began. - `state`: what it holds afterwards.
    - `seconds`: the call's wall-clock time; includes what was counted or timed for the first time.
    """

    work: tuple[Work, ...]
    payload: Payload
    update: ClientUpdate | None
    state: State
    seconds: float


class MethodError(ValueError):
    """A method of an algorithm raised where nothing but its costs was asked for. Says which, what, and where."""


class DryRun:
    """An experiment with one participant a tier, in the order of tiers, none of whom has data.

    Everything is built, sent and averaged as in a run, and nothing is trained, sampled, scored or stored.

    - `counted`: receives the cost of a training step, for every shape. - `device`: where participants compute.
    """

    def __init__(self, experiment: Experiment, counted: dict[tuple, StepCost], device: str = "cpu") -> None:
        self.experiment, self.counted, self.device = experiment, counted, torch.device(device)
        self.task = Task(experiment.task)
        # One example each, by which means are weighted.
        self.infos = [ClientInfo(id_, t.name, t.form, 1, t.checkpoint) for id_, t in enumerate(experiment.tiers)]

    def begin(self, timed: Collection[str] = ()) -> tuple[DryRunState, list[Call]]:
        """The state before round 1, and how participants made theirs.

        - `timed`: tiers whose participants take the time of a step.
        """
        with self._counting("server_init"):
            server = trees.ordered(self.experiment.algorithm.server_init(self.server(0)))
        calls = []
        for info in self.infos:
            meter, started = self._meter(info.tier in timed), time.perf_counter()
            context = self.client(info, 0, meter)
            with self._counting("client_init", info):
                state = run_client(context, self.experiment.algorithm.client_init(context))
                check_state(state, "client_init's state")
            state = trees.ordered(state)
            calls.append(Call(tuple(meter.work), {}, None, state, time.perf_counter() - started))
        return DryRunState(server, tuple(call.state for call in calls)), calls

    def train(self, held: DryRunState, round: int, timed: Collection[str] = ()) -> list[Call]:
        """A round's local work, from what was held before it, whichever round that was."""
        algorithm, calls = self.experiment.algorithm, []
        with self._counting("server_broadcast"):
            payloads = algorithm.server_broadcast(held.server, self.infos, self.server(round))
        for info, private in zip(self.infos, held.private, strict=True):
            meter, started = self._meter(info.tier in timed), time.perf_counter()
            payload = trees.to(trees.ordered(payloads[info.id]), self.device)
            private = trees.to(trees.ordered(private), self.device)
            context = self.client(info, round, meter)
            with self._counting("client_update", info):
                returned = run_client(context, algorithm.client_update(payload, private, context))
                check_outcome(returned, info.id)
            update, state = returned
            calls.append(Call(tuple(meter.work), payload, update, state, time.perf_counter() - started))
        return calls

    def aggregate(self, held: DryRunState, round: int, calls: Sequence[Call]) -> DryRunState:
        """What is held after a round in which participants answered so."""
        algorithm = self.experiment.algorithm
        updates = [call.update for call in calls if call.update is not None]
        partial = algorithm.combine(updates)
        arriving = iter(updates if partial is None else [partial])
        server = trees.ordered(algorithm.server_aggregate(held.server, arriving, self.server(round)))
        return DryRunState(server, tuple(call.state for call in calls))

    def server(self, round: int) -> ServerContext:
        experiment = self.experiment
        forms = experiment.middle, experiment.target
        return ServerContext(experiment.seed, round, self.task, *forms, self.infos, experiment.start)

    def client(self, info: ClientInfo, round: int, meter: Meter | None = None) -> ClientContext:
        return ClientContext(
            seed=self.experiment.seed,
            round=round,
            task=self.task,
            intermediate=self.experiment.middle,
            target=self.experiment.target,
            info=info,
            train=Split({}, torch.zeros(0, dtype=torch.long)),
            device=self.device,
            meter=meter or self._meter(False),
            precision=self.experiment.precision,
            forms=self.experiment.forms,
            start=self.experiment.start,
        )

    @contextlib.contextmanager
    def _counting(self, method: str, info: ClientInfo | None = None) -> Iterator[None]:
        """What goes wrong within is said to be the method's. **Raises:** `MethodError`; `ValueError` as it is."""
        try:
            yield
        except ValueError:
            raise  # what is asked of the method cannot be met
        except Exception as error:  # of any kind: the method's own code runs
            frame = traceback.extract_tb(error.__traceback__)[-1]
            who = f" of tier {info.tier!r}" if info else ""
            raise MethodError(
                f"{self.experiment.algorithm.name}: {method}{who}, called without data to count what a run costs, "
                f"raised {last_line(error)} ({frame.filename}:{frame.lineno}, in {frame.name})"
            ) from error

    def _meter(self, timing: bool) -> Meter:
        return Meter(self.counted, timing=timing)


def cost_of(experiment: Experiment, counted: dict[tuple, StepCost]) -> Cost:
    """Count everything; takes as long as building the models, and their memory.

    `counted` receives the cost of a training step for every tier: participants that are handed it need not measure.

    **Raises:** `ValueError` for a checkpoint that is not what its tier says, and updates that the method refuses.
    """
    check_forms(experiment)
    check_checkpoints(experiment)
    dry_run, tiers = DryRun(experiment, counted), tiers_of(experiment)
    stage = experiment.algorithm.stage
    last = max((round for round in range(experiment.rounds + 1) if stage(round) == "federated"), default=0)
    start, begun = dry_run.begin()
    trained = dry_run.train(start, last)
    made = [call.update for call in trained if call.update is not None]
    experiment.algorithm.check_cohort(experiment.cohort or experiment.participants, made)
    participants = [
        _participant(dry_run.task, tier, tiers.count(tier), *calls)
        for tier, *calls in zip(experiment.tiers, begun, trained, strict=True)
    ]
    sent: dict[str, Sent] = {}
    for tier, call in zip(experiment.tiers, trained, strict=True):
        if call.update is not None and (layout := layout_of(call.update.tree)):
            sent[tier.name] = Sent(layout, as_received=layout == layout_of(call.payload))
    return Cost(trees.numel(dry_run.task.fresh(experiment.target, 0)), participants, sent)


def too_small(experiment: Experiment, cost: Cost) -> tuple[str, ...]:
    """The tiers whose device cannot hold what the method asks of it, by count.

    **Raises:** `ValueError` naming the tier and both numbers, if `conditions.memory` says that they are refused.
    """
    if experiment.conditions.memory == "ignore":
        return ()
    found = []
    for tier, participant in zip(experiment.tiers, cost.participants, strict=True):
        device = tier.simulated
        if device is None or participant.peak_bytes <= device.memory_mb * MEBIBYTE:
            continue
        needed = participant.peak_bytes / MEBIBYTE
        if experiment.conditions.memory == "refuse":
            with of_tier(tier.name):
                accepted = (
                    f"at least the {needed:.1f} that {experiment.algorithm.name} needs in a training step, by count"
                )
                refuse(
                    "device.memory_mb", device.memory_mb, f"{accepted} (or conditions.memory: 'exclude' or 'ignore')"
                )
        found.append(tier.name)
    if len(found) == len(experiment.tiers):
        accepted = f"another than 'exclude' for {experiment.algorithm.name}: no tier's device can hold what it needs"
        refuse("conditions.memory", experiment.conditions.memory, accepted)
    return tuple(found)


def _participant(task: Task, tier: Tier, count: int, begun: Call, call: Call) -> ParticipantCost:
    assert call.update is not None
    works, private = (*begun.work, *call.work), trees.nbytes(begun.state)
    return ParticipantCost(
        tier=tier.name,
        form=str(tier.form),
        count=count,
        small_params=trees.numel(task.fresh(tier.form, 0)),
        trainable={work.purpose: work.trainable for work in works if work.purpose != PRETRAIN},
        upload_params=trees.numel(call.update.tree),
        upload_bytes=trees.nbytes(call.update.tree),
        download_bytes=trees.nbytes(call.payload),
        private_bytes=private,
        flops_per_step={work.purpose: work.flops_per_step for work in works},
        peak_bytes=max((_peak(work, private) for work in works), default=0),
        begun_epochs=tuple((work.batch_size, work.epochs) for work in begun.work),
        round_epochs=tuple((work.batch_size, work.epochs) for work in call.work),
    )


def _peak(work: Work, state_bytes: int) -> int:
    """Memory of a training step, by count: private state; trained tensors, their gradients and the optimizer's moments;
    what autograd saves for the backward pass of one batch."""
    return state_bytes + (2 + work.moments) * work.trainable * BYTES + work.activation_bytes


def whole(number: float) -> int | float:
    """A mean that is a whole number as an int."""
    return int(number) if float(number).is_integer() else number
