"""Fed-Grow: a large transformer grown together, without sharing models or data.

Shen et al., "Fed-Grow: Federating to Grow Transformers for Resource-Constrained Users without Model Sharing", arXiv
2406.13450; IEEE TPDS 2026. The operator is LiGO (`fedgrow_algo.ligo`), twice (`fedgrow_algo.dual_ligo`).

    participant i, once      train S_i on its own shard; freeze it
                             train Local_i through the task loss of M_i = Local_i(S_i); freeze M_i
    round r, participant i   receive Global; train it through the task loss of T_i = Global(M_i); send Global
    round r, server          Global <- sum_i n_i Global_i / sum_i n_i
    result                   T_i = Global(M_i), one for each participant

Only Global leaves a participant: not S_i, Local_i, M_i, T_i, nor data. The classifier is grown from S_i's, so nothing
else has to travel.

Differs from the paper: its text could not be read in full, so the staged procedure and the operator's matrices follow
the authors' released code, with three departures. The code uploads and averages M_i and a scratch target as well; here,
as the paper says, only Global is shared. The code draws a different Global for each participant; here all start from
the server's. The code trains the position embedding outside the operator; here it is grown like every embedding.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.dual_ligo import grown, grown_forward, operator_between
from fedgrow_algo.presets import by_name
from fedgrow_algo.pretrain import trained_on_own_shard
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
from fedsim.models import Form
from fedsim.seeding import generator
from fedsim.task import Task
from fedsim.training import local_train
from fedsim.tree import Tree, prefixed, under


MIDDLE, OWN = "middle.", "global."  # parts of a participant's private state: M_i, and Global where nobody averages it


@dataclasses.dataclass(frozen=True)
class FedGrow(Algorithm):
    """Staged Fed-Grow.

    - `preset`: how the operators are built; see `fedgrow_algo.presets`.
    - `lr`, `epochs`: of Global, in every round.
    - `local_lr`, `local_epochs`: of Local_i, once. - `small_lr`, `small_epochs`: of S_i, once.
    - `batch_size`, `weight_decay` (decoupled), `clip` (global gradient norm): of all three stages; AdamW.
    - `federate`: False trains the same operators and never averages: every participant keeps its own Global.
    """

    preset: str = "paper"
    lr: float = 5e-4
    epochs: int = 1
    local_lr: float = 5e-4
    local_epochs: int = 10
    small_lr: float = 5e-4
    small_epochs: int = 10
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 1.0
    federate: bool = True

    def __post_init__(self) -> None:
        check_types(self, "algorithm")
        by_name(self.preset)
        check_range(self, "algorithm", "lr", "local_lr", "small_lr", "weight_decay", least=0)
        check_range(self, "algorithm", "epochs", "batch_size", least=1)
        check_range(self, "algorithm", "local_epochs", "small_epochs", least=0)
        check_range(self, "algorithm", "clip", above=0)

    @property
    def name(self) -> str:
        return "fedgrow" if self.federate else "fedgrow_no_federation"

    @property
    def preset_name(self) -> str:
        return self.preset

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form, target: Form) -> None:
        operator_between(self.preset, task, intermediate, target)
        for form in forms:
            operator_between(self.preset, task, form, intermediate)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        return self._first_global(ctx) if self.federate else {}

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        return weighted_mean(updates, like=state)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Tree:
        small = trained_on_own_shard(
            ctx,
            lr=self.small_lr,
            epochs=self.small_epochs,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        local = operator_between(self.preset, ctx.task, ctx.info.form, ctx.intermediate)
        tensors = local_train(
            ctx,
            grown_forward(ctx.task, local, small, ctx.intermediate),
            {name: t.to(ctx.device) for name, t in local.init(ctx.generator("local")).items()},
            purpose="local",
            lr=self.local_lr,
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        state = prefixed(grown(local, tensors, small), MIDDLE)
        return state if self.federate else state | prefixed(self._first_global(ctx), OWN)

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> tuple[ClientUpdate, Tree]:
        operator = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        tensors = local_train(
            ctx,
            grown_forward(ctx.task, operator, under(state, MIDDLE), ctx.target),
            self._global(payload, state),
            purpose="global",
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        if self.federate:
            return ClientUpdate(ctx.info.id, tensors, ctx.info.num_examples), state
        return ClientUpdate(ctx.info.id, {}, ctx.info.num_examples), state | prefixed(tensors, OWN)

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        operator = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        return ctx.task.module(ctx.target, grown(operator, self._global(payload, state), under(state, MIDDLE)))

    def _first_global(self, ctx: ServerContext | ClientContext) -> Tree:
        """Global before round 1: one draw for the whole run, so a participant can make it without being sent it."""
        operator = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        return operator.init(generator(ctx.seed, "global"))

    def _global(self, payload: Payload, state: Tree) -> Tree:
        return dict(payload) if self.federate else under(state, OWN)


def fedgrow_no_federation(**fields) -> FedGrow:
    """Independent expansion: the same growth, never averaged, nothing sent."""
    return FedGrow(**fields, federate=False)
