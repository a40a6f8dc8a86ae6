"""FedBRB-like: small models roll over all blocks of a large one, and what they learn is broadcast to the others.

A reconstruction. FedBRB (arXiv 2402.17202, IEEE TMC) cuts the weights of the global model into blocks of local size,
trains all blocks by rolling, and broadcasts what was trained, weighted, to the whole space; its method section could
not be read: block geometry, clock and broadcast weight are this project's, and fields. A broadcast
weight of 1 is nearest to its abstract, and was best of those tried (`LOG.md`). In print it is `fedbrb_like`.

    participant k        n_k = 1 / r_k blocks an axis; block b is coordinates [b D / n, (b + 1) D / n)
    round t, k           trains block t mod n of the residual stream and block floor(t / n) mod n of heads and MLP
    round t, server      trained coordinates: the mean over those who have them, weighted by examples
                         others: W <- (1 - lam_t) W + lam_t (mean of the trained blocks), lam_t = lam / (1 + t / decay)

Every pair of an in block and an out block is visited once in n^2 rounds. A matrix from the residual stream to itself
(BERT's pooler) has its out blocks on the second clock, unless what it makes is the residual stream's coordinates again,
for a head that is the token embedding: of its n^2 blocks n are trained, and the others live on broadcasts.

Differs from the paper: see above; where participants have different n, the others move to the mean of what each n would
broadcast; AdamW. A participant deploys its block of the round; the whole model's score is `accuracy_global`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
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
from fedsim.core.fields import check_range, refuse
from fedsim.core.submodel import Cut
from fedsim.core.tree import State
from fedsim.learning.coverage import MODEL, averaged, everywhere, model_of
from fedsim.learning.rates import FITTING, cut_axes, rate_of, sub_form, window
from fedsim.learning.task import Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class FedBRBLike(SubModels):
    """The reconstruction of FedBRB, of the target.

    - `clock`: all participants of a rate train the same block ("together"), or each begins at another ("spread").
    - `broadcast`: lam; 0: none. - `decay`: rounds after which lam_t is half of it; None: constant.
    - `mode`: what is broadcast: the trained blocks themselves ("parameters"), or how they changed ("changes").
    """

    clock: Literal["together", "spread"] = "together"
    broadcast: float = 1.0
    decay: float | None = None
    mode: Literal["parameters", "changes"] = "parameters"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "broadcast", least=0, most=1)
        check_range(self, "algorithm", "decay", above=0)

    @property
    def name(self) -> str:
        return "fedbrb_like"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        for rate in {self.rate(task, form, target) for form in forms}:
            for axis in cut_axes(task.specs(target)):
                if abs(rate * round(1 / rate) - 1) > 1e-9 or target.axes[axis] % round(1 / rate):
                    accepted = f"rates 1/n whose n divides axis {axis!r}, {target.axes[axis]} in the target {target}"
                    refuse("algorithm.rates", rate, accepted)

    def rate(self, task: Task, form: Form, target: Form) -> float:
        """The largest 1/n that fits; of "fitting", those whose n divides every axis that is cut, and is a power of two:
        blocks then lie in one another's."""
        if self.rates != FITTING:
            return rate_of(task, target, form, self.rates)
        sizes = [target.axes[axis] for axis in cut_axes(task.specs(target))]
        powers = (2**power for power in range(min(sizes).bit_length()))
        blocks = [n for n in powers if not any(size % n for size in sizes)]
        return rate_of(task, target, form, tuple(1 / n for n in blocks))

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model = model_of(state)
        parts = {key: _cut(ctx, *key).extract(model) for key in {self._block(ctx, client) for client in cohort}}
        return {client.id: parts[self._block(ctx, client)] for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        trained: dict[tuple[int, int], Cut] = {}

        def cut_of(client: int) -> Cut:
            key = self._block(ctx, ctx.clients[client])
            return trained.setdefault(key, _cut(ctx, *key))

        after, now = averaged(state, updates, ctx.task, ctx.target, self.server, cut_of)
        lam = self.broadcast / (1 + ctx.round / self.decay) if self.decay else self.broadcast
        if not lam or not trained:
            return after
        old, new, moved = model_of(state), model_of(after), {}
        source = new if self.mode == "parameters" else {name: new[name] - old[name] for name in new}
        spread = everywhere([(key[0], trained[key]) for key in sorted(trained)], source)
        for name, tensor in new.items():  # in float64, where a mean of equal blocks is that block
            aim = spread[name] if self.mode == "parameters" else tensor + spread[name]
            moved[name] = torch.where(now[name], tensor, torch.lerp(tensor.double(), aim, lam).to(tensor.dtype))
        return after | {MODEL: after[MODEL] | moved}

    def _block(self, ctx: ServerContext, client: ClientInfo) -> tuple[int, int]:
        """n, and the time on its client's clock, which comes round after n^2."""
        n = round(1 / self.rate(ctx.task, client.form, ctx.target))
        return n, (max(ctx.round - 1, 0) + (client.id if self.clock == "spread" else 0)) % n**2

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form = self._form(ctx)
        trained = yield Training(TaskLoss(ctx.task, form), payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(self._form(ctx), payload)

    def _form(self, ctx: ClientContext) -> Form:
        return sub_form(ctx.task, ctx.target, self.rate(ctx.task, ctx.info.form, ctx.target))


def _cut(ctx: ServerContext, n: int, time: int) -> Cut:
    """The block of a client of n blocks an axis at a time on its clock."""
    specs, axes = ctx.task.specs(ctx.target), ctx.target.axes
    first, second = time % n, time // n % n
    block = lambda axis, number: window(axes[axis], axes[axis] // n, number * (axes[axis] // n))  # noqa: E731
    lists = {axis: block(axis, first if axis == "embed" else second) for axis in cut_axes(specs)}
    of_embed = [dim for spec in specs.values() for dim in spec.parsed_parts if dim.axes == ("embed",)]
    inner = {dim.group for dim in of_embed} - {dim.group for dim in of_embed if dim.tied} - {"embed"}
    return Cut(specs, axes, lists | {f"{group}:embed": block("embed", second) for group in inner})
