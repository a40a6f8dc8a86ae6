"""The parameters that training starts from: a checkpoint's, or drawn from the seed."""

import abc
from collections.abc import Mapping
from typing import Any

from fedsim.core import tree as trees
from fedsim.core.seeding import derive
from fedsim.core.tree import Tree
from fedsim.learning.task import Task
from fedsim.models import Form, pretrained
from fedsim.models.checkpoint import Checkpoint


class Start(abc.ABC):
    """A public model that everyone may begin with, whatever form a method gives it (`Experiment.start`).

    Concrete classes are frozen dataclasses: `fedgrow_algo.grown.Grown` grows a checkpoint.

    - `checkpoints`: what it is made of, whose constants all models of the experiment share.
    """

    checkpoints: tuple[Checkpoint, ...]

    @abc.abstractmethod
    def parameters(self, task: Task, form: Form, seed: int) -> Tree:
        """A model of this form; nobody may write to it.

        - `seed`: what is not public, a head among it, is drawn from it.

        **Raises:** `ValueError` where there is no model of this form to begin with.
        """

    @abc.abstractmethod
    def downloads(self, task: Task, form: Form) -> Mapping[str, int]:
        """What it takes to make that model, with the bytes of each: what a participant downloads once."""


def initial(ctx: Any, form: Form, purpose: str = "target") -> Tree:
    """Parameters that everyone begins with, at the server as at clients: public, or drawn from the seed.

    - `ctx`: a server's or a client's context. - `purpose`: of the draw.
    """
    drawn = derive(ctx.seed, purpose, 0)
    return ctx.task.fresh(form, drawn) if ctx.start is None else ctx.start.parameters(ctx.task, form, drawn)


def load_small(task: Task, form: Form, checkpoint: Checkpoint, seed: int) -> Tree:
    """A checkpoint's model (`fedsim.models.pretrained.load`), held against the task."""
    return pretrained.load(task.config.family, form, task.inputs, checkpoint, seed)


def start_of(ctx: Any, form: Form, checkpoint: Checkpoint | None) -> Tree:
    """A model that all clients begin with: the checkpoint's that a method names itself, or else `initial`.

    **Raises:** `ValueError` as `check_start` does.
    """
    if checkpoint is not None:
        check_start(ctx.task, form, checkpoint, ctx.seed)
        return load_small(ctx.task, form, checkpoint, ctx.seed)
    return trees.clone(ctx.initial(form))


def check_start(task: Task, form: Form, checkpoint: Checkpoint, seed: int) -> None:
    """Everything that can be wrong with a checkpoint (`fedsim.models.pretrained.check`) as the task's."""
    config = task.config
    pretrained.check(config.family, form, task.inputs, checkpoint, seed, config.data)
