"""What methods have in common whose clients keep a small model each, of any form, and meet where its head reads.

LG-FedAvg, FedProto, FedTGP and FedGH: no client's model leaves it. What they share is as wide as the features of
`fedsim.learning.features`, which all have in common: a client whose model has another width projects onto them.

The papers' models are convolutional and end in layers of one size. The projection is this project's: linear, without a
bias, trained by its client alone. Deployed, it is multiplied into the head: a model is of its form again.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedgrow_algo.pretrain import untrained
from fedsim.algorithm import ClientContext, ClientInfo, Leaves, LocalTraining, Payload, ServerContext, Steps, Training
from fedsim.core.fields import check_range
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree
from fedsim.learning.features import PrototypeLoss, check_classes, head_of, plain, prototypes, width_of, with_features
from fedsim.learning.task import Task
from fedsim.models import Form


FAR = 20.0  # how much less a logit without a prototype is than another's: e^-20 as likely


@dataclasses.dataclass(frozen=True)
class PrivateModels(LocalTraining):
    """Small models that stay where they are.

    - `features`: width of the features; None: that of the widest small model, so that none is lost.
    """

    features: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "features", least=1)

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_classes(task)

    def width(self, ctx: ServerContext | ClientContext) -> int:
        """Width of the features."""
        return width_of(ctx.small_forms, self.features)

    def own_model(self, ctx: ClientContext) -> Tree:
        """A client's model at first: its tier's checkpoint, the public start, or drawn; with features. Drawn alike for
        all of one form: means of what unrelated models see would say nothing."""
        drawn = generator(ctx.seed, "head")
        return with_features(ctx.task, ctx.info.form, untrained(ctx), self.width(ctx), drawn)


def widest_of(ctx: ServerContext | ClientContext, width: int) -> Form:
    """A small form whose head reads features as they are, if there is one: a public head is then kept."""
    forms = ctx.small_forms
    return next((form for form in forms if form.width == width), forms[0])


@dataclasses.dataclass(frozen=True)
class Prototypes(PrivateModels):
    """Clients that are drawn to prototypes of the server's, `{"prototypes": (C, F), "known": (C,)}`, and send theirs.

    - `weight`: of the distance to them, the papers' lambda.
    - `predict`: what clients deploy: the nearest of the server's "prototypes", as the authors score, or their own
      "head". A class without a prototype is never the nearest (FedTGP's server has one for each); where there is none
      at all, or the head has no bias to write distances with (GPT-2, Llama), it is the own head.
    """

    weight: float = dataclasses.field(default=1.0, kw_only=True)
    predict: Literal["prototypes", "head"] = dataclasses.field(default="prototypes", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "weight", least=0)

    @property
    def leaves(self) -> Leaves:
        return "statistics"

    @property
    def updates_vary(self) -> bool:
        return True

    def client_init(self, ctx: ClientContext) -> State:
        return self.own_model(ctx)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        sent = self.sent(state)
        return {client.id: sent for client in cohort}

    @abc.abstractmethod
    def sent(self, state: State) -> Payload:
        """The server's prototypes."""

    def drawn(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[Tree, Tree, Tree]]:
        """The client's model after a round's training, and its prototypes and how many examples each is a mean of."""
        form = ctx.info.form
        loss = PrototypeLoss(ctx.task, form, self.weight)
        trained = yield Training(loss, state, payload, purpose="small", **self.settings())
        found = prototypes(ctx.task, form, trained.parameters, ctx.train, self.batch_size, ctx.device)
        return trained.parameters, *found

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        names = {name.rpartition(".")[2]: name for name in head_of(ctx.task, ctx.info.form)}
        if self.predict == "head" or "bias" not in names or not payload["known"].any():
            return plain(ctx.task, ctx.info.form, state)
        nearest = nearest_head(payload["prototypes"], payload["known"])
        return plain(ctx.task, ctx.info.form, state | {names[part]: tensor for part, tensor in nearest.items()})


def nearest_head(prototypes_CF: Tensor, known_C: Tensor) -> Tree:
    """A linear layer whose largest output is that of the nearest prototype: -|z - p|^2, without what all share.

    A class that is not known goes with one that is, a little less likely. Such outputs are not made for cross-entropy:
    losses are not to be compared with those of heads.
    """
    instead = prototypes_CF[known_C][:1]
    p = torch.where(known_C[:, None], prototypes_CF, instead)
    return {"weight": 2 * p, "bias": -p.square().sum(-1) - FAR * (~known_C)}
