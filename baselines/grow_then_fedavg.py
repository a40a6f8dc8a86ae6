"""Grow once, then FedAvg: a small model is averaged for some rounds, grown on the server, and averaged on as target.

    rounds 1 to g            FedAvg of the smallest form there is
    before round g + 1       the server grows it into the target with an untrained growth operator
    rounds after             FedAvg of the target

The control for trained growth: any preset of `fedgrow_algo` (Net2Net, stacking, bert2BERT's AKI, HyperCloning, LiGO's
start, ...) used as its authors use it, once, in the middle of training. What `progfed` does with random new blocks.

Differs from the paper: a control, of no paper of its own; width and depth grow in one step.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fedgrow_algo.dual_ligo import grown, operator_between
from fedgrow_algo.presets import by_name
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
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree
from fedsim.learning.rates import smallest
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class GrowThenFedAvg(Averaging):
    """FedAvg of the smallest form, then of the target grown from it.

    - `preset`: the growth operator; see `fedgrow_algo.presets`.
    - `small_rounds`: how many rounds the small model is averaged for.
    """

    preset: str = "preserving"
    small_rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.preset)
        check_range(self, "algorithm", "small_rounds", least=1)

    @property
    def name(self) -> str:
        return "grow_then_fedavg"

    @property
    def preset_name(self) -> str:
        return self.preset

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        if forms:
            operator_between(self.preset, task, smallest(task, forms), target)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return self.server.start(ctx.initial(_smallest(ctx)))

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model = model_of(self._current(state, ctx))
        return {client.id: model for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(self._current(state, ctx), updates)

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(self._form(ctx), model_of(state))

    def _current(self, state: State, ctx: ServerContext) -> Tree:
        """What the round starts from: the state, grown when the first round of the target begins."""
        sizes = {name: parameter.shape for name, parameter in ctx.task.skeleton(self._form(ctx)).named_parameters()}
        small = model_of(state)
        if {name: tensor.shape for name, tensor in small.items()} == sizes:
            return state
        operator = operator_between(self.preset, ctx.task, _smallest(ctx), ctx.target)
        return self.server.start(grown(operator, operator.init(ctx.generator("operator")), operator.stack(small)))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form = self._form(ctx)
        trained = yield Training(TaskLoss(ctx.task, form), payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(self._form(ctx), payload)

    def _form(self, ctx: ServerContext | ClientContext) -> Form:
        return ctx.target if ctx.round > self.small_rounds else _smallest(ctx)


def _smallest(ctx: ServerContext | ClientContext) -> Form:
    return smallest(ctx.task, ctx.small_forms)
