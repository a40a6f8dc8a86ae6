"""SCAFFOLD: local steps corrected for the drift of clients whose data differ.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1 with
option II. x: the server's model; c: its control variate, c_i: client i's; both are zero at first.

    client i    y <- x; K steps of y <- y - lr (g_i(y) - c_i + c)
                c_i+ <- c_i - c + (x - y) / (K lr); send y and c_i+ - c_i; keep c_i+
    server      x <- mean of y;  c <- c + (cohort / clients) mean of c_i+ - c_i

All clients of a cohort count alike. Uploads and downloads are twice FedAvg's.

Differs from the paper: the server's learning rate is that of `server`, 1 with the plain mean. A client whose update is
left out (late, over-selected) has moved its c_i all the same, so c is then not the mean of all c_i.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsim.algorithm import (
    LATER,
    Batch,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Frozen,
    LocalTraining,
    OptimizerName,
    Partial,
    Payload,
    ServerContext,
    State,
    Steps,
    TaskLoss,
    Training,
    Tree,
    weighted_sum,
    whole_sum,
)
from fedsim.core.fields import refuse
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer, model_of


PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": None, "schedule": "constant", "lr_warmup": 0}


@dataclasses.dataclass(frozen=True)
class Scaffold(LocalTraining):
    """SCAFFOLD of the target. Plain SGD only, for c_i is computed from its steps.

    - `server`: what the server makes of the mean.
    """

    lr: float = 0.1
    clip: float | None = None
    optimizer: OptimizerName = dataclasses.field(default="sgd", metadata=LATER, kw_only=True)
    server: ServerOptimizer = AVERAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in PLAIN.items():
            if getattr(self, name) != value:
                refuse(f"algorithm.{name}", getattr(self, name), f"{value!r}: SCAFFOLD's local steps are plain SGD")

    @property
    def name(self) -> str:
        return "scaffold"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        model = ctx.task.fresh(ctx.target, ctx.derive("target"))
        control = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        return {"model": self.server.start(model), "control": control}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        sent = {"model": model_of(state["model"]), "control": state["control"]}
        return {client.id: sent for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        total = whole_sum(updates)
        if total is None:
            return state
        mean, share = total.mean(like=state), total.weight / len(ctx.clients)
        control = {name: c + share * mean["control"][name] for name, c in state["control"].items()}
        return {"model": self.server.step(state["model"], mean["model"]), "control": control}

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, model_of(state["model"]))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return {name: torch.zeros_like(tensor) for name, tensor in ctx.task.fresh(ctx.target, 0).items()}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        x, c = payload["model"], payload["control"]
        correction = {name: c[name] - own for name, own in state.items()}
        objective = CorrectedLoss(TaskLoss(ctx.task, ctx.target))
        trained = yield Training(objective, x, {"correction": correction}, purpose="target", **self.settings())
        y, moved = trained.parameters, trained.steps * self.lr
        kept = {n: own + ((x[n] - y[n]) / moved - c[n]) for n, own in state.items()} if moved else state
        sent = {name: kept[name] - own for name, own in state.items()}
        return ClientUpdate(ctx.info.id, {"model": y, "control": sent}, 1), kept

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, payload["model"])


@dataclasses.dataclass(frozen=True)
class CorrectedLoss:
    """The loss, with a gradient that is corrected; `frozen["correction"]`: c - c_i."""

    loss: TaskLoss

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        inner = [(frozen["correction"][name] * tensor).sum() for name, tensor in parameters.items()]
        correction = torch.stack(inner).sum()
        return self.loss(parameters, frozen, batch) + (correction - correction.detach())  # the value stays the loss
