"""Exclusive training: FedAvg of the target among those alone whose device can train it.

    round r, participant k   if able: theta_k <- E epochs of local training from theta; others take no part
    round r, server          theta <- sum_k n_k theta_k / sum_k n_k, over the able ones of the cohort

The control for every method that lets weak devices help: in DepthFL's tables (Kim et al., ICLR 2023) HeteroFL is below
it. Who is able is a matter of what the federation is like: whose small model has at least `share` of the target's
parameters. The others deploy what they have, their own small model, trained alone.

Differs from the paper: a control, of no paper of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import (
    Averaging,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
    weighted_sum,
)
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import State
from fedsim.learning.rates import parameter_count
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class Exclusive(Averaging):
    """FedAvg of the target without weak devices.

    - `share`: a participant is able if its small model has at least this share of the target's parameters.
    - `small_lr`, `small_epochs`: of the other participants' own models, once.
    """

    share: float = 1.0
    small_lr: float = 5e-4
    small_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "share", above=0, most=1)
        check_range(self, "algorithm", "small_lr", "small_epochs", least=0)

    @property
    def name(self) -> str:
        return "exclusive"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        if forms and not any(self._able(task, form, target) for form in forms):
            largest = max(parameter_count(task, form) for form in forms) / parameter_count(task, target)
            held = math.floor(largest * 1e4) / 1e4  # rounded up, it would be refused again
            accepted = f"at most {held}, the share of the target that the largest small form has, or nobody is able"
            refuse("algorithm.share", self.share, accepted)

    def _able(self, task: Task, form: Form, target: Form) -> bool:
        return parameter_count(task, form) >= self.share * parameter_count(task, target)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model, nothing = model_of(state), {}
        return {c.id: model if self._able(ctx.task, c.form, ctx.target) else nothing for c in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        able = [update for update in updates if update.tree]
        return weighted_sum(able) if able else None

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(state, (update for update in updates if update.tree))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State] | State:
        if self._able(ctx.task, ctx.info.form, ctx.target):
            return {}
        alone = self.settings(lr=self.small_lr, epochs=self.small_epochs)
        return trained_on_own_shard(ctx, **alone)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        if not payload:
            return ClientUpdate(ctx.info.id, {}, 0), state
        trained = yield Training(TaskLoss(ctx.task, ctx.target), payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        if payload:
            return ctx.task.module(ctx.target, payload)
        return ctx.task.module(ctx.info.form, state)
