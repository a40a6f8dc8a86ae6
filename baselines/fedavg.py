"""FedAvg: averaging of locally trained copies of one model (McMahan et al., AISTATS 2017, Algorithm 1).

    round r, participant k   theta_k <- E epochs of local training from theta
    round r, server          theta <- sum_k n_k theta_k / sum_k n_k, over the sampled participants

The model is the target; the controls that a growth method has to beat at equal bytes average smaller ones:
`fedavg_small` the smallest small form there is, `fedavg_mid` the intermediate form. `fedprox` adds the proximal term of
FedProx (Li et al., MLSys 2020) to the local objective. The server may do more with the mean than take it
(`fedsim.learning.server_opt`).

Differs from the paper: local training uses AdamW with gradient clipping by default (`optimizer`, `clip`), not SGD; the
sum of n_k runs over the sampled participants (the paper's algorithm box prints it over all of them). FedProx: nobody
is slow here, so no partial work is averaged.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import nn

from fedsim.algorithm import (
    Averaging,
    ClientContext,
    ClientUpdate,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import State
from fedsim.learning.objectives import Proximal
from fedsim.learning.rates import smallest
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


NAMES = {"target": "fedavg", "intermediate": "fedavg_mid", "smallest": "fedavg_small"}


@dataclasses.dataclass(frozen=True)
class FedAvg(Averaging):
    """FedAvg of one form, from scratch.

    - `of`: whose form: the target's, the intermediate, or the smallest of the participants' own.
    - `mu`: weight of FedProx's proximal term, for the target alone; None: no such term, and no such name.
    """

    of: Literal["target", "intermediate", "smallest"] = "target"
    mu: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "mu", least=0)
        if self.mu is not None and self.of != "target":
            refuse("algorithm.mu", self.mu, f"None where algorithm.of={self.of!r}")

    @property
    def name(self) -> str:
        return NAMES[self.of] if self.mu is None else "fedprox"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        if self.of == "intermediate" and intermediate is None:
            refuse("intermediate", None, "a form, where algorithm.of='intermediate'")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        form = self._form(ctx)
        return self.server.start(ctx.initial(form))

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(self._form(ctx), model_of(state))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form = self._form(ctx)
        loss = TaskLoss(ctx.task, form)
        objective = loss if self.mu is None else Proximal(loss, self.mu)
        frozen = {} if self.mu is None else {"anchor": payload}
        trained = yield Training(objective, payload, frozen, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(self._form(ctx), payload)

    def _form(self, ctx: ServerContext | ClientContext) -> Form:
        if self.of == "smallest":
            return smallest(ctx.task, ctx.small_forms)
        return ctx.target if self.of == "target" else ctx.intermediate


def fedavg_small(**fields) -> FedAvg:
    """FedAvg of the smallest form among the participants' own."""
    return FedAvg(**fields, of="smallest")


def fedavg_mid(**fields) -> FedAvg:
    """FedAvg of the intermediate form."""
    return FedAvg(**fields, of="intermediate")


def fedprox(mu: float = 0.01, **fields) -> FedAvg:
    """FedAvg of the target whose clients stay near what they received."""
    return FedAvg(**fields, mu=mu)
