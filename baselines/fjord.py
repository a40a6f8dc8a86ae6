"""FjORD: ordered dropout, so that one model holds a model of every size (Horvath et al., NeurIPS 2021).

    participant k        largest rate p_k; its sub-model is the first ceil(p_k D) coordinates of each axis
    every local step     draw p among the rates up to p_k, all alike; a step on the loss of the sub-model at p
    with distillation    where p < p_k: a step on CE(p_k) + CE(softmax of p_k, held fixed; p)
    round r, server      each coordinate: the mean over those who have it, weighted by examples; nobody: as it was

Differs from the paper: rates are fractions 1/2^i instead of fifths; AdamW, whose momentum moves coordinates that a step
did not draw; transformers, with one LayerNorm for all rates. A participant deploys its sub-model at p_k.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, Partial, Payload, ServerContext
from fedsim.core.submodel import Cut
from fedsim.core.tree import Tree
from fedsim.learning.coverage import averaged, covered_of, model_of, start
from fedsim.learning.rates import RATES, check_forms, check_rates, cut_at, cut_axes, rate_of, sub_form, window
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.task import Batch, Task
from fedsim.learning.training import COSTS, Objective, check_settings, minimise, settings, task_loss
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class FjORD(Algorithm):
    """FjORD of the target.

    - `lr`, `epochs`, `batch_size`, `weight_decay`, `clip`: local training; see `fedsim.learning.training.settings`.
    - `rates`: the sub-models there are, largest first (`fedsim.learning.rates.rate_of` says who holds which).
    - `distillation`: smaller sub-models learn from the largest that the participant holds.
    - `server`: what the server makes of the mean.
    """

    lr: float = 5e-4
    epochs: int = 1
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 1.0
    rates: tuple[float, ...] = dataclasses.field(default=RATES, metadata=COSTS)
    distillation: bool = dataclasses.field(default=True, metadata=COSTS)
    server: ServerOptimizer = AVERAGE

    def __post_init__(self) -> None:
        check_settings(self)
        check_rates(self.rates)

    @property
    def name(self) -> str:
        return "fjord"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form, target: Form) -> None:
        check_forms(task, target, forms, self.rates)
        largest = max((rate_of(task, target, form, self.rates) for form in forms), default=0.0)
        for rate in self.rates:  # whoever holds a sub-model trains all smaller ones too
            if rate <= largest:
                sub_form(task, target, rate)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        return start(ctx.task.fresh(ctx.target, ctx.derive("target")), self.server)

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        rates = {client.id: rate_of(ctx.task, ctx.target, client.form, self.rates) for client in cohort}
        model = model_of(state)
        parts = {rate: cut_at(ctx.task, ctx.target, rate).extract(model) for rate in {*rates.values()}}
        return {id_: parts[rate] for id_, rate in rates.items()}

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        rates = [rate_of(ctx.task, ctx.target, client.form, self.rates) for client in ctx.clients]
        cuts = {rate: cut_at(ctx.task, ctx.target, rate) for rate in {*rates}}
        return averaged(state, updates, ctx.task, ctx.target, self.server, lambda client: cuts[rates[client]])[0]

    def server_model(self, state: Tree, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, model_of(state))

    def server_covered(self, state: Tree) -> Tree | None:
        return covered_of(state)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> tuple[ClientUpdate, Tree]:
        own = rate_of(ctx.task, ctx.target, ctx.info.form, self.rates)
        objectives = [self._objective(ctx, own, rate) for rate in self.rates if rate <= own]
        trained = minimise(ctx, objectives, payload, purpose="target", **settings(self))
        return ClientUpdate(ctx.info.id, trained, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        own = rate_of(ctx.task, ctx.target, ctx.info.form, self.rates)
        return ctx.task.module(sub_form(ctx.task, ctx.target, own), payload)

    def _objective(self, ctx: ClientContext, own: float, rate: float) -> Objective:
        """The loss of a step that draws `rate`, as a function of the sub-model at `own`."""
        task, whole, form = ctx.task, sub_form(ctx.task, ctx.target, own), sub_form(ctx.task, ctx.target, rate)
        specs = task.specs(whole)
        cut = Cut(specs, whole.axes, {axis: window(whole.axes[axis], form.axes[axis], 0) for axis in cut_axes(specs)})
        at_own = lambda tree, batch: task.forward(whole, tree, batch)  # noqa: E731
        at_rate = lambda tree, batch: task.forward(form, cut.extract(tree), batch)  # noqa: E731
        if rate == own or not self.distillation:
            return task_loss(ctx, at_rate)

        def distilled(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
            teacher, student = at_own(tree, batch).float(), at_rate(tree, batch).float()
            return task.loss(teacher, batch) + task.distillation(student, teacher.detach(), batch)

        return distilled
