"""A participant's private state: what a method changes is kept, however it changes it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, Payload, ServerContext, State
from fedsim.core.tree import sha256
from fedsim.engine.cohort import members
from fedsim.engine.inbox import Inbox
from fedsim.engine.participant import Participant
from fedsim.experiment import Experiment
from fedsim.learning.meter import Meter
from fedsim.learning.steps import run_alone
from fedsim.learning.task import load_task
from fedsim.storage.checkpoint import private_of


@dataclasses.dataclass(frozen=True)
class Counts(Algorithm):
    """Counts its rounds in a nested state: in a new one, in the one it was given, or not at all."""

    how: str = "anew"

    @property
    def name(self) -> str:
        return "counts"

    def server_init(self, ctx: ServerContext) -> State:
        return {"w": torch.zeros(1)}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def server_aggregate(self, state: State, updates: Any, ctx: ServerContext) -> State:
        return state

    def client_init(self, ctx: ClientContext) -> State:
        return {"seen": {"rounds": torch.zeros(())}}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> tuple[ClientUpdate, State]:
        update, more = ClientUpdate(ctx.info.id, dict(payload), 1.0), state["seen"]["rounds"] + 1
        if self.how == "anew":
            return update, {"seen": {"rounds": more}}
        if self.how == "in place":
            state["seen"]["rounds"] = more
        return update, state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        raise NotImplementedError


def kept(tiny_experiment: Experiment, folder: Path, how: str) -> tuple[list[int], str]:
    """Versions on disk after two rounds, and the hash of what is held."""
    experiment = dataclasses.replace(tiny_experiment, algorithm=Counts(how), intermediate=None)
    member = members(experiment, load_task(experiment.task, None))[0]
    participant = Participant(experiment, member, None, str(folder), {}, Inbox())
    run_alone(participant.begin(0, {}))
    for round in (1, 2):
        reply = run_alone(participant.train(round, {"w": torch.zeros(1)}))
    found = private_of(str(folder), member.info.id).load(before=9)
    assert found is None or sha256(found[1]) == reply.state_sha256
    return private_of(str(folder), member.info.id).stored(), reply.state_sha256


def test_a_state_changed_in_place_is_kept_like_a_new_one(tiny_experiment: Experiment, tmp_path: Path) -> None:
    for folder in ("anew", "in place"):
        (tmp_path / folder).mkdir()
    anew = kept(tiny_experiment, tmp_path / "anew", "anew")
    in_place = kept(tiny_experiment, tmp_path / "in place", "in place")
    assert anew == in_place == ([1, 2], sha256({"seen": {"rounds": torch.tensor(2.0)}}))


def test_a_state_that_stays_is_not_written_again(tiny_experiment: Experiment, tmp_path: Path) -> None:
    assert kept(tiny_experiment, tmp_path, "not") == ([0], sha256({"seen": {"rounds": torch.tensor(0.0)}}))


def test_what_a_method_writes_into_its_data_nobody_sees_later(tiny_experiment: Experiment, tmp_path: Path) -> None:
    experiment = dataclasses.replace(tiny_experiment, algorithm=Counts("anew"), intermediate=None)
    task = load_task(experiment.task, None)
    assert task.dataset is not None
    participant = Participant(experiment, members(experiment, task)[0], None, str(tmp_path), {}, Inbox())
    ways: list[Callable[[torch.Tensor], object]] = [
        lambda tensor: tensor.zero_(),
        lambda tensor: tensor.data.fill_(1),
        lambda tensor: tensor.numpy().fill(2),
    ]
    shard = participant._context(0, Meter({})).train
    before = shard.labels.clone(), shard.inputs["pixel_values"].clone()
    for round, way in enumerate(ways, 1):
        context = participant._context(round, Meter({}))
        assert context.task.dataset is None, "the others' data and the test set are not a client's"
        for tensor, was in zip((context.train.labels, context.train.inputs["pixel_values"]), before, strict=True):
            assert torch.equal(tensor, was)
            way(tensor)
            assert not torch.equal(tensor, was)
    assert participant.task.dataset is task.dataset
