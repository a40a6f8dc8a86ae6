"""SCAFFOLD: local steps corrected for the drift of clients whose data differ.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1 with
option II. x: the server's model; c: its control variate, c_i: client i's; both are zero at first.

    client i    y <- x; K steps of y <- y - lr (g_i(y) - c_i + c)
                c_i+ <- c_i - c + (x - y) / (K lr); send y and c_i+ - c_i; keep c_i+
    server      x <- mean of y;  c <- c + (cohort / clients) mean of c_i+ - c_i; all of a cohort count alike

Differs from the paper: the server's learning rate is that of `server`, 1 with the plain mean. Who is left out (late)
has moved its c_i all the same: then c is not the mean of all c_i.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fedsim.algorithm import (
    LATER,
    Averaging,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    OptimizerName,
    Partial,
    Payload,
    ServerContext,
    State,
    Steps,
    TaskLoss,
    Training,
    whole_sum,
)
from fedsim.core.fields import refuse
from fedsim.learning.objectives import Corrected
from fedsim.learning.server_opt import model_of


PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": None, "schedule": "constant", "lr_warmup": 0}


CHANGE = "control_change"  # in an update; "control" is received, and pairs count what is sent from what was received


@dataclasses.dataclass(frozen=True)
class Scaffold(Averaging):
    """SCAFFOLD of the target. Plain SGD only, for c_i is computed from its steps."""

    lr: float = 0.1
    clip: float | None = None
    optimizer: OptimizerName = dataclasses.field(default="sgd", metadata=LATER, kw_only=True)

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
        model = ctx.initial(ctx.target)
        return {"model": self.server.start(model), "control": {n: torch.zeros_like(t) for n, t in model.items()}}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        sent = {"model": model_of(state["model"]), "control": state["control"]}
        return {client.id: sent for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        total = whole_sum(updates)
        if total is None:
            return state
        like = {"model": state["model"], CHANGE: state["control"]}
        mean, share = total.mean(like), total.weight / len(ctx.clients)
        control = {name: c + share * mean[CHANGE][name] for name, c in state["control"].items()}
        return {"model": self.server.step(state["model"], mean["model"]), "control": control}

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, model_of(state["model"]))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return {name: torch.zeros_like(tensor) for name, tensor in ctx.task.fresh(ctx.target, 0).items()}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        x, c = payload["model"], payload["control"]
        correction = {name: c[name] - own for name, own in state.items()}
        objective = Corrected(TaskLoss(ctx.task, ctx.target))
        trained = yield Training(objective, x, {"correction": correction}, purpose="target", **self.settings())
        y, moved = trained.parameters, trained.steps * self.lr
        kept = {n: own + ((x[n] - y[n]) / moved - c[n]) for n, own in state.items()} if moved else state
        change = {name: kept[name] - own for name, own in state.items()}
        return ClientUpdate(ctx.info.id, {"model": y, CHANGE: change}, 1), kept

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, payload["model"])
