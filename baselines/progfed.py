"""ProgFed: the target grows by random new blocks while it is trained (Wang et al., ICML 2022).

    stage s                  the first s of S parts of the target's blocks, and a head
    rounds of stage s        FedAvg of that model; for the first `warmup` rounds only its newest part and head train
    when s + 1 begins        the next part is added as it was initialised, the head discarded for a fresh one

The control for growth operators: the same schedule with new blocks that know nothing of the old ones.

Differs from the paper: transformers, of the target's width from the start; heads are the model's own kind; AdamW. The
last stage lasts until the run ends.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedsim.algorithm import (
    Averaging,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree
from fedsim.learning.exits import ends_at, shallower, tail, up_to
from fedsim.learning.server_opt import model_of
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class ProgFed(Averaging):
    """ProgFed of the target.

    - `stages`: parts that the target's blocks are divided into. - `stage_rounds`: rounds of each stage but the last.
    - `warmup`: rounds, at the beginning of each stage but the first, that train only what is new.
    """

    stages: int = 4
    stage_rounds: int = 2
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "stages", "stage_rounds", least=1)
        check_range(self, "algorithm", "warmup", least=0, most=self.stage_rounds)

    @property
    def name(self) -> str:
        return "progfed"

    @property
    def leaves(self) -> Leaves:
        return "sub-model"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return self.server.start(self._fresh(ctx, 0))

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model = model_of(self._current(state, ctx))
        return {client.id: model for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(self._current(state, ctx), updates)

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(self._form(ctx), model_of(state))

    def _current(self, state: State, ctx: ServerContext) -> Tree:
        """What the round starts from: the state, or, when a stage begins, the state with new blocks on top."""
        form, end = self._form(ctx), {*tail(ctx.task, ctx.target)}
        old = model_of(state)
        if old.keys() == ctx.task.specs(form).keys():
            return state
        new = self._fresh(ctx, self._stage(ctx))
        return self.server.start(new | {name: tensor for name, tensor in old.items() if name not in end})

    def _fresh(self, ctx: ServerContext, stage: int) -> Tree:
        """The model of a stage as it is initialised: all blocks of one target, a head for each stage."""
        whole = ctx.initial(ctx.target)
        head = ctx.initial(ctx.target, f"head {stage}") if stage else whole
        depth = ends_at(ctx.target.depth, self.stages)[stage]
        body = {name: whole[name] for name in sorted(up_to(ctx.task, ctx.target, depth))}
        return body | {name: head[name] for name in tail(ctx.task, ctx.target)}

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form, new = self._form(ctx), self._trained(ctx)
        fixed = {name: tensor for name, tensor in payload.items() if name not in new}
        start = {name: payload[name] for name in payload if name in new}
        trained = yield Training(TaskLoss(ctx.task, form), start, {"model": fixed}, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(self._form(ctx), payload)

    def _trained(self, ctx: ClientContext) -> set[str]:
        """Names of what this round trains."""
        form, stage = self._form(ctx), self._stage(ctx)
        everything = {*ctx.task.specs(form)}
        first_round = stage * self.stage_rounds + 1
        if not stage or ctx.round >= first_round + self.warmup:
            return everything
        return everything - up_to(ctx.task, ctx.target, ends_at(ctx.target.depth, self.stages)[stage - 1])

    def _stage(self, ctx: ServerContext | ClientContext) -> int:
        last = len(ends_at(ctx.target.depth, self.stages)) - 1
        return min(max(ctx.round - 1, 0) // self.stage_rounds, last)

    def _form(self, ctx: ServerContext | ClientContext) -> Form:
        return shallower(ctx.target, ends_at(ctx.target.depth, self.stages)[self._stage(ctx)])
