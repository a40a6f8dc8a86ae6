"""Fed-Grow with both operators trained together in every round.

Shen et al., arXiv 2406.13450; IEEE TPDS 2026: what can be read of the paper does not say whether Local and Global are
trained in two stages (`fedgrow_algo.fedgrow`, as the authors' code does) or jointly. This is the joint form:

    participant i, once      bring or train S_i; freeze it; draw Local_i
    round r, participant i   receive Global; train Local_i and Global through the task loss of
                             T_i = Global(Local_i(S_i)); keep Local_i; send Global
    round r, server          Global <- sum_i n_i Global_i / sum_i n_i
    result                   T_i, one for each participant
    optionally, afterwards   train T_i itself, each participant alone (`fedgrow_algo.rounds`)

Only Global leaves a participant, as in the staged form. A step costs more: M_i = Local_i(S_i) is grown in every one,
and its gradient is needed.

Differs from the paper: its text could not be read in full; see `fedgrow_algo.fedgrow`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fedgrow_algo.dual_ligo import GrownLoss, grown, of_rank, operator_between
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
    Leaves,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.canonical import written_as
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree, to
from fedsim.learning.objectives import Frozen, Objective
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.starts import load_small
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


SMALL, LOCAL = "small", "local"  # parts of a participant's private state: S_i, and Local_i
GLOBAL = "global"  # beside LOCAL in the tree that is trained
DRAWN = "drawn"  # of what is frozen: what of Global is never trained


@dataclasses.dataclass(frozen=True)
class FedGrowJoint(LocalTraining):
    """Joint Fed-Grow.

    - `preset`: how the operators are built; see `fedgrow_algo.presets`.
    - `lr`, `local_lr`: of Global and of Local_i, in every round. - `epochs`: of both. The other fields of
      `LocalTraining` are for all stages.
    - `small_lr`, `small_epochs`: of S_i, once.
    - `init`: whether the starts of S_i and Local_i are "independent" or "common": `fedgrow_algo.fedgrow`.
    - `finetune_after`: the round after which every participant trains its own T_i instead, and sends nothing; None:
      never. - `finetune_lr`, `finetune_epochs`: of T_i, in every such round.
    - `server`: what the server makes of the mean.
    - `checkpoint_growth`: keep nothing of the growth to the target for the backward pass but grow again: less memory,
      more time. What lies between S_i and M_i is kept.
    - `rank`: of what is trained of both operators' maps (`fedgrow_algo.low_rank`); None: whole maps. Fewer bytes; a
      step still multiplies the new M_i by Global's start, and costs what it does with whole maps.
    """

    preset: str = "paper"
    local_lr: float = 5e-4
    small_lr: float = 5e-4
    small_epochs: int = 10
    init: Init = dataclasses.field(default="independent", metadata=written_as("draw", independent="own"))
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
        check_range(self, "algorithm", "finetune_epochs", "rank", least=1)
        check_range(self, "algorithm", "small_epochs", "finetune_after", least=0)

    @property
    def name(self) -> str:
        return "fedgrow_joint" if self.rank is None else "fedgrow_joint_lowrank"

    @property
    def leaves(self) -> Leaves:
        return "operator"

    @property
    def preset_name(self) -> str:
        return self.preset

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_init(self.init, forms, check_growth(self.preset, task, forms, intermediate, target))

    def stage(self, round: int) -> str:
        return stage_of(round, self.finetune_after)

    def objective(self, ctx: ClientContext) -> Objective | None:
        """What both operators minimise, of the grown model; None: the task's loss."""
        return None

    def received(self, payload: Payload) -> tuple[Payload, Frozen]:
        """Global, and what comes with it for the objective."""
        return payload, {}

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return server_state(first_global(self.preset, ctx, self.rank), self.server, self.finetune_after, ctx)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return payloads(state, cohort, self.stage(ctx.round))

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return combined(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return aggregated(state, updates, self.server, self.stage(ctx.round))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        local = of_rank(self.rank, self.preset, ctx.task, ctx.info.form, ctx.intermediate)
        tensors = to(local.init(local_stream(self.init, ctx)), ctx.device)
        if self._as_brought(ctx):
            return {LOCAL: tensors}
        settings = self.settings(lr=self.small_lr, epochs=self.small_epochs)
        small = yield from trained_on_own_shard(ctx, init=self.init, **settings)
        prepared = local.prepared(local.stack(small), local.drawn(local_stream(self.init, ctx)))
        return {LOCAL: tensors, SMALL: as_stored(prepared)}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        if self.stage(ctx.round) == FINETUNE:
            settings = self.settings(lr=self.finetune_lr, epochs=self.finetune_epochs)
            return (yield from fine_tuned(ctx, self._target(payload, state, ctx), **settings))
        shared, frozen = self.received(payload)
        forms = ctx.intermediate, ctx.target
        growth = GrownLoss(ctx.task, self.preset, *forms, self.checkpoint_growth, self.rank, self.objective(ctx))
        drawn = of_rank(self.rank, self.preset, ctx.task, *forms).drawn(global_stream(ctx))
        trained = yield Training(
            JointLoss(growth, ctx.info.form),
            {LOCAL: state[LOCAL], GLOBAL: shared},
            {"small": self._small(state, ctx), DRAWN: to(drawn, ctx.device), **frozen},
            purpose="joint",
            lr_of={LOCAL: self.local_lr},
            **self.settings(),
        )
        update = ClientUpdate(ctx.info.id, trained.parameters[GLOBAL], ctx.info.num_examples)
        return update, state | {LOCAL: trained.parameters[LOCAL]}

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, self._target(payload, state, ctx))

    def _target(self, payload: Payload, state: State, ctx: ClientContext) -> Tree:
        """T_i: as it was fine-tuned, or else Global(Local_i(S_i))."""
        target = own_target(state)
        if target is not None:
            return target
        local = of_rank(self.rank, self.preset, ctx.task, ctx.info.form, ctx.intermediate)
        shared = of_rank(self.rank, self.preset, ctx.task, ctx.intermediate, ctx.target)
        stacked = shared.stack(local.grow(state[LOCAL], self._small(state, ctx)))
        prepared = shared.prepared(stacked, shared.drawn(global_stream(ctx)))
        return grown(shared, self.received(payload)[0], prepared)

    def _small(self, state: State, ctx: ClientContext) -> Tree:
        """S_i, prepared as Local_i takes it."""
        checkpoint = ctx.info.checkpoint
        if checkpoint is None or not self._as_brought(ctx):
            return state[SMALL]
        local = operator_between(self.preset, ctx.task, ctx.info.form, ctx.intermediate)
        return local.stack(to(load_small(ctx.task, ctx.info.form, checkpoint, ctx.seed), ctx.device))

    def _as_brought(self, ctx: ClientContext) -> bool:
        """Whether S_i is kept as a checkpoint has it: all who start from it share what a host has read once."""
        return ctx.info.checkpoint is not None and not self.small_epochs and self.rank is None


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The task's loss of T = Global(Local(S)); trained are both operators' tensors, under `LOCAL` and `GLOBAL`.

    - `growth`: from M to T. - `form`: of S.
    - `frozen["small"]`: S, prepared as Local takes it. - `frozen["drawn"]`: what of Global is never trained. The rest
      is what `growth` reads.
    """

    growth: GrownLoss
    form: Form

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        task, preset, middle = self.growth.task, self.growth.preset, self.growth.small
        local = of_rank(self.growth.rank, preset, task, self.form, middle)
        shared = of_rank(self.growth.rank, preset, task, middle, self.growth.large)
        stacked = shared.stack(local.grow(parameters[LOCAL], frozen["small"]))
        small = shared.prepared(stacked, frozen[DRAWN])
        return self.growth(parameters[GLOBAL], {**frozen, "small": small}, batch)
