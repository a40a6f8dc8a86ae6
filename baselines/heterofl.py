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
are deployed as they are trained, with the scaler (there, the full model alone is scored: `accuracy_global`); scores are
never given a mask. Rotary families lose heads of keys and values instead of parts of heads (`fedsim.learning.rates`).
"""

import dataclasses
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
from fedsim.core.submodel import ParamSpec
from fedsim.core.tree import State, Tree
from fedsim.learning.coverage import ROWS, averaged, model_of, present
from fedsim.learning.objectives import Frozen
from fedsim.learning.rates import cut_at, sub_form
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


@dataclasses.dataclass(frozen=True)
class HeteroFL(SubModels):
    """HeteroFL of the target.

    - `scaler`: divide what width layers compute by the rate, in training. - `masks`: absent classes do not count.
    - `by_examples`: weight the mean by examples.
    """

    scaler: bool = True
    masks: bool = True
    by_examples: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def name(self) -> str:
        return "heterofl" if self.scaler or self.masks or not self.by_examples else "heterofl_clean"

    @property
    def sends_statistics(self) -> bool:
        """Which labels a shard has: rows of the others are not sent, and their logits do not count."""
        return self.masks

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
        rate = self.rate(ctx.task, ctx.info.form, ctx.target)
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
        rate = self.rate(ctx.task, ctx.info.form, ctx.target)
        form = sub_form(ctx.task, ctx.target, rate)
        return ctx.task.module(form, scaled(payload, ctx.task.specs(form), rate) if self.scaler else payload)


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
            parameters = scaled(parameters, self.task.specs(self.form), self.rate)
        logits = self.task.forward(self.form, parameters, batch)
        if "seen" in frozen:
            logits = logits.masked_fill(~frozen["seen"], 0.0)
        return self.task.loss(logits.float(), batch)


def scaled(parameters: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], rate: float) -> Tree:
    """What a sub-model computes with: its parameters with the scaler applied, in training as when it is deployed."""
    return {name: tensor / divisor(specs[name], rate) for name, tensor in parameters.items()}


def divisor(spec: ParamSpec, rate: float) -> float:
    """What the scaler divides a parameter by: those of width layers by the rate, the norm before a tied head back."""
    if any(dim.tied for dim in spec.parsed_parts):
        return 1 / rate
    return rate if any(dim.mode == "write" for dim in spec.parsed_parts) else 1.0
