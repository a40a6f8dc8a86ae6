"""FedAvg: averaging of locally trained copies of the target (McMahan et al., AISTATS 2017, Algorithm 1).

    round r, participant k   theta_k <- E epochs of local training from theta
    round r, server          theta <- sum_k n_k theta_k / sum_k n_k, over the sampled participants

Differs from the paper: local training uses AdamW with gradient clipping, like every method here, instead of SGD; the
sum of n_k runs over the sampled participants (the paper's algorithm box prints it over all of them).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    weighted_mean,
    weighted_sum,
)
from fedsim.fields import check_range, check_types
from fedsim.training import local_train
from fedsim.tree import Tree


@dataclasses.dataclass(frozen=True)
class FedAvg(Algorithm):
    """FedAvg of the target form, from scratch.

    - `lr`, `weight_decay` (decoupled), `clip` (global gradient norm): AdamW, made anew in every round.
    - `epochs`: local epochs a round. - `batch_size`: examples a step.
    """

    lr: float = 5e-4
    epochs: int = 1
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self, "algorithm")
        check_range(self, "algorithm", "lr", "weight_decay", least=0)
        check_range(self, "algorithm", "epochs", "batch_size", least=1)
        check_range(self, "algorithm", "clip", above=0)

    @property
    def name(self) -> str:
        return "fedavg"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        return ctx.task.fresh(ctx.target, ctx.derive("target"))

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        return weighted_mean(updates, like=state)

    def server_model(self, state: Tree, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, state)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> tuple[ClientUpdate, Tree]:
        trained = local_train(
            ctx,
            lambda tree, batch: ctx.task.forward(ctx.target, tree, batch),
            payload,
            purpose="target",
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        return ClientUpdate(ctx.info.id, trained, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, payload)
