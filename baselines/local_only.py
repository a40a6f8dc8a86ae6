"""Local training alone: every participant trains its own small model on its own shard, and nothing is shared.

    round r, participant k   S_k <- E epochs of local training from S_k

What anyone has without joining: the floor of every comparison.

Differs from the paper: a control, of no paper of its own.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.tree import State


@dataclasses.dataclass(frozen=True)
class LocalOnly(LocalTraining):
    """Every participant alone, from a fresh model or its tier's checkpoint."""

    @property
    def name(self) -> str:
        return "local_only"

    @property
    def leaves(self) -> Leaves:
        return "nothing"

    def stage(self, round: int) -> str:
        return "local"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return {}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return state

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        return trained_on_own_shard(ctx, **self.settings(epochs=0))

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        trained = yield Training(TaskLoss(ctx.task, ctx.info.form), state, purpose="small", **self.settings())
        return ClientUpdate(ctx.info.id, {}, ctx.info.num_examples), trained.parameters

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.info.form, state)
