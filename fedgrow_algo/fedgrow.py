"""Fed-Grow: a large transformer grown together, without sharing models or data.

Shen et al., "Fed-Grow: Federating to Grow Transformers for Resource-Constrained Users without Model Sharing", arXiv
2406.13450; IEEE TPDS 2026. The operator is LiGO (`fedgrow_algo.ligo`), twice (`fedgrow_algo.dual_ligo`).

    participant i, once      train S_i on its own shard; freeze it
                             train Local_i through the task loss of M_i = Local_i(S_i); freeze M_i
    round r, participant i   receive Global; train it through the task loss of T_i = Global(M_i); send Global
    round r, server          Global <- sum_i n_i Global_i / sum_i n_i
    result                   T_i = Global(M_i), one for each participant
    optionally, afterwards   train T_i itself, each participant alone (`fedgrow_algo.rounds`)

Only Global leaves a participant: not S_i, Local_i, M_i, T_i, nor data. The classifier is grown from S_i's, so nothing
else has to travel.

Differs from the paper: its text could not be read in full, so the staged procedure and the operator's matrices follow
the authors' released code, with three departures. The code uploads and averages M_i and a scratch target as well; here,
as the paper says, only Global is shared. The code draws a different Global for each participant; here all start from
the server's. The code trains the position embedding outside the operator; here it is grown like every embedding.
Dropout is off unless `task.dropout` says otherwise, also where Hugging Face's default has it on (BERT). What reads a
pooler (a classifier of BERT's) reads it by the map that the pooler is written with, an axis of its own.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fedgrow_algo.dual_ligo import GrownLoss, grown, of_rank
from fedgrow_algo.presets import by_name
from fedgrow_algo.pretrain import Init, check_init, trained_on_own_shard
from fedgrow_algo.rounds import (
    FINETUNE,
    aggregated,
    as_stored,
    check_growth,
    combined,
    fine_tuned,
    first_global,
    global_stream,
    local_stream,
    own_target,
    payloads,
    server_state,
    stage_of,
)
from fedsim.algorithm import (
    LATER,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Frozen,
    Leaves,
    LocalTraining,
    Objective,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.canonical import written_as
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import State, Tree, to
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.task import Task
from fedsim.models import Form


MIDDLE, GLOBAL = "middle", "global"  # parts of a participant's private state: M_i, and what of Global is its own


# S_i as Local_i grows it, what Local_i minimises of M_i (None: the task's loss), and what that reads.
Begun = tuple[Tree, Objective | None, Frozen]


def as_it_is(small: Tree, ctx: ClientContext) -> Begun:
    """S_i, and the task's loss of M_i."""
    return small, None, {}


def intermediate_model(
    ctx: ClientContext,
    preset: str,
    init: Init,
    *,
    small_lr: float,
    small_epochs: int,
    local_lr: float,
    local_epochs: int,
    checkpoint_growth: bool,
    rank: int | None = None,
    begun: Callable[[Tree, ClientContext], Begun] = as_it_is,
    **settings: Any,
) -> Steps[tuple[Tree, State]]:
    """M_i = Local_i(S_i): S_i is brought along or trained, and frozen; then Local_i is trained through M_i's task loss.

    - `init`: whose the random starts of S_i and Local_i are. - `rank`: of both operators' maps; None: full ones.
    - `settings`: of `Training`, for both.

    **Returns:** S_i, and M_i, prepared as Global takes it.
    """
    small = yield from trained_on_own_shard(ctx, init=init, **settings | {"lr": small_lr, "epochs": small_epochs})
    small, objective, frozen = begun(small, ctx)
    local = of_rank(rank, preset, ctx.task, ctx.info.form, ctx.intermediate)
    prepared = local.prepared(local.stack(small), local.drawn(local_stream(init, ctx)))
    trained = yield Training(
        GrownLoss(ctx.task, preset, ctx.info.form, ctx.intermediate, checkpoint_growth, rank, objective),
        to(local.init(local_stream(init, ctx)), ctx.device),
        {"small": prepared, **frozen},
        purpose="local",
        **settings | {"lr": local_lr, "epochs": local_epochs},
    )
    shared = of_rank(rank, preset, ctx.task, ctx.intermediate, ctx.target)
    stacked = shared.stack(grown(local, trained.parameters, prepared))
    middle = shared.prepared(stacked, shared.drawn(global_stream(ctx)))
    return small, as_stored(middle)


@dataclasses.dataclass(frozen=True)
class FedGrow(LocalTraining):
    """Staged Fed-Grow.

    - `preset`: how the operators are built; see `fedgrow_algo.presets`.
    - `lr`, `epochs`: of Global, in every round; the other fields of `LocalTraining` are for all stages.
    - `local_lr`, `local_epochs`: of Local_i, once. - `small_lr`, `small_epochs`: of S_i, once.
    - `init`: "independent": every participant draws the start of S_i and of Local_i for itself, as the paper's code
      does; or "common": equal forms start equal, smaller ones as corners of one model (`fedgrow_algo.pretrain`).
    - `federate`: False trains the same operators and never averages: every participant keeps its own Global.
    - `finetune_after`: the round after which every participant trains its own T_i instead, and sends nothing; None:
      never. - `finetune_lr`, `finetune_epochs`: of T_i, in every such round.
    - `server`: what the server makes of the mean.
    - `checkpoint_growth`: keep nothing of the growth for the backward pass but grow again: less memory, more time.
    - `rank`: of what is trained of a map, the project's own form (`fedgrow_algo.low_rank`); None: whole maps.
    """

    preset: str = "paper"
    local_lr: float = 5e-4
    local_epochs: int = 10
    small_lr: float = 5e-4
    small_epochs: int = 10
    init: Init = dataclasses.field(default="independent", metadata=written_as("draw", independent="own"))
    federate: bool = True
    finetune_after: int | None = None
    finetune_lr: float = 5e-4
    finetune_epochs: int = 1
    server: ServerOptimizer = AVERAGE
    checkpoint_growth: bool = False
    rank: int | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.preset)
        check_range(self, "algorithm", "local_lr", "small_lr", "finetune_lr", least=0)
        check_range(self, "algorithm", "finetune_epochs", least=1)
        check_range(self, "algorithm", "rank", least=1)
        check_range(self, "algorithm", "local_epochs", "small_epochs", "finetune_after", least=0)
        if not self.federate and self.server.kind != "average":
            refuse("algorithm.server.kind", self.server.kind, "'average' where algorithm.federate=False")

    @property
    def name(self) -> str:
        low_rank = "" if self.rank is None else "_lowrank"
        return f"fedgrow{'' if self.federate else '_no_federation'}{low_rank}"

    @property
    def leaves(self) -> Leaves:
        return "operator" if self.federate else "nothing"

    @property
    def preset_name(self) -> str:
        return self.preset

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_init(self.init, forms, check_growth(self.preset, task, forms, intermediate, target))

    def stage(self, round: int) -> str:
        return stage_of(round, self.finetune_after)

    def begun(self, small: Tree, ctx: ClientContext) -> Begun:
        """What is made of S_i before Local_i is trained."""
        return as_it_is(small, ctx)

    def split(self, operator: Tree, ctx: ServerContext | ClientContext) -> tuple[Tree, Tree]:
        """What of Global is averaged, and what of it each participant keeps for itself."""
        return (operator, {}) if self.federate else ({}, operator)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        shared, _ = self.split(first_global(self.preset, ctx, self.rank), ctx)
        return server_state(shared, self.server, self.finetune_after, ctx) if shared else {}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return payloads(state, cohort, self.stage(ctx.round))

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return combined(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return aggregated(state, updates, self.server, self.stage(ctx.round))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        small, middle = yield from intermediate_model(
            ctx,
            self.preset,
            self.init,
            small_lr=self.small_lr,
            small_epochs=self.small_epochs,
            local_lr=self.local_lr,
            local_epochs=self.local_epochs,
            checkpoint_growth=self.checkpoint_growth,
            rank=self.rank,
            begun=self.begun,
            **self.settings(),
        )
        _, own = self.split(first_global(self.preset, ctx, self.rank), ctx)
        state = {MIDDLE: middle, **self._kept(small, ctx)}
        return state | ({GLOBAL: to(own, ctx.device)} if own else {})

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        if self.stage(ctx.round) == FINETUNE:
            settings = self.settings(lr=self.finetune_lr, epochs=self.finetune_epochs)
            return (yield from fine_tuned(ctx, self._target(payload, state, ctx), **settings))
        trained = yield Training(
            GrownLoss(ctx.task, self.preset, ctx.intermediate, ctx.target, self.checkpoint_growth, self.rank),
            self._global(payload, state),
            self._frozen(payload, state),
            purpose="global",
            **self.settings(),
        )
        shared, own = self.split(trained.parameters, ctx)
        return ClientUpdate(ctx.info.id, shared, ctx.info.num_examples), state | ({GLOBAL: own} if own else {})

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, self._target(payload, state, ctx))

    def _kept(self, small: Tree, ctx: ClientContext) -> State:
        """What stays with M_i: nothing of S_i, once it is grown."""
        return {}

    def _global(self, payload: Payload, state: State) -> Tree:
        return {**payload, **state.get(GLOBAL, {})}

    def _frozen(self, payload: Payload, state: State) -> Frozen:
        """What Global is trained beside."""
        return {"small": state[MIDDLE]}

    def _target(self, payload: Payload, state: State, ctx: ClientContext) -> Tree:
        """T_i: as it was fine-tuned, or else Global(M_i)."""
        shared = of_rank(self.rank, self.preset, ctx.task, ctx.intermediate, ctx.target)
        return own_target(state) or grown(shared, self._global(payload, state), state[MIDDLE])


def fedgrow_no_federation(**fields) -> FedGrow:
    """Independent expansion: the same growth, never averaged, nothing sent."""
    return FedGrow(**fields, federate=False)
