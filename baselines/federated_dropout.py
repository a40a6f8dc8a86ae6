"""Federated Dropout: a random sub-model for each participant in each round (Caldas et al. 2018, arXiv 1812.07210).

    round r, server          draws, for each participant, which coordinates of each axis it keeps: one list for the
                             residual stream, one for each block's heads and MLP; sends theta[I_k]
    round r, participant k   trains it, what it reads divided by the share kept, as inverted dropout does
    round r, server          each coordinate: the mean over those who have it, weighted by examples; nobody: as it was

Lists are aligned: the residual stream has one list in the whole network, queries and keys have one in each head. A head
that is the token embedding reads through the norm before it, which is divided in its stead.

Differs from the paper: transformers; lists on the residual stream too, without which no bytes would be saved there; the
share kept is the participant's rate unless `keep` says one for all; AdamW. A participant deploys the round's sub-model,
what it reads divided alike; the whole model's score is `accuracy_global`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from baselines.sub_models import SubModels
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.fields import refuse
from fedsim.core.seeding import generator
from fedsim.core.submodel import Cut
from fedsim.core.tree import State, Tree
from fedsim.learning.coverage import averaged, model_of
from fedsim.learning.objectives import Frozen
from fedsim.learning.rates import cut_axes, rate_of, sub_form
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class FederatedDropout(SubModels):
    """Federated Dropout of the target.

    - `keep`: the share of each axis that everyone keeps, whatever its device; None: the participant's rate.
    """

    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= 1:
            refuse("algorithm.keep", self.keep, "above 0 and at most 1, or None")

    @property
    def name(self) -> str:
        return "federated_dropout"

    def rate(self, task: Task, form: Form, target: Form) -> float:
        return rate_of(task, target, form, self.rates if self.keep is None else (self.keep,))

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model = model_of(state)
        return {client.id: self._cut(ctx, client).extract(model) for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return averaged(
            state, updates, ctx.task, ctx.target, self.server, lambda client: self._cut(ctx, ctx.clients[client])
        )[0]

    def _cut(self, ctx: ServerContext, client: ClientInfo) -> Cut:
        """This round's lists for a client, in ascending order; the residual stream's first."""
        form = sub_form(ctx.task, ctx.target, self.rate(ctx.task, client.form, ctx.target))
        draw = generator(ctx.seed, "kept", ctx.round, client.id)
        specs, lists = ctx.task.specs(ctx.target), {}
        for axis in cut_axes(specs):
            keys = ["embed"] if axis == "embed" else [f"{axis}.{block}" for block in range(ctx.target.depth)]
            for key in keys:
                kept = torch.randperm(ctx.target.axes[axis], generator=draw)[: form.axes[axis]]
                lists[key] = kept.sort().values
        return Cut(specs, ctx.target.axes, lists)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        objective = DividedLoss(ctx.task, self._form(ctx), ctx.target)
        trained = yield Training(objective, payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        form = self._form(ctx)
        return ctx.task.module(form, divided(payload, shares(ctx.task, form, ctx.target)))

    def _form(self, ctx: ClientContext) -> Form:
        return sub_form(ctx.task, ctx.target, self.rate(ctx.task, ctx.info.form, ctx.target))


@dataclasses.dataclass(frozen=True)
class DividedLoss:
    """The task's loss of a sub-model of form `form` of the target, its parameters divided by their shares."""

    task: Task
    form: Form
    target: Form

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        kept = divided(parameters, shares(self.task, self.form, self.target))
        return self.task.loss(self.task.forward(self.form, kept, batch).float(), batch)


def shares(task: Task, form: Form, target: Form) -> dict[str, float]:
    """For each parameter, the share kept of what it reads; a tied head reads through the norm before it."""
    small, large, found = form.axes, target.axes, {}
    for name, spec in task.specs(target).items():
        first, *_ = spec.parts(name).values()  # parts of a fused parameter read alike
        read = [axis for dim in first.parsed if dim.mode == "read" or dim.tied for axis in dim.axes]
        found[name] = math.prod(small[axis] / large[axis] for axis in read)
    return found


def divided(tree: Mapping[str, Tensor], shares: Mapping[str, float]) -> Tree:
    """Each parameter divided by its share."""
    return {name: tensor / shares[name] for name, tensor in tree.items()}
