"""Local training alone: every participant trains its own small model on its own shard, and nothing is shared.

    round r, participant k   S_k <- E epochs of local training from S_k

What anyone has without joining: the floor of every comparison.

Differs from the paper: a control, of no paper of its own.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, Partial, Payload, ServerContext
from fedsim.core.tree import Tree
from fedsim.learning.training import check_settings, local_train, settings


@dataclasses.dataclass(frozen=True)
class LocalOnly(Algorithm):
    """Every participant alone, from a fresh model or its tier's checkpoint.

    - `lr`, `epochs`, `batch_size`, `weight_decay`, `clip`: local training; see `fedsim.learning.training.settings`.
    """

    lr: float = 5e-4
    epochs: int = 1
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def name(self) -> str:
        return "local_only"

    def stage(self, round: int) -> str:
        return "local"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        return {}

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        return state

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Tree:
        return trained_on_own_shard(ctx, **{**settings(self), "epochs": 0})

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> tuple[ClientUpdate, Tree]:
        forward = lambda tree, batch: ctx.task.forward(ctx.info.form, tree, batch)  # noqa: E731
        trained = local_train(ctx, forward, state, purpose="small", **settings(self))
        return ClientUpdate(ctx.info.id, {}, ctx.info.num_examples), trained

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.info.form, state)
