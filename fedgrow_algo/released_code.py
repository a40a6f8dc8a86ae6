"""What the authors' released code computes: everything is uploaded and averaged, not Global alone.

The code of Shen et al., "Fed-Grow" (IEEE TPDS 2026), sends a participant's whole wrapper in every round: its
intermediate model M_i, a copy of the target, and the operator. The paper says that only Global-LiGO is shared, and that
is what `fedgrow_algo.fedgrow` does. This is a control, under a name that says whose behaviour it is.

    participant i, once      train S_i, then Local_i, on its own shard; M_i = Local_i(S_i); draw a Global_i and a target
                             of its own; drop S_i and Local_i
    round 1, participant i   train nothing; send M_i, the target and Global_i
    round r, participant i   receive M, target and Global; train Global through the task loss of T = Global(M), with M
                             frozen; send M, the grown target and Global
    round r, server          the mean of each, weighted by examples
    result                   T = Global(M): one model, the server's

After round 1 everyone holds the same averaged M: nothing of its own is left to a participant. An upload is M, target
and operator together, 1.85 times FedAvg's of the target on the released sizes. The copy of the target that travels has
no effect on what is computed: T is grown anew from M and Global wherever it is used.

Differs from the code: it makes M_i and sends it in one round, here these are round 0 and round 1; position embeddings
(vision) and the second normalisation of a block (language) are trained in its target, outside the operator, here they
are grown like all else; its language models grow both feed-forward layers from the value projection, here each grows
from its own; its image shards are drawn again in every round, here once. A participant that first takes part later than
round 1 trains what the server sends, and its own M_i is never used: in the code everyone takes part in every round.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.dual_ligo import GrownLoss, grown, operator_between
from fedgrow_algo.fedgrow import intermediate_model
from fedgrow_algo.presets import by_name
from fedgrow_algo.rounds import as_stored, check_growth
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
    weighted_mean,
    weighted_sum,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree, clone, to
from fedsim.learning.task import Task
from fedsim.models import Form


MIDDLE, TARGET, GLOBAL = "middle", "target", "global"  # parts of the wrapper that travels


@dataclasses.dataclass(frozen=True)
class FedGrowReleasedCode(LocalTraining):
    """Fed-Grow as the authors' code runs it: intermediate model, target and operator are averaged.

    - `preset`: how the operators are built; see `fedgrow_algo.presets`.
    - `lr`, `epochs`: of Global, in every round but the first; the other fields of `LocalTraining` are for all stages.
    - `local_lr`, `local_epochs`: of Local_i, once. - `small_lr`, `small_epochs`: of S_i, once.
    - `checkpoint_growth`: keep nothing of the growth for the backward pass but grow again: less memory, more time.
    """

    preset: str = "paper"
    local_lr: float = 5e-4
    local_epochs: int = 10
    small_lr: float = 5e-4
    small_epochs: int = 10
    checkpoint_growth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.preset)
        check_range(self, "algorithm", "local_lr", "small_lr", "local_epochs", "small_epochs", least=0)

    @property
    def name(self) -> str:
        return "fedgrow_released_code"

    @property
    def preset_name(self) -> str:
        return self.preset

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_growth(self.preset, task, forms, intermediate, target)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return {}  # nothing is there to send before the first mean

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return weighted_mean(updates, like=state)  # which is empty in the first round: whatever comes is float32

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(state, ctx) if state else None

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        _, middle = yield from intermediate_model(
            ctx,
            self.preset,
            "independent",
            small_lr=self.small_lr,
            small_epochs=self.small_epochs,
            local_lr=self.local_lr,
            local_epochs=self.local_epochs,
            checkpoint_growth=self.checkpoint_growth,
            **self.settings(),
        )
        shared = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        scratch = ctx.task.fresh(ctx.target, ctx.derive("target"))
        return to(_wrapper(middle, scratch, shared.init(ctx.generator("global"))), ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        """Nothing is kept: from its first update on, all a participant holds is what the server sends."""
        received = payload or state  # nothing comes in the first round: what this participant made alone
        shared = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        middle = received[MIDDLE]
        trained = yield Training(
            GrownLoss(ctx.task, self.preset, ctx.intermediate, ctx.target, self.checkpoint_growth),
            received[GLOBAL],
            {"small": middle},
            purpose="global",
            **self.settings(epochs=self.epochs if payload else 0),
        )
        target = grown(shared, trained.parameters, middle) if payload else received[TARGET]
        wrapper = clone(_wrapper(middle, as_stored(target), trained.parameters))
        return ClientUpdate(ctx.info.id, wrapper, ctx.info.num_examples), {}

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._model(payload or state, ctx)

    def _model(self, wrapper: Payload, ctx: ServerContext | ClientContext) -> nn.Module:
        """T = Global(M) of a wrapper; its copy of the target is not looked at."""
        shared = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target)
        return ctx.task.module(ctx.target, grown(shared, wrapper[GLOBAL], wrapper[MIDDLE]))


def _wrapper(middle: Tree, target: Tree, operator: Tree) -> State:
    """What travels: M, the copy of the target, and Global."""
    return {MIDDLE: middle, TARGET: target, GLOBAL: operator}
