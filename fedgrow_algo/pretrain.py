"""Where a participant's small model comes from."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from fedsim.algorithm import ClientContext, Steps, TaskLoss, Training
from fedsim.core.fields import refuse
from fedsim.core.seeding import derive
from fedsim.core.submodel import Cut
from fedsim.core.tree import Tree, to
from fedsim.learning.exits import shallower
from fedsim.learning.meter import PRETRAIN
from fedsim.learning.starts import load_small
from fedsim.learning.task import Task
from fedsim.models import Form


Init = Literal["independent", "common"]  # whether random numbers are each participant's own, or one draw for all


def trained_on_own_shard(
    ctx: ClientContext, *, lr: float, epochs: int, init: Init = "independent", **settings: Any
) -> Steps[Tree]:
    """A model of the participant's own form, trained on its own shard: from its tier's checkpoint, from the public
    model that everyone begins with (`Experiment.start`), or from scratch.

    From scratch is what the paper's code does. With no epochs a checkpoint is taken as it is, and its tensors are those
    that every participant in the process holds: nobody may write to them.

    It is what the participant is assumed to bring along: its parameters count as trained nowhere, its cost in round 0.

    - `init`: where training from scratch starts: at a model of the participant's own, or at its part of `common_start`.
    - `settings`: of `Training`.
    """
    form, task, checkpoint = ctx.info.form, ctx.task, ctx.info.checkpoint
    if checkpoint is None and ctx.start is not None:
        start = ctx.initial(form, "small")
    elif checkpoint is None and init == "common":
        start = common_start(task, form, ctx.intermediate, derive(ctx.seed, "small"))
    elif checkpoint is None:
        start = task.fresh(form, ctx.derive("small"))
    else:
        start = load_small(task, form, checkpoint, ctx.seed)
        if not epochs:
            return to(start, ctx.device)
    objective, start = TaskLoss(task, form), to(start, ctx.device)
    trained = yield Training(objective, start, purpose=PRETRAIN, lr=lr, epochs=epochs, **settings)
    return trained.parameters


def untrained(ctx: ClientContext) -> Tree:
    """A model of the participant's own form, as it was brought: its tier's checkpoint, the public model that everyone
    begins with, or drawn, alike for all of one form, as authors of methods with private models begin. Nobody may write
    to it."""
    if ctx.info.checkpoint is not None:
        return to(load_small(ctx.task, ctx.info.form, ctx.info.checkpoint, ctx.seed), ctx.device)
    return to(ctx.initial(ctx.info.form, "small"), ctx.device)


def common_start(task: Task, form: Form, largest: Form, seed: int) -> Tree:
    """A corner of one random model of form `largest`: its first blocks, heads and coordinates of every axis.

    Models of all forms then begin with coordinates that mean the same, as far as they have them.
    """
    cut_from = shallower(largest, form.depth)
    specs, whole = task.specs(cut_from), task.fresh(largest, seed)
    lists = {axis: torch.arange(size) for axis, size in form.axes.items()}
    return Cut(specs, cut_from.axes, lists).extract({name: whole[name] for name in specs})


def check_init(init: Init, forms: Sequence[Form], largest: Form) -> None:
    """**Raises:** `ValueError` if a small form is not a corner of the largest, and one draw for all is asked for."""
    if init == "common" and (why := no_corner(forms, largest)):
        refuse("algorithm.init", init, f"'independent' where {why}")


def no_corner(forms: Sequence[Form], largest: Form) -> str | None:
    """Which of some forms has no `common_start`, and why; None where all have."""
    for form in forms:
        over = [axis for axis, size in form.axes.items() if size > largest.axes[axis]]
        if over or form.depth > largest.depth:
            what = f"axis {over[0]!r} is larger" if over else "depth is larger"
            return f"a small form ({form}) is no corner of {largest}: {what}"
    return None
