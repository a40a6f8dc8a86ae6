"""FedMRL: a private and a small common model see as one, in nested parts (Yi et al., NeurIPS 2024, arXiv 2406.00488).

    features                 f_theta(x) of d1 numbers, of the common model; f_S(x) of d2, of the private one; d1 <= d2
    representation           z = P (f_theta(x), f_S(x)) + b, of d2 numbers; P, b private
    loss                     CE(head_theta(z[:d1])) + CE(head_S(z))
    round r, participant k   theta <- the server's; train theta_k, S_k, P_k and b_k on the loss
    round r, server          theta <- sum_k n_k theta_k / sum_k n_k

The common model has the smallest form among the participants' own. What is deployed is head_S(z), with the common
model's features but without its head.

Differs from the paper: transformers; AdamW; scored is what is deployed, with the common model that the server then
sends, where the released code scores before averaging, with the one that was trained locally.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgrow_algo.pretrain import untrained
from fedsim.algorithm import (
    Averaging,
    Batch,
    ClientContext,
    ClientUpdate,
    Frozen,
    Leaves,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.fields import refuse
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, to
from fedsim.learning.ensemble import Spliced
from fedsim.learning.features import check_classes, feature_size, features, head
from fedsim.learning.rates import smallest
from fedsim.learning.ridge import linear
from fedsim.learning.task import Task
from fedsim.models import Form


COMMON, OWN, PROJECTION = "common", "own", "projection"  # parts of what is trained; the first is sent, the others stay


@dataclasses.dataclass(frozen=True)
class FedMRL(Averaging):
    """Private models that see through a common one as well."""

    @property
    def name(self) -> str:
        return "fedmrl"

    @property
    def leaves(self) -> Leaves:
        return "auxiliary model"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_classes(task)
        common = smallest(task, forms or [target])
        for form in forms:
            if feature_size(task, form) < feature_size(task, common):
                refuse("form.width", form.width, f"at least {common.width}, that of the smallest form {common}")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return self.server.start(ctx.initial(_form(ctx), "auxiliary"))

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return None  # the common head reads what private layers make

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        own = untrained(ctx)
        d2, read = feature_size(ctx.task, ctx.info.form), feature_size(ctx.task, _form(ctx))
        drawn = torch.rand(d2, read + d2 + 1, generator=generator(ctx.seed, PROJECTION))
        drawn = (2 * drawn - 1) / (read + d2) ** 0.5
        return {OWN: own, PROJECTION: to({"weight": drawn[:, :-1], "bias": drawn[:, -1]}, ctx.device)}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        loss = NestedLoss(ctx.task, _form(ctx), ctx.info.form)
        trained = yield Training(loss, {COMMON: payload, **state}, purpose="nested", **self.settings())
        kept = {name: part for name, part in trained.parameters.items() if name != COMMON}
        return ClientUpdate(ctx.info.id, trained.parameters[COMMON], ctx.info.num_examples), kept

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        common, own = ctx.task.module(_form(ctx), payload), ctx.task.module(ctx.info.form, state[OWN])
        reads = own.get_submodule(head(ctx.task, ctx.info.form))
        for module, form in ((common, _form(ctx)), (own, ctx.info.form)):
            module.set_submodule(head(ctx.task, form), nn.Identity())  # its logits are then its features
        return Spliced(common, own, linear(**state[PROJECTION]), reads).eval()


def _form(ctx: ServerContext | ClientContext) -> Form:
    """The common model's: the smallest form there is."""
    return smallest(ctx.task, ctx.small_forms)


@dataclasses.dataclass(frozen=True)
class NestedLoss:
    """The task's loss at both heads, each of which reads its prefix of the representation."""

    task: Task
    common: Form
    own: Form

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        task, both = self.task, ((self.common, parameters[COMMON]), (self.own, parameters[OWN]))
        spliced = torch.cat([features(task, form, tree, batch) for form, tree in both], 1)
        z = F.linear(spliced, parameters[PROJECTION]["weight"], parameters[PROJECTION]["bias"])
        losses = [task.loss(scores(task, form, tree, z).float(), batch) for form, tree in both]
        return torch.stack(losses).sum()


def scores(task: Task, form: Form, tree: Tree, z: Tensor) -> Tensor:
    """What a model's head says of the prefix that it reads: `(n, at least d)` gives `(n, classes)`."""
    name = head(task, form)
    return F.linear(z[:, : feature_size(task, form)], tree[f"{name}.weight"], tree.get(f"{name}.bias"))
