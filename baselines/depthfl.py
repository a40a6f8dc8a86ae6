"""DepthFL: everyone trains the first blocks its device can hold, with a head after each part (Kim et al., ICLR 2023).

    participant k        depth D_k: the most blocks whose model has no more parameters than its own small model
    round r, k           loss at every exit up to D_k:
                         sum_i CE(exit_i) + c_r sum_i mean_{j != i} KL(exit_j, held fixed || exit_i)
    round r, server      each tensor: the mean over those who have it, weighted by examples

Differs from the paper: exits of the model's own kind (last normalisation and head) instead of a bottleneck of their
own; AdamW without FedDyn's correction (the paper's tables have both); a participant deploys its deepest exit alone, not
the ensemble of its exits, which is no single model.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
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
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree, clone, flat, mapped, nested
from fedsim.learning.exits import EXIT, ExitsLoss, ends_at, shallower, tail, up_to
from fedsim.learning.rates import parameter_count
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer
from fedsim.learning.task import Task
from fedsim.models import Form


COVERED = "covered"  # beside the model: of each tensor whether anyone has trained it so far, one bool


@dataclasses.dataclass(frozen=True)
class DepthFL(LocalTraining):
    """DepthFL of the target.

    - `exits`: parts that the target's blocks are divided into, each with a head after it.
    - `distillation`: c; 0: exits do not teach each other. - `ramp`: rounds over which it comes in, as exp(-5 (1-t)^2).
    - `server`: what the server makes of the mean.
    """

    exits: int = 4
    distillation: float = 1.0
    ramp: int = 5
    server: ServerOptimizer = AVERAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "exits", "ramp", least=1)
        check_range(self, "algorithm", "distillation", least=0)

    @property
    def name(self) -> str:
        return "depthfl"

    @property
    def leaves(self) -> Leaves:
        return "sub-model"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        model, end = ctx.initial(ctx.target), tail(ctx.task, ctx.target)
        body, exits = {name: tensor for name, tensor in model.items() if name not in end}, {}
        for depth in ends_at(ctx.target.depth, self.exits):
            last = depth == ctx.target.depth
            fresh = model if last else ctx.initial(ctx.target, f"exit {depth}")
            exits[str(depth)] = {name: fresh[name] for name in end}
        model = body | {EXIT: exits}
        return self.server.start(model) | {COVERED: mapped(lambda _: torch.tensor(False), model)}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        depths = {client.id: self._depths(ctx.task, client.form, ctx.target) for client in cohort}
        parts = {held: self._part(state, ctx, held) for held in {*depths.values()}}
        return {id_: parts[held] for id_, held in depths.items()}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        sums: Tree = {}
        weights: dict[str, float] = {}
        for update in updates:
            assert isinstance(update, ClientUpdate)
            for name, tensor in flat(update.tree).items():
                scaled = tensor.double() * update.weight
                sums[name] = sums[name] + scaled if name in sums else scaled
                weights[name] = weights.get(name, 0.0) + update.weight
        state = clone(state)
        before, covered = flat(state), flat(state[COVERED])
        mean = nested({name: (total / weights[name]).to(before[name].dtype) for name, total in sums.items()})
        ever = nested(covered | {name: torch.tensor(True) for name in sums})
        return self.server.step(state, mean) | {COVERED: ever}

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return self._model(state, ctx.task, ctx.target, ctx.target.depth)

    def server_covered(self, state: State) -> Tree | None:
        model = flat(state)
        return {name: was.expand(model[name].shape) for name, was in flat(state[COVERED]).items()}

    def _part(self, state: State, ctx: ServerContext, depths: tuple[int, ...]) -> State:
        body = {name: state[name] for name in sorted(up_to(ctx.task, ctx.target, depths[-1]))}
        return body | {EXIT: {str(depth): state[EXIT][str(depth)] for depth in depths}}

    def _depths(self, task: Task, form: Form, target: Form) -> tuple[int, ...]:
        """The exits that a participant has: those of the deepest model its device can hold, at least the first."""
        ends, own = ends_at(target.depth, self.exits), parameter_count(task, form)
        held = [depth for depth in ends if parameter_count(task, shallower(target, depth)) <= own]
        return tuple(held) or ends[:1]

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        depths = self._depths(ctx.task, ctx.info.form, ctx.target)
        objective = ExitsLoss(ctx.task, ctx.target, depths, self.distillation > 0 and len(depths) > 1)
        # c_t moves from round to round: as a tensor it is no part of what the objective is.
        ramped = self.distillation * math.exp(-5 * (1 - min(1.0, ctx.round / self.ramp)) ** 2)
        frozen = {"ramped": torch.tensor(ramped, dtype=torch.float32, device=ctx.device)}
        trained = yield Training(objective, payload, frozen, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        deepest = self._depths(ctx.task, ctx.info.form, ctx.target)[-1]
        return self._model(dict(payload), ctx.task, ctx.target, deepest)

    def _model(self, tree: State, task: Task, target: Form, depth: int) -> nn.Module:
        kept = up_to(task, target, depth)
        body = {name: tensor for name, tensor in tree.items() if name in kept}
        return task.module(shallower(target, depth), body | tree[EXIT][str(depth)])
