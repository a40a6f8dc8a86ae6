"""FedNova: clients that take different numbers of steps, averaged without favouring those that take many.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
equation 6 and Appendix C. tau_i: the steps of client i; p_i: its share of the cohort's examples.

    client i    y <- x; tau_i steps of SGD with momentum rho; send d_i = (y - x) / |a_i| and |a_i|
                |a_i| = tau_i for rho = 0, else (tau_i - rho (1 - rho^tau_i) / (1 - rho)) / (1 - rho)
    server      x <- x + (sum_i p_i |a_i|) sum_i p_i d_i

With equal |a_i| that is FedAvg.

Differs from the paper: the server's learning rate and momentum are those of `server`, none by default; gradients
are clipped (`clip`).
"""

import dataclasses
from collections.abc import Iterable

import torch

from fedsim.algorithm import (
    LATER,
    Averaging,
    ClientContext,
    ClientUpdate,
    OptimizerName,
    Partial,
    Payload,
    ServerContext,
    State,
    Steps,
    TaskLoss,
    Training,
    weighted_mean,
)
from fedsim.core.fields import refuse
from fedsim.learning.server_opt import model_of


@dataclasses.dataclass(frozen=True)
class FedNova(Averaging):
    """FedNova of the target, with SGD whose learning rate is constant.

    - `server`: what the server makes of its step.
    """

    lr: float = 0.1
    optimizer: OptimizerName = dataclasses.field(default="sgd", metadata=LATER, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"optimizer": "sgd", "nesterov": False, "schedule": "constant", "lr_warmup": 0}.items():
            if getattr(self, name) != value:
                refuse(f"algorithm.{name}", getattr(self, name), f"{value!r}: the formula for |a_i| assumes it")
        if self.momentum == 1:
            refuse("algorithm.momentum", self.momentum, "below 1")

    @property
    def name(self) -> str:
        return "fednova"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        x = model_of(state)
        mean = weighted_mean(updates, like={})
        if not mean:
            return state
        return self.server.step(state, {name: x[name] + mean["norm"] * d for name, d in mean["change"].items()})

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        trained = yield Training(TaskLoss(ctx.task, ctx.target), payload, purpose="target", **self.settings())
        norm = self.norm(trained.steps)
        change = {name: (y - payload[name]) / (norm or 1.0) for name, y in trained.parameters.items()}
        sent = {"change": change, "norm": torch.tensor(norm)}
        return ClientUpdate(ctx.info.id, sent, ctx.info.num_examples), state

    def norm(self, steps: int) -> float:
        """`|a_i|` after so many steps: how often each gradient counts, added up."""
        rho = self.momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
