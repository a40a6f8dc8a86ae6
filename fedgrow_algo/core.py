"""Growth that is the same for all, and a small core on top of it: a variant of the project's own, of no paper.

    before round 1           M, a model of the smallest form (or the intermediate one), which all hold; G, a preset's
                             operator, untrained
                             U of out x r and V of r x in: random, orthonormal, the same for all; R = 0, of r x r
    round r, participant k   W' = G(M) + U R V; train R_k, and head and norms of W'; send them
    round r, server          R <- sum_k n_k R_k / sum_k n_k, and so heads and norms

The mean is exact: U (sum_k p_k R_k) V = sum_k p_k U R_k V. A preset whose growth is exact starts at what M computes.
M comes from the seed, or from `Experiment.start`: nothing of anyone's model is sent. With `warm_rounds`, FedAvg of M
comes first, for so many rounds: that shares a small model, and this form goes by another name, and M goes down in every
round after them, for who comes late.

With M from a checkpoint this is Fed-SB (`baselines.fedsb`) on what the checkpoint grows to (`fedgrow_algo.grown`, by
the same preset), and the blocks' norms trained as well.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from fedgrow_algo.dual_ligo import grown, operator_between
from fedgrow_algo.presets import by_name
from fedsim.algorithm import (
    LATER,
    Averaging,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
)
from fedsim.core.fields import check_range, refuse
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, to
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
from fedsim.learning.rates import smallest
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


SMALL = "small"  # beside R and `HEAD`, what is sent down where it was learned together: M


@dataclasses.dataclass(frozen=True)
class FedGrowCore(Averaging):
    """Adapters U R V of a grown model, of which R is trained, sent and averaged, with heads and norms.

    - `preset`: the growth operator; see `fedgrow_algo.presets`. - `rank`: r.
    - `warm_rounds`: how many rounds M is averaged for before it is grown; with no fewer than the run has, it never is.
    - `of`: whose form M has: the smallest of the participants' own, or the intermediate, where a larger public model
      is there to begin with.
    """

    preset: str = "preserving"
    rank: int = 16
    warm_rounds: int = 0
    of: Literal["smallest", "intermediate"] = dataclasses.field(default="smallest", metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.preset)
        check_range(self, "algorithm", "rank", least=1)
        check_range(self, "algorithm", "warm_rounds", least=0)

    @property
    def name(self) -> str:
        return "fedgrow_core_warm" if self.warm_rounds else "fedgrow_core"

    @property
    def leaves(self) -> Leaves:
        return "model" if self.warm_rounds else "adapter"

    @property
    def preset_name(self) -> str:
        return self.preset

    @property
    def updates_vary(self) -> bool:
        return self.warm_rounds > 0  # M at first, and then the core

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_rank(task, target, self.rank)
        if self.of == "intermediate":
            if intermediate is None:
                refuse("intermediate", None, "a form, where algorithm.of='intermediate'")
            operator_between(self.preset, task, intermediate, target)
        elif forms:
            operator_between(self.preset, task, smallest(task, forms), target)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return self._current(self.server.start(self._first(ctx)), ctx)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return super().server_broadcast(self._current(state, ctx), cohort, ctx)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(self._current(state, ctx), updates)

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(model_of(self._current(state, ctx)), {}, ctx)

    def _current(self, state: State, ctx: ServerContext) -> State:
        """What a round starts from: M while it is averaged, and then the core."""
        if self._warm(ctx) or R in state:
            return state
        small = model_of(state)
        base = self._held(small, ctx)[MODEL]
        inner = {name: torch.zeros(self.rank, self.rank) for name in adapted(ctx.task, ctx.target)}
        core = self.server.start({R: inner, HEAD: {name: base[name] for name in heads_and_norms(ctx.task, ctx.target)}})
        return {**core, SMALL: small} if self.warm_rounds else core

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return {} if self.warm_rounds else to(self._held(self._first(ctx), ctx), ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        if self._warm(ctx):
            loss, start, frozen = TaskLoss(ctx.task, self._form(ctx)), payload, {}
        else:
            loss, start = InnerLoss(ctx.task, ctx.target), {R: payload[R], HEAD: payload[HEAD]}
            frozen = state or self._held(payload[SMALL], ctx)
        trained = yield Training(loss, start, frozen, purpose="core", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return self._model(payload, state, ctx)

    def _warm(self, ctx: ServerContext | ClientContext) -> bool:
        """Whether M is what is averaged."""
        return 0 < self.warm_rounds >= ctx.round

    def _held(self, small: Tree, ctx: ServerContext | ClientContext) -> State:
        """What everyone can make of M: G(M), U and V."""
        operator = operator_between(self.preset, ctx.task, self._form(ctx), ctx.target)
        start = operator.init(generator(ctx.seed, "operator"))
        base = grown(operator, to(start, next(iter(small.values())).device), operator.stack(small))
        factors = outer_factors(base, adapted(ctx.task, ctx.target), self.rank, generator(ctx.seed, "adapters"))
        return {MODEL: base, **to(factors, next(iter(base.values())).device)}

    def _model(self, sent: Payload, held: State, ctx: ServerContext | ClientContext) -> nn.Module:
        """M, or G(M) with the core, heads and norms. - `held`: nothing, where it has to be made."""
        if self._warm(ctx):
            return ctx.task.module(self._form(ctx), {**sent})
        held = held or self._held(sent[SMALL] if self.warm_rounds else self._first(ctx), ctx)
        factors = {A: held[A], B: with_inner(held[B], sent[R])}
        merged = applied(held[MODEL], factors, adapted(ctx.task, ctx.target), 1.0)
        return ctx.task.module(ctx.target, merged | sent[HEAD])

    def _form(self, ctx: ServerContext | ClientContext) -> Form:
        """M's."""
        return smallest(ctx.task, ctx.small_forms) if self.of == "smallest" else ctx.intermediate

    def _first(self, ctx: ServerContext | ClientContext) -> Tree:
        """M, from the seed or as it is public."""
        return ctx.initial(self._form(ctx), "small")


def heads_and_norms(task: Task, form: Form) -> list[str]:
    """Names of what comes after the blocks, and of every gain and shift of a normalisation."""
    after = tail(task, form)
    norms = (n for n, spec in task.specs(form).items() if all(d.mode in ("gain", "shift") for d in spec.parsed_parts))
    return [*after, *(name for name in norms if name not in after)]
