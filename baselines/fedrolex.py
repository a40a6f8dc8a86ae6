"""FedRolex: a window over each axis that rolls on with every round (Alam et al., NeurIPS 2022).

    round t, participant k   keeps coordinates j, j+1, ..., j + ceil(r_k D) - 1 (mod D) of each axis, j = step (t - 1)
    round t, server          each coordinate: the plain mean over those who have it; nobody: as it was

All axes roll together and all participants begin at the same j; the window rolls inside every head, so a local head
is a part of one global head. In and out axes in lock step never train a weight whose coordinates lie further apart than
the window is wide: (2k - 1) / D of a D x D matrix for a window of k (`coverage` in the results).

Differs from the paper: ceil instead of floor, as in the authors' code; that code rolls the other way (`step=-1`), and
rolls the flattened axis of all heads, which mixes them; its transformer server drops the mean (since November 2022).
AdamW. A participant deploys its window; the whole model's score is `accuracy_global`. Rotary families roll over heads
of keys and values (`fedsim.learning.rates`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from baselines.sub_models import SubModels
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.fields import refuse
from fedsim.core.submodel import Cut
from fedsim.core.tree import State
from fedsim.learning.coverage import averaged, model_of
from fedsim.learning.rates import cut_at, cut_axes, sub_form
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class FedRolex(SubModels):
    """FedRolex of the target.

    - `step`: coordinates that windows move on by in a round; negative rolls the other way.
    - `by_examples`: weight the mean by examples.
    """

    step: int = 1
    by_examples: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step:
            refuse("algorithm.step", self.step, "a whole number other than 0 (HeteroFL's windows stay)")

    @property
    def name(self) -> str:
        return "fedrolex"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        rates = self.rates_of(cohort, ctx)
        model = model_of(state)
        parts = {rate: self._cut(ctx, rate).extract(model) for rate in {*rates.values()}}
        return {id_: parts[rate] for id_, rate in rates.items()}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        rates = self.rates_of(ctx.clients, ctx)
        cuts = {rate: self._cut(ctx, rate) for rate in {*rates.values()}}
        return averaged(state, updates, ctx.task, ctx.target, self.server, lambda client: cuts[rates[client]])[0]

    def _cut(self, ctx: ServerContext, rate: float) -> Cut:
        moved = self.step * max(ctx.round - 1, 0)  # round 0 only shows where round 1 will begin
        first = {axis: moved % ctx.target.axes[axis] for axis in cut_axes(ctx.task.specs(ctx.target))}
        return cut_at(ctx.task, ctx.target, rate, first)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form = self._form(ctx)
        trained = yield Training(TaskLoss(ctx.task, form), payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples if self.by_examples else 1), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(self._form(ctx), payload)

    def _form(self, ctx: ClientContext) -> Form:
        return sub_form(ctx.task, ctx.target, self.rate(ctx.task, ctx.info.form, ctx.target))
