"""Fed-Grow whose grown models are drawn to common class means, the project's own variant.

z_i(x): features of x, what the head of T_i reads. C_c: the server's prototype of class c. n_ic of the n_i examples of
participant i are of class c.

    participant i, once      bring or train S_i; freeze it; draw Local_i
    round r, participant i   receive Global and C; train Local_i and Global through the task loss of
                             T_i = Global(Local_i(S_i)), plus lambda |z_i(x) - C_y|^2; keep Local_i;
                             send Global, the mean C_ic of z_i over its examples of each class, and n_ic / n_i
    round r, server          Global <- sum_i n_i Global_i / sum_i n_i
                             C_c <- sum_i n_ic C_ic / sum_i n_ic; of a class that nobody has, as it was
    result                   T_i, one for each participant
    optionally, afterwards   train T_i itself, each participant alone

A mean of operators says little where what they grow has coordinates that mean different things. Class means are as wide
as the target for everyone: the term gives all grown models the same ones, which only Local_i can do for strangers. So
this is the joint form (`fedgrow_algo.joint`), which trains Local_i in every round; the staged one is done with it
before there is a prototype. The term is FedProto's: each example is drawn, and thereby the means are.

C_ic is sent times n_ic / n_i, zeros for a class that a participant lacks: every update has one shape, classes x
(width + 1) numbers beside the operator, and is added up where it is. How a shard's labels are dealt leaves with it.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from fedgrow_algo.joint import GLOBAL, FedGrowJoint
from fedgrow_algo.rounds import FINETUNE, first_global, server_state
from fedsim.algorithm import ClientContext, ClientUpdate, Partial, Payload, ServerContext, Steps, whole_sum
from fedsim.core.fields import check_range
from fedsim.core.tree import State
from fedsim.learning.features import PrototypeLoss, check_classes, prototypes
from fedsim.learning.objectives import Frozen
from fedsim.learning.task import Task
from fedsim.models import Form


PROTOTYPES, KNOWN = "prototypes", "known"  # of the server's state: `(C, F)`, and of which classes, `(C,)`
SUMS, SHARES = "sums", "shares"  # of an update: class means times shares, `(C, F)`, and the classes' shares, `(C,)`


@dataclasses.dataclass(frozen=True)
class FedGrowAnchored(FedGrowJoint):
    """Joint Fed-Grow with prototypes. Other fields are those of `FedGrowJoint`.

    - `weight`: of the distance to them, lambda; the mean square over features.
    """

    weight: float = dataclasses.field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "weight", least=0)

    @property
    def name(self) -> str:
        return "fedgrow_anchored" if self.rank is None else "fedgrow_anchored_lowrank"

    @property
    def sends_statistics(self) -> bool:
        return True

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        super().check(task, forms, intermediate, target)
        check_classes(task)

    def objective(self, ctx: ClientContext) -> PrototypeLoss:
        return PrototypeLoss(ctx.task, ctx.target, self.weight)

    def received(self, payload: Payload) -> tuple[Payload, Frozen]:
        return payload[GLOBAL], {name: part for name, part in payload.items() if name != GLOBAL}

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        classes = ctx.task.inputs.num_classes
        state = server_state({GLOBAL: first_global(self.preset, ctx, self.rank)}, self.server, self.finetune_after, ctx)
        none = {
            PROTOTYPES: torch.zeros(classes, ctx.target.width),
            KNOWN: torch.zeros(classes, dtype=torch.bool),
        }
        return state | none

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        if self.stage(ctx.round) == FINETUNE:
            return super().server_aggregate(state, updates, ctx)
        total = whole_sum(updates)
        if total is None:
            return state
        mean = total.mean({})
        held = mean[SHARES] > 0
        found = mean[SUMS] / torch.where(held, mean[SHARES], 1.0)[:, None]
        prototypes = torch.where(held[:, None], found, state[PROTOTYPES])
        after = self.server.step(state, {GLOBAL: mean[GLOBAL]})
        return after | {PROTOTYPES: prototypes, KNOWN: state[KNOWN] | held}

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        update, kept = yield from super().client_update(payload, state, ctx)
        if self.stage(ctx.round) == FINETUNE:
            return update, kept
        target = self._target({GLOBAL: update.tree}, kept, ctx)
        means, counts = prototypes(ctx.task, ctx.target, target, ctx.train, self.batch_size, ctx.device)
        shares = torch.zeros(ctx.task.inputs.num_classes)
        sums = torch.zeros(len(shares), ctx.target.width)
        for label, mean in means.items():
            shares[int(label)] = counts[label] / max(len(ctx.train.labels), 1)
            sums[int(label)] = shares[int(label)] * mean
        return dataclasses.replace(update, tree={GLOBAL: update.tree, SUMS: sums, SHARES: shares}), kept
