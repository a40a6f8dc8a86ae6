"""Fed-SB: adapters B R A whose outer factors never change (Singhal et al., 2025, arXiv 2502.15436).

    before round 1           B of out x r and A of r x in: random, orthonormal, the same for all; R = 0, of r x r
    round r, participant k   W = W0 + B R A; train R_k and what comes after the blocks; send it
    round r, server          R <- sum_k n_k R_k / sum_k n_k

The mean is exact: B (sum_k p_k R_k) A = sum_k p_k B R_k A. Of a matrix r^2 numbers travel, whatever its size. Everyone
holds W0 and passes through it, as with other adapters.

Differs from the paper: it takes B and A, and R's start, from the largest singular vectors of an approximate first
update of all of W, which somebody has to compute on data and send: here nothing of W's size leaves a participant, and
the method is weaker for it. Its mean is plain, without n_k, its usual rank 200. Last normalisation and head are trained
and averaged as well; all matrices of the blocks; AdamW; no noise for privacy.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from fedsim.algorithm import (
    Averaging,
    ClientContext,
    ClientUpdate,
    Leaves,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.fields import check_range
from fedsim.core.seeding import generator
from fedsim.core.tree import State, to
from fedsim.learning.adapters import (
    HEAD,
    MODEL,
    A,
    B,
    InnerLoss,
    R,
    adapted,
    applied,
    check_rank,
    outer_factors,
    with_inner,
)
from fedsim.learning.exits import tail
from fedsim.learning.server_opt import model_of
from fedsim.learning.starts import start_of
from fedsim.learning.task import Task
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class FedSB(Averaging):
    """Adapters of the target of which the inner factor alone is trained, sent and averaged.

    - `rank`: r. - `base`: W0, a checkpoint of the target's form; None: a fresh model.
    """

    rank: int = 16
    base: Checkpoint | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "rank", above=0)

    @property
    def name(self) -> str:
        return "fedsb"

    @property
    def leaves(self) -> Leaves:
        return "adapter"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_rank(task, target, self.rank)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        base = start_of(ctx, ctx.target, self.base)
        inner = {name: torch.zeros(self.rank, self.rank) for name in adapted(ctx.task, ctx.target)}
        return self.server.start({R: inner, HEAD: {name: base[name] for name in tail(ctx.task, ctx.target)}})

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(self._held(ctx), model_of(state), ctx)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return to(self._held(ctx), ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        loss = InnerLoss(ctx.task, ctx.target)
        trained = yield Training(loss, payload, state, purpose="adapters", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._model(state, payload, ctx)

    def _held(self, ctx: ServerContext | ClientContext) -> State:
        """What everyone holds and nobody sends: W0, A and B."""
        base, writes = start_of(ctx, ctx.target, self.base), adapted(ctx.task, ctx.target)
        return {MODEL: base, **outer_factors(base, writes, self.rank, generator(ctx.seed, "adapters"))}

    def _model(self, held: State, sent: Payload, ctx: ServerContext | ClientContext) -> nn.Module:
        """W0 with the adapters and the head."""
        factors = {A: held[A], B: with_inner(held[B], sent[R])}
        return ctx.task.module(
            ctx.target, applied(held[MODEL], factors, adapted(ctx.task, ctx.target), 1.0) | sent[HEAD]
        )
