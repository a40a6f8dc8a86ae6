"""FjORD: ordered dropout, so that one model holds a model of every size (Horvath et al., NeurIPS 2021).

    participant k        largest rate p_k; its sub-model is the first ceil(p_k D) coordinates of each axis
    every local step     draw p among the rates up to p_k, all alike; a step on the loss of the sub-model at p
    with distillation    where p < p_k: a step on CE(p_k) + CE(softmax of p_k, held fixed; p)
    round r, server      each coordinate: the mean over those who have it, weighted by examples; nobody: as it was

Differs from the paper: rates are fractions 1/2^i instead of fifths; AdamW, whose momentum moves coordinates that a step
did not draw; transformers, with one LayerNorm for all rates. A participant deploys its sub-model at p_k.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

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
from fedsim.core.submodel import Cut
from fedsim.core.tree import State, Tree
from fedsim.learning.coverage import averaged, model_of
from fedsim.learning.objectives import Frozen
from fedsim.learning.rates import cut_at, cut_axes, rates_of, sub_form, window
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


MOST = 12  # rates that are drawn from: each is another training step to be counted


@dataclasses.dataclass(frozen=True)
class FjORD(SubModels):
    """FjORD of the target.

    - `distillation`: smaller sub-models learn from the largest that the participant holds.
    """

    distillation: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def name(self) -> str:
        return "fjord"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        for form in forms:
            for rate in self._drawn(task, target, self.rate(task, form, target)):
                sub_form(task, target, rate)

    def _drawn(self, task: Task, target: Form, own: float) -> list[float]:
        """What a participant draws from in every step: its own rate, and the smaller ones, of at most twelve in all."""
        there = rates_of(task, target, self.rates)
        return [own, *(rate for rate in there[:: math.ceil(len(there) / MOST)] if rate < own)]

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        rates = self.rates_of(cohort, ctx)
        model = model_of(state)
        parts = {rate: cut_at(ctx.task, ctx.target, rate).extract(model) for rate in {*rates.values()}}
        return {id_: parts[rate] for id_, rate in rates.items()}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        rates = self.rates_of(ctx.clients, ctx)
        cuts = {rate: cut_at(ctx.task, ctx.target, rate) for rate in {*rates.values()}}
        return averaged(state, updates, ctx.task, ctx.target, self.server, lambda client: cuts[rates[client]])[0]

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        own = self.rate(ctx.task, ctx.info.form, ctx.target)
        largest = sub_form(ctx.task, ctx.target, own)
        objectives = tuple(
            SubModelLoss(ctx.task, largest, sub_form(ctx.task, ctx.target, rate), self.distillation and rate < own)
            for rate in self._drawn(ctx.task, ctx.target, own)
        )
        trained = yield Training(objectives, payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        own = self.rate(ctx.task, ctx.info.form, ctx.target)
        return ctx.task.module(sub_form(ctx.task, ctx.target, own), payload)


@dataclasses.dataclass(frozen=True)
class SubModelLoss:
    """The loss of a step that draws the sub-model `form`, as a function of the largest that the participant holds.

    - `distilled`: that largest one is trained as well, and the sub-model learns from it.
    """

    task: Task
    largest: Form
    form: Form
    distilled: bool

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        task, whole, form = self.task, self.largest, self.form
        specs = task.specs(whole)
        cut = Cut(specs, whole.axes, {axis: window(whole.axes[axis], form.axes[axis], 0) for axis in cut_axes(specs)})
        if not self.distilled:
            return task.loss(task.forward(form, cut.extract(parameters), batch).float(), batch)
        teacher = task.forward(whole, parameters, batch).float()
        student = task.forward(form, cut.extract(parameters), batch).float()
        return task.loss(teacher, batch) + task.distillation(student, teacher.detach(), batch)
