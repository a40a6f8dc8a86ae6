"""Fed-Grow whose small models are matched to a public one before they grow, the project's own variant.

R: a public model of S_i's form, the reference: the tier's checkpoint or the public start (`Experiment.start`) where
there is one, or else the first corner of one random model (`common_start`). Local_0: Local as the seed draws it.

    participant i, once      train S_i on its own shard
                             in each block, put heads and units of the MLP in the order P that makes |P S_i - R|^2
                             least; freeze S_i
                             train Local_i through the task loss of M_i = Local_i(S_i), plus
                             mu / 2 |M_i - Local_0(R)|^2; freeze M_i
    round r, server          as in `fedgrow_algo.fedgrow`, from here on

Heads of a block, and units of its MLP, may change places: the model computes the same. Two models that were trained
apart need not agree on the order, and a mean of operators that grow them then mixes what has nothing in common. The
best order for a reference is an assignment problem in each block, solved exactly (Hungarian method). Coordinates of the
residual stream and those within a head stay in place. Where queries share keys and values, a key's head moves with its
queries, whose order is then the same in all heads of the block.

A participant does this for itself: what is sent is Global, as ever.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedgrow_algo.dual_ligo import grown, looked_up, operator_between
from fedgrow_algo.fedgrow import Begun, FedGrow
from fedgrow_algo.pretrain import common_start, no_corner, untrained
from fedgrow_algo.rounds import local_stream
from fedsim.algorithm import ClientContext, TaskLoss
from fedsim.core.fields import check_range, refuse
from fedsim.core.seeding import derive
from fedsim.core.submodel import Cut, Dim, split_fused, split_specs
from fedsim.core.tree import Tree, to
from fedsim.learning.objectives import Proximal
from fedsim.learning.task import Task
from fedsim.models import Form


UNITS = ("head", "kv_head", "group", "mlp")  # axes of a block whose coordinates may change places


@dataclasses.dataclass(frozen=True)
class FedGrowMatched(FedGrow):
    """Fed-Grow of matched small models. Other fields are those of `FedGrow`.

    - `mu`: weight of the term that keeps M_i near the reference's; 0: small models are matched, and no more.
    """

    mu: float = dataclasses.field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "mu", least=0)
        if not self.federate:
            refuse("algorithm.federate", self.federate, "True: what is matched is so for the mean")

    @property
    def name(self) -> str:
        return "fedgrow_matched"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        super().check(task, forms, intermediate, target)
        if intermediate is not None and (why := no_corner(forms, intermediate)):
            refuse(
                "intermediate",
                intermediate,
                f"a form of which every small form is a corner, no axis larger and no deeper: {why}",
            )

    def begun(self, small: Tree, ctx: ClientContext) -> Begun:
        local = operator_between(self.preset, ctx.task, ctx.info.form, ctx.intermediate)
        reference = to(reference_of(ctx), ctx.device)
        stacked = local.stack(reference)
        anchor = grown(local, to(local.init(local_stream("common", ctx)), ctx.device), stacked)
        rows_alone = looked_up(ctx.task, local, stacked)  # what a step does not grow as a whole has no distance
        anchor = {name: tensor for name, tensor in anchor.items() if name != rows_alone}
        near = Proximal(TaskLoss(ctx.task, ctx.intermediate), self.mu)
        return matched(ctx.task, ctx.info.form, small, reference), near, {"anchor": anchor}


def reference_of(ctx: ClientContext) -> Tree:
    """R, which everyone with a model of this form has without being sent it. Nobody may write to it."""
    if ctx.start is None and ctx.info.checkpoint is None:
        return common_start(ctx.task, ctx.info.form, ctx.intermediate, derive(ctx.seed, "small"))
    return untrained(ctx)


def matched(task: Task, form: Form, small: Tree, reference: Tree) -> Tree:
    """P S: the same function as S, with its heads and units where those of the reference are that are most like them.

    Where an axis is within another, as queries within the head of their key, it is matched after it.

    **Arguments:**

    - `small`, `reference`: models of this form.
    """
    specs = task.specs(form)
    R = split_fused(reference, specs, form.axes)
    for axis in UNITS:
        S, lists = split_fused(small, specs, form.axes), dict[str, Tensor]()
        for layer in range(form.depth):
            alike = torch.zeros(form.axes[axis], form.axes[axis], dtype=torch.float64)
            for name, spec in split_specs(specs).items():
                for position, dim in enumerate(spec.parsed):
                    if spec.layer == layer and axis in dim.axes:
                        one, other = (_by_unit(tree[name], dim, position, axis, form.axes) for tree in (S, R))
                        alike += one @ other.T
            # The distance is least where the inner products are largest: no order changes |S| or |R|.
            _, places = linear_sum_assignment(alike.numpy(), maximize=True)
            lists[f"{axis}.{layer}"] = torch.from_numpy(places).argsort()
        small = Cut(specs, form.axes, lists).extract(small)
    return small


def _by_unit(tensor: Tensor, dim: Dim, position: int, axis: str, axes: Mapping[str, int]) -> Tensor:
    """What belongs to each unit, `(units, others)`, in float64."""
    apart = tensor.double().cpu().unflatten(position, [axes[name] for name in dim.axes])
    return apart.movedim(position + dim.axes.index(axis), 0).reshape(axes[axis], -1)
