"""Fed-Grow whose classifier is solved, not averaged: a variant of the project's own, of no paper.

    psi_i(x) = (f(x), 1)         f: what the head of T_i = Global(M_i) reads; 1: for the bias
    participant i, once          S_i, Local_i and M_i as in Fed-Grow (`fedgrow_algo.fedgrow`); all three stay
    round r, participant i       receive Global and W
                                 G_i = sum_x psi_i^T psi_i / n_i,  H_i = sum_x psi_i^T onehot(y) / n_i,  of that Global
                                 train Global_i, from it, through the task loss of T_i with the head W, frozen
                                 send Global_i, G_i, H_i
    round r, server              Global <- sum_i n_i Global_i / n;  W <- (G + gamma I)^{-1} H,
                                 G = sum_i n_i G_i / n, H = sum_i n_i H_i / n, n = sum_i n_i over the cohort
    result                       T_i = Global(M_i) with W for its head, one for each participant

n_i G_i is a plain sum over examples: sums add up, in any order, to what one place would have computed, so W is that of
all examples of the cohort however they are dealt; and a secure sum would do. Without one, the sums of a participant
that has few examples tell much of each. Means are sent so that gamma means the
same whatever the size of a cohort. The head that T_i grew from S_i's is what is trained against until there is a W, in
round 1; then W replaces it.

Sums are taken under the Global that came, not under the one trained on it: the first is the same for the whole
cohort, so W is one regression on features of one operator, where the second mixes as many operators as there are
participants, each bent towards its own labels. W is therefore one step of Global late. Passes for sums are no training,
and are counted as no FLOPs; both halves of the symmetric G are sent.

Features of strangers' models have no coordinates in common, and their sums say little together. With `align`, public
examples, f stands for the features turned to those of the public model that all begin with (`fedgrow_algo.alignment`):
each participant fits its rotation by itself, once at the start and again whenever it sends sums, and sends none of it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedgrow_algo.alignment import ROTATION, SHIFT, check_public, features_of, procrustes, turned_head, unturned
from fedgrow_algo.dual_ligo import HEAD, of_rank
from fedgrow_algo.fedgrow import MIDDLE, FedGrow
from fedgrow_algo.rounds import FINETUNE, first_global, own_target
from fedsim.algorithm import (
    LATER,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Frozen,
    Partial,
    Payload,
    ServerContext,
    Steps,
    whole_sum,
)
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import State, Tree, mapped, to
from fedsim.data.config import DataConfig
from fedsim.learning.features import check_classes, feature_size, head_of
from fedsim.learning.ridge import in_double, ridge, sums_of
from fedsim.learning.task import Task
from fedsim.models import Form


G, H = "g", "h"  # beside Global, what is sent
PUBLIC, TURN = "public", "turn"  # parts of a participant's private state: the public model's features, and Q


@dataclasses.dataclass(frozen=True)
class FedGrowAnalytic(FedGrow):
    """Staged Fed-Grow with one ridge regression for everyone's head.

    - `gamma`: weight of W's squares, beside a mean over examples.
    - `align`: public examples on which strangers find common coordinates (`Experiment.start` gives these); their labels
      are not read. None: features are summed as they are.
    """

    gamma: float = 1e-3
    align: DataConfig | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "gamma", above=0)
        if not self.federate:
            refuse("algorithm.federate", self.federate, "True: the head is solved from everyone's sums")

    @property
    def name(self) -> str:
        return "fedgrow_analytic" if self.align is None else "fedgrow_analytic_aligned"

    @property
    def sends_statistics(self) -> bool:
        return True

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        super().check(task, forms, intermediate, target)
        check_classes(task)
        if self.align is not None:
            check_public(self.align, task)

    def check_experiment(self, experiment: Any) -> None:
        if self.align is not None and experiment.start is None:
            refuse("start", None, "a public model, whose coordinates algorithm.align gives to all")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        nothing = torch.zeros(_size(ctx.task, ctx.target), ctx.task.inputs.num_classes, dtype=torch.float64)
        return super().server_init(ctx) | {HEAD: _head(ctx.task, ctx.target, nothing)}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return super().server_broadcast({**state, HEAD: mapped(Tensor.float, state[HEAD])}, cohort, ctx)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        if self.stage(ctx.round) == FINETUNE:
            return super().server_aggregate(state, updates, ctx)
        total = whole_sum(updates)
        if total is None:
            return state
        double = torch.empty(0, dtype=torch.float64)
        mean = total.mean(like={**state, G: double, H: double})
        solved = ridge(mean.pop(G), mean.pop(H), self.gamma)
        return self.server.step(state, mean) | {HEAD: _head(ctx.task, ctx.target, solved)}

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        state = yield from super().client_init(ctx)
        if self.align is None:
            return state
        first = to(first_global(self.preset, ctx, self.rank), ctx.device)
        state |= {PUBLIC: self._public_features(ctx, ctx.initial(ctx.target))}
        return state | {TURN: self._turn(self._grown(first, state, ctx), state, ctx)}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        if self.stage(ctx.round) == FINETUNE:
            return (yield from super().client_update(payload, state, ctx))
        target = self._grown(self._global(payload, state), state, ctx)
        if self.align is not None:
            state = {**state, TURN: self._turn(target, state, ctx)}
        update, kept = yield from super().client_update(payload, state, ctx)
        size = _size(ctx.task, ctx.target)
        shard, turned = ctx.train, self._turned(state, ctx.device)
        g, h = sums_of(ctx.task, ctx.target, target, shard, self.batch_size, ctx.device, size=size, then=turned)
        examples = max(1, ctx.info.num_examples)
        tree = {**update.tree, G: g / examples, H: h / examples}
        return dataclasses.replace(update, tree=tree), kept

    def _global(self, payload: Payload, state: State) -> Tree:
        return {name: tensor for name, tensor in payload.items() if name != HEAD}

    def _frozen(self, payload: Payload, state: State) -> Frozen:
        return {**super()._frozen(payload, state), HEAD: _solved(payload, state)}

    def _target(self, payload: Payload, state: State, ctx: ClientContext) -> Tree:
        return own_target(state) or {**super()._target(payload, state, ctx), **_solved(payload, state)}

    @torch.no_grad()
    def _grown(self, operator: Tree, state: State, ctx: ClientContext) -> Tree:
        """T_i, in float64."""
        growing = of_rank(self.rank, self.preset, ctx.task, ctx.intermediate, ctx.target)
        return growing.grow(*(mapped(in_double, tree) for tree in (operator, state[MIDDLE])))

    def _public_features(self, ctx: ClientContext, model: Tree) -> Tensor:
        """Of the public examples; of none, where the run is only being counted."""
        assert self.align is not None
        if not len(ctx.train):
            return torch.zeros(0, feature_size(ctx.task, ctx.target), dtype=torch.float64)
        examples = ctx.examples(self.align)
        return features_of(ctx.task, ctx.target, to(model, ctx.device), examples, self.batch_size, ctx.device)

    def _turn(self, target: Tree, state: State, ctx: ClientContext) -> Tree:
        own, public = self._public_features(ctx, target), state[PUBLIC].cpu()
        centred = len(head_of(ctx.task, ctx.target)) > 1
        return procrustes(own, public, centred) if len(own) else unturned(own.shape[1])

    def _turned(self, state: State, device: torch.device) -> Callable[[Tensor], Tensor]:
        if TURN not in state:
            return lambda f_nd: f_nd
        turn = to(state[TURN], device)
        return lambda f_nd: f_nd @ turn[ROTATION] + turn[SHIFT]


def _size(task: Task, form: Form) -> int:
    """D: how many features a head reads, and one more where it has a bias."""
    return feature_size(task, form) + len(head_of(task, form)) - 1


def _head(task: Task, form: Form, W: Tensor) -> Tree:
    """W, `(D, classes)`, as the parameters of the head."""
    d = feature_size(task, form)
    return {
        name: (W[d] if name.endswith(".bias") else W[:d].T).clone(memory_format=torch.contiguous_format)
        for name in head_of(task, form)
    }


def _solved(payload: Payload, state: State) -> Tree:
    """The head that came, as it reads a participant's own features; nothing while nobody has solved one."""
    head = payload[HEAD]
    if not any(tensor.any() for tensor in head.values()):
        return {}
    return turned_head(head, state[TURN]) if TURN in state else head
