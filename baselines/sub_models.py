"""What methods have in common whose clients train a part of the target that their device can hold.

HeteroFL, FedRolex, FjORD, Federated Dropout and the FedBRB-like reconstruction: the server holds the whole target,
sends everyone a part, and takes for each coordinate a mean over those who have it (`fedsim.learning.coverage`). Their
authors score the server's whole model (`accuracy_global`); a client deploys its part, which is all that it can hold.
"""

import dataclasses
from collections.abc import Sequence

from torch import nn

from fedsim.algorithm import ClientInfo, Leaves, LocalTraining, ServerContext
from fedsim.core.fields import refuse
from fedsim.core.tree import State, Tree
from fedsim.learning.coverage import covered_of, model_of, start
from fedsim.learning.rates import FITTING, Rates, check_rates, parameter_count, rate_of
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class SubModels(LocalTraining):
    """Sub-models of the target.

    - `rates`: the sub-models there are (`fedsim.learning.rates`): "fitting", the largest that a device can hold, at the
      granularity that whole heads allow; "powers_of_two", the papers' 1, 1/2, 1/4, 1/8, 1/16; or rates, largest first.
    - `server`: what the server makes of the mean.
    """

    rates: Rates = dataclasses.field(default=FITTING, kw_only=True)
    server: ServerOptimizer = dataclasses.field(default=AVERAGE, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self.rates)

    @property
    def leaves(self) -> Leaves:
        return "sub-model"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        for form in forms:
            whole = self.rate(task, form, target) == 1
            if whole and isinstance(self.rates, str) and parameter_count(task, target) > parameter_count(task, form):
                accepted = f"rates by which the target {target} can be cut: no sub-model is as small as {form}"
                refuse("algorithm.rates", self.rates, accepted)

    def rate(self, task: Task, form: Form, target: Form) -> float:
        """The rate of a participant whose own small model has this form."""
        return rate_of(task, target, form, self.rates)

    def server_init(self, ctx: ServerContext) -> State:
        return start(ctx.initial(ctx.target), self.server)

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, model_of(state))

    def server_covered(self, state: State) -> Tree | None:
        return covered_of(state)

    def rates_of(self, cohort: Sequence[ClientInfo], ctx: ServerContext) -> dict[int, float]:
        """Each client's rate, by id."""
        return {client.id: self.rate(ctx.task, client.form, ctx.target) for client in cohort}
