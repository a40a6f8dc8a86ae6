"""HeteroFL: everyone trains the first units of each layer that its device can hold (Diao, Ding, Tarokh, ICLR 2021).

    participant k        rate r_k; its sub-model is the first ceil(r_k D) coordinates of each axis, all heads kept
    round r, server      send theta[I_k]
    round r, k           train it, every width layer divided by r_k, logits of absent classes set to 0
    round r, server      each coordinate: the plain mean over those who have it; rows of classes and tokens only over
                         those whose data have them; nobody: as it was

`heterofl` is as published. `heterofl_clean` leaves out what hurts transformers: no scaler, no masks, and a mean that is
weighted by examples. Only it is FedAvg when all rates are 1.

Differs from the paper: rates follow the participants' devices and stay; AdamW; pre-norm transformers too, and heads
that are the token embedding, which the scaler divides as an embedding alone: the norm before the head multiplies back;
rows of padding, end and mask tokens are everyone's (in the authors' code the mask's row is never trained); sub-models
are deployed (there, the full model alone is scored: `accuracy_global`); scores are never given a mask. Rotary families
lose heads of keys and values instead of parts of heads (`fedsim.learning.rates`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.submodel import ParamSpec
from fedsim.core.tree import State, Tree
from fedsim.learning.coverage import ROWS, averaged, covered_of, model_of, present, start
from fedsim.learning.objectives import Frozen
from fedsim.learning.rates import RATES, check_forms, check_rates, cut_at, rate_of, sub_form
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class HeteroFL(LocalTraining):
    """HeteroFL of the target.

    - `rates`: the sub-models there are, largest first (`fedsim.learning.rates.rate_of` says who trains which).
    - `scaler`: divide what width layers compute by the rate, in training. - `masks`: absent classes do not count.
    - `by_examples`: weight the mean by examples.
    - `server`: what the server makes of the mean.
    """

    rates: tuple[float, ...] = RATES
    scaler: bool = True
    masks: bool = True
    by_examples: bool = False
    server: ServerOptimizer = AVERAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self.rates)

    @property
    def name(self) -> str:
        return "heterofl" if self.scaler or self.masks or not self.by_examples else "heterofl_clean"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form, target: Form) -> None:
        check_forms(task, target, forms, self.rates)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return start(ctx.task.fresh(ctx.target, ctx.derive("target")), self.server)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        rates = {client.id: rate_of(ctx.task, ctx.target, client.form, self.rates) for client in cohort}
        model = model_of(state)
        parts = {rate: cut_at(ctx.task, ctx.target, rate).extract(model) for rate in {*rates.values()}}
        return {id_: parts[rate] for id_, rate in rates.items()}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        rates = [rate_of(ctx.task, ctx.target, client.form, self.rates) for client in ctx.clients]
        cuts = {rate: cut_at(ctx.task, ctx.target, rate) for rate in {*rates}}
        return averaged(state, updates, ctx.task, ctx.target, self.server, lambda client: cuts[rates[client]])[0]

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(ctx.target, model_of(state))

    def server_covered(self, state: State) -> Tree | None:
        return covered_of(state)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        rate = rate_of(ctx.task, ctx.target, ctx.info.form, self.rates)
        form = sub_form(ctx.task, ctx.target, rate)
        rows = present(ctx.task, ctx.train, payload, ctx.task.specs(form)) if self.masks else {}
        seen = rows.get("token" if ctx.task.inputs.kind in ("lm", "mlm") else "class")
        objective = ScaledLoss(ctx.task, form, rate if self.scaler else None)
        frozen = {} if seen is None else {"seen": seen.to(ctx.device)}
        trained = yield Training(objective, payload, frozen, purpose="target", **self.settings())
        weight = ctx.info.num_examples if self.by_examples else 1
        vouched = {ROWS: rows} if rows else {}
        return ClientUpdate(ctx.info.id, trained.parameters | vouched, weight), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        rate = rate_of(ctx.task, ctx.target, ctx.info.form, self.rates)
        return ctx.task.module(sub_form(ctx.task, ctx.target, rate), payload)


def heterofl_clean(**fields) -> HeteroFL:
    """HeteroFL's nested sub-models, trained and averaged as FedAvg does."""
    return HeteroFL(**fields, scaler=False, masks=False, by_examples=True)


@dataclasses.dataclass(frozen=True)
class ScaledLoss:
    """The task's loss of a sub-model, with the scaler of its rate (None: without).

    - `frozen["seen"]`: the classes that count, of bools; nothing if all do.
    """

    task: Task
    form: Form
    rate: float | None

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        if self.rate is not None:
            specs = self.task.specs(self.form)
            parameters = {name: tensor / divisor(specs[name], self.rate) for name, tensor in parameters.items()}
        logits = self.task.forward(self.form, parameters, batch)
        if "seen" in frozen:
            logits = logits.masked_fill(~frozen["seen"], 0.0)
        return self.task.loss(logits.float(), batch)


def divisor(spec: ParamSpec, rate: float) -> float:
    """What the scaler divides a parameter by: those of width layers by the rate, the norm before a tied head back."""
    if any(dim.tied for dim in spec.parsed_parts):
        return 1 / rate
    return rate if any(dim.mode == "write" for dim in spec.parsed_parts) else 1.0
