"""Analytic federated learning: one ridge regression from everyone's sums (AFL, He et al., CVPR 2025, arXiv 2405.16240).

    phi(x) = (f(x), 1)           f: features of a frozen model that is common to all; 1: for the bias
    participant k, once          G_k = sum_i phi(x_i)^T phi(x_i),  H_k = sum_i phi(x_i)^T onehot(y_i)
    server, when some arrive     W = (sum_k G_k + gamma I)^{-1} sum_k H_k

Sums know no order: W is that of all examples in one place, for any number of participants and however labels are dealt.
Everyone counts once: the server tells whom it has counted, and they send nothing. Who never takes part is missing from
W, and whose update is lost sends it again. With `random_features`, f is relu(V f' + b) of the model's features f', V
and b drawn once for all.

Differs from the paper: participants send their sums, not solutions of their own that are joined (its absolute
aggregation law, which gives the same W); gamma is counted once and stays, where the authors remove it after joining; a
bias, which gamma holds as well; `random_features`. Passes through the frozen model are no training, and are counted as
no FLOPs; both halves of the symmetric G are sent.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    Partial,
    Payload,
    ServerContext,
)
from fedsim.core.fields import check_range, check_types, refuse
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, to
from fedsim.learning.features import check_classes, feature_size, head
from fedsim.learning.rates import smallest
from fedsim.learning.ridge import linear, random_relu, ridge, sums_of
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class Analytic(Algorithm):
    """One ridge regression on features of a frozen model: public (`Experiment.start`), or drawn from the seed.

    - `of`: the model's form: the target's, the intermediate, or the smallest of the participants' own.
    - `gamma`: weight of W's squares. - `random_features`: how many; None: the model's own. - `batch_size`: of a pass.
    """

    of: Literal["target", "intermediate", "smallest"] = "target"
    gamma: float = 1e-2
    random_features: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_types(self, "algorithm")
        check_range(self, "algorithm", "gamma", above=0)
        check_range(self, "algorithm", "random_features", "batch_size", least=1)

    @property
    def name(self) -> str:
        return "analytic"

    @property
    def leaves(self) -> Leaves:
        return "statistics"

    @property
    def updates_vary(self) -> bool:
        return True  # who was counted sends nothing

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_classes(task)
        if self.of == "intermediate" and intermediate is None:
            refuse("intermediate", None, "a form, where algorithm.of='intermediate'")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        d = 1 + (self.random_features or feature_size(ctx.task, self._form(ctx)))
        classes = ctx.task.inputs.num_classes
        zero = {n: torch.zeros(d, size, dtype=torch.float64) for n, size in (("g", d), ("h", classes), ("w", classes))}
        return zero | {"counted": torch.zeros(len(ctx.clients), dtype=torch.bool)}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        w, counted = state["w"].float(), state["counted"]
        payloads = {known: {"w": w, "counted": torch.tensor(known)} for known in (False, True)}
        return {client.id: payloads[bool(counted[client.id])] for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        g, h, counted = (state[name].clone() for name in ("g", "h", "counted"))
        for update in updates:
            assert isinstance(update, ClientUpdate)
            if update.tree and not counted[update.client]:
                g += update.tree["g"]
                h += update.tree["h"]
                counted[update.client] = True
        return {"g": g, "h": h, "w": ridge(g, h, self.gamma), "counted": counted}

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(ctx.initial(self._form(ctx)), state["w"].float(), ctx)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return to(ctx.initial(self._form(ctx)), ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> tuple[ClientUpdate, State]:
        if payload["counted"]:
            return ClientUpdate(ctx.info.id, {}, 0), state
        random, size = self._random(ctx).to(ctx.device, torch.float64), len(payload["w"])
        g, h = sums_of(ctx.task, self._form(ctx), state, ctx.train, self.batch_size, ctx.device, size=size, then=random)
        # Sums, which the weight does not scale.
        return ClientUpdate(ctx.info.id, {"g": g, "h": h}, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._model(state, payload["w"], ctx)

    def _random(self, ctx: ServerContext | ClientContext) -> nn.Sequential:
        """The random features, the same everywhere; nothing, if there are none."""
        if self.random_features is None:
            return nn.Sequential()
        drawn = generator(ctx.seed, "random features")
        return random_relu(feature_size(ctx.task, self._form(ctx)), self.random_features, drawn)

    def _model(self, model: Tree, w: Tensor, ctx: ServerContext | ClientContext) -> nn.Module:
        """The frozen model with W for its head."""
        module, random = ctx.task.module(self._form(ctx), model), self._random(ctx).to(w)
        solved = linear(w[:-1].T.contiguous(), w[-1].clone())
        module.set_submodule(head(ctx.task, self._form(ctx)), nn.Sequential(*random, solved) if random else solved)
        return module.eval()

    def _form(self, ctx: ServerContext | ClientContext) -> Form:
        if self.of != "smallest":
            return ctx.target if self.of == "target" else ctx.intermediate
        return smallest(ctx.task, ctx.small_forms)
