"""Federated LoRA on the target: FedIT, FFA-LoRA and HetLoRA (FLoRA is `baselines.flora`).

Every matrix of a block that reads one axis and writes another gets W = W0 + (alpha / rank) B A, with A of rank x in
(random at first) and B of out x rank (zero).

| method | trains | server | ranks |
|---|---|---|---|
| `fedit` (Zhang et al. 2023, arXiv 2305.05644) | A, B | means of A and of B, weighted by examples | one |
| `ffa_lora` (Sun et al., ICLR 2024) | B | mean of B; A comes from the seed and stays | one |
| `hetlora` (Cho et al., EMNLP 2024) | A, B | means of zero-padded A and B, weighted by the norm of B A | by device |

Everyone holds W0 and passes through it: saved are bytes, and gradients and moments.
Differs from the papers: last normalisation and head are trained and averaged as well; all matrices; AdamW; no 8-bit
base (FedIT); ranks are the device's rate of `rank`, not pruned (HetLoRA).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
    weighted_sum,
)
from fedsim.core.fields import check_range
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, to
from fedsim.learning import adapters
from fedsim.learning.adapters import HEAD, A, AdapterLoss, B, adapted, applied, check_rank, rank_of
from fedsim.learning.exits import tail
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer, model_of
from fedsim.learning.starts import start_of
from fedsim.learning.task import Task
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class FederatedLoRA(LocalTraining):
    """Adapters of the target that are averaged factor by factor.

    - `method`: see the module. - `rank`: of adapters; the largest, if they differ.
    - `alpha`: B A counts alpha / rank times. - `base`: W0, a checkpoint of the target's form; None: a fresh model.
    """

    method: Literal["fedit", "ffa_lora", "hetlora"] = "fedit"
    rank: int = 8
    alpha: float = 16.0
    base: Checkpoint | None = None
    server: ServerOptimizer = AVERAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "rank", "alpha", above=0)

    @property
    def name(self) -> str:
        return self.method

    @property
    def leaves(self) -> Leaves:
        return "adapter"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_rank(task, target, self.rank, forms if self.method == "hetlora" else ())

    def _rank(self, task: Task, form: Form, target: Form) -> int:
        return rank_of(task, target, form, self.rank) if self.method == "hetlora" else self.rank

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        held, factors = self._start(ctx)
        return self.server.start(factors | {HEAD: {n: held[n] for n in tail(ctx.task, ctx.target)}})

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        ranks = {client.id: self._rank(ctx.task, client.form, ctx.target) for client in cohort}
        parts = {rank: adapters.resized(model_of(state), rank) for rank in {*ranks.values()}}
        return {id_: parts[rank] for id_, rank in ranks.items()}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial:
        return weighted_sum([dataclasses.replace(u, tree=adapters.resized(u.tree, self.rank)) for u in updates])

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(state, (u if isinstance(u, Partial) else self.combine([u]) for u in updates))

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(self._start(ctx)[0], model_of(state), ctx)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return to(self._start(ctx)[0], ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        base = {name: state[name] for name in ctx.task.specs(ctx.target)}
        frozen = {"model": base, "adapters": {name: state[name] for name in state.keys() - base.keys()}}
        loss = AdapterLoss(ctx.task, ctx.target, self.alpha / self.rank)
        trained = yield Training(loss, payload, frozen, purpose="adapters", **self.settings())
        weight = float(ctx.info.num_examples)
        if self.method == "hetlora":  # as long as all norms are 0 all adapters count alike
            weight = adapters.norm(trained.parameters, adapted(ctx.task, ctx.target)) or 1e-12
        return ClientUpdate(ctx.info.id, trained.parameters, weight), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._model(state, payload, ctx)

    def _start(self, ctx: ServerContext | ClientContext) -> tuple[Tree, Tree]:
        """What everyone begins with: what is held and never sent (W0, and an A that stays), and the factors sent."""
        base, writes = start_of(ctx, ctx.target, self.base), adapted(ctx.task, ctx.target)
        factors = adapters.fresh(base, writes, self.rank, generator(ctx.seed, "adapters"))
        if self.method == "ffa_lora":
            return base | {A: factors[A]}, {B: factors[B]}
        return base, factors

    def _model(self, held: Tree, sent: Payload, ctx: ServerContext | ClientContext) -> nn.Module:
        """W0 with the adapters and the head."""
        base, writes = {name: held[name] for name in ctx.task.specs(ctx.target)}, adapted(ctx.task, ctx.target)
        model = applied(base, {**held, **sent}, writes, self.alpha / self.rank)
        return ctx.task.module(ctx.target, model | sent[HEAD])


def fedit(**fields) -> FederatedLoRA:
    """FedAvg of both factors: the product of means is not the mean of products."""
    return FederatedLoRA(**fields, method="fedit")


def ffa_lora(**fields) -> FederatedLoRA:
    """A fixed, B averaged: the product of means is the mean of products."""
    return FederatedLoRA(**fields, method="ffa_lora")


def hetlora(**fields) -> FederatedLoRA:
    """Ranks by device."""
    return FederatedLoRA(**fields, method="hetlora")
