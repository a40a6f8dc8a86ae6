"""An ensemble of small models: several FedAvg runs of the smallest form at once, whose predictions are averaged.

    round r, participant k   theta_mk <- E epochs of local training from theta_m, for each member m
    round r, server          theta_m <- sum_k n_k theta_mk / sum_k n_k
    prediction               the mean of the members' probabilities

As many members as the target's parameters would pay for, so a round costs the bytes of FedAvg of the target. Such
ensembles have beaten partial training (Cheng et al. 2022, "Does Federated Dropout actually work?").

Differs from the paper: the smallest form among the participants instead of independently cut sub-models; all members
are trained by everyone in every round.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from fedsim.algorithm import (
    Averaging,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State
from fedsim.learning.ensemble import Ensemble
from fedsim.learning.rates import parameter_count, smallest
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class EnsembleSmall(Averaging):
    """FedAvg of several models of the smallest form.

    - `members`: how many; None: as many as fit into the target's parameters.
    """

    members: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "members", least=1)

    @property
    def name(self) -> str:
        return "ensemble_small"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        form, state = _form(ctx), {}
        for member in range(self._members(ctx.task, form, ctx.target)):
            state[str(member)] = ctx.initial(form, f"member {member}")
        return self.server.start(state)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        members = model_of(state)
        return {client.id: members for client in cohort}

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._ensemble(model_of(state), ctx)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form, models = _form(ctx), {}
        for member in range(self._members(ctx.task, form, ctx.target)):
            start = payload[str(member)]
            trained = yield Training(TaskLoss(ctx.task, form), start, purpose=f"member {member}", **self.settings())
            models[str(member)] = trained.parameters
        return ClientUpdate(ctx.info.id, models, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._ensemble(payload, ctx)

    def _members(self, task: Task, form: Form, target: Form) -> int:
        return self.members or max(1, parameter_count(task, target) // parameter_count(task, form))

    def _ensemble(self, payload: Payload, ctx: ServerContext | ClientContext) -> nn.Module:
        form = _form(ctx)
        members = range(self._members(ctx.task, form, ctx.target))
        return Ensemble([ctx.task.module(form, payload[str(member)]) for member in members]).eval()


def _form(ctx: ServerContext | ClientContext) -> Form:
    return smallest(ctx.task, ctx.small_forms)
