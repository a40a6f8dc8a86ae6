"""What an experiment costs, counted from the tensors it would really train and send, before any data are loaded.

Every tier's participant is run for real, on an empty shard: it builds its trees, trains nothing, makes its update, as
in the last federated round: where models grow on the way, that is the largest.
"""

import dataclasses
from typing import Any

import torch

from fedsim import tree as trees
from fedsim.algorithm import ClientContext, ClientInfo, ServerContext
from fedsim.cohort import check_checkpoints, tiers_of
from fedsim.data.source import Split
from fedsim.experiment import Experiment, Tier
from fedsim.task import Task
from fedsim.training import PRETRAIN, Meter, StepCost, Work


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

    @property
    def trainable_params(self) -> int:
        return sum(self.trainable.values())


@dataclasses.dataclass(frozen=True)
class Cost:
    """Means are over the participants of the population."""

    target_params: int
    participants: list[ParticipantCost]

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
            "peak_bytes": max(cost.peak_bytes for cost in self.participants),
            "private_bytes": sum(cost.private_bytes * cost.count for cost in self.participants),
            "participants": participants,
        }


def cost_of(experiment: Experiment, counted: dict[tuple, StepCost]) -> Cost:
    """Count everything; takes as long as building the models, and their memory.

    `counted` receives the cost of a training step for every tier: participants that are handed it need not measure.

    **Raises:** `ValueError` for a checkpoint that is not what its tier says.
    """
    check_checkpoints(experiment)
    task = Task(experiment.task)
    tiers = tiers_of(experiment)
    target = trees.numel(task.fresh(experiment.target, 0))
    participants = [_participant(experiment, task, tier, tiers.count(tier), counted) for tier in experiment.tiers]
    return Cost(target, participants)


def _participant(
    experiment: Experiment, task: Task, tier: Tier, count: int, counted: dict[tuple, StepCost]
) -> ParticipantCost:
    algorithm, meter = experiment.algorithm, Meter.of(experiment.algorithm, counted)
    infos = [ClientInfo(id_, each.name, each.form, 0, each.checkpoint) for id_, each in enumerate(experiment.tiers)]
    info = infos[experiment.tiers.index(tier)]
    last = max((r for r in range(experiment.rounds + 1) if algorithm.stage(r) == "federated"), default=0)
    server = ServerContext(experiment.seed, last, task, experiment.intermediate, experiment.target, infos)
    client = ClientContext(
        seed=experiment.seed,
        round=last,
        task=task,
        intermediate=experiment.intermediate,
        target=experiment.target,
        info=info,
        train=Split({}, torch.zeros(0, dtype=torch.long)),
        device=torch.device("cpu"),
        meter=meter,
        precision=experiment.precision,
        forms=experiment.forms,
    )
    first = algorithm.server_init(dataclasses.replace(server, round=0))
    payload = algorithm.server_broadcast(first, [info], server)[info.id]
    state = algorithm.client_init(dataclasses.replace(client, round=0))
    update, _ = algorithm.client_update(payload, state, client)
    return ParticipantCost(
        tier=tier.name,
        form=str(tier.form),
        count=count,
        small_params=trees.numel(task.fresh(tier.form, 0)),
        trainable={work.purpose: work.trainable for work in meter.work if work.purpose != PRETRAIN},
        upload_params=trees.numel(update.tree),
        upload_bytes=trees.nbytes(update.tree),
        download_bytes=trees.nbytes(payload),
        private_bytes=trees.nbytes(state),
        flops_per_step={work.purpose: work.flops_per_step for work in meter.work},
        peak_bytes=max((_peak(work, trees.nbytes(state)) for work in meter.work), default=0),
    )


def _peak(work: Work, state_bytes: int) -> int:
    """Memory of a training step, by count: private state; trained tensors, their gradients and AdamW's two moments;
    what autograd saves for the backward pass of one batch."""
    return state_bytes + 4 * work.trainable * BYTES + work.activation_bytes


def whole(number: float) -> int | float:
    """A mean that is a whole number as an int."""
    return int(number) if float(number).is_integer() else number
