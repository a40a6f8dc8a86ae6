"""The parameters that training starts from: a checkpoint's, or drawn from the seed."""

from fedsim.core import tree as trees
from fedsim.core.seeding import derive
from fedsim.core.tree import Tree
from fedsim.learning.task import Task
from fedsim.models import Form, pretrained
from fedsim.models.checkpoint import Checkpoint


def load_small(task: Task, form: Form, checkpoint: Checkpoint, seed: int) -> Tree:
    """A checkpoint's model (`fedsim.models.pretrained.load`), held against the task."""
    return pretrained.load(task.config.family, form, task.inputs, checkpoint, seed)


def start_of(task: Task, form: Form, checkpoint: Checkpoint | None, seed: int) -> Tree:
    """A model that all clients begin with: the checkpoint's, or the one that the seed gives.

    **Raises:** `ValueError` as `check_start` does.
    """
    if checkpoint is not None:
        check_start(task, form, checkpoint, seed)
        return load_small(task, form, checkpoint, seed)
    return trees.clone(task.fresh(form, derive(seed, "target", 0)))


def check_start(task: Task, form: Form, checkpoint: Checkpoint, seed: int) -> None:
    """Everything that can be wrong with a checkpoint (`fedsim.models.pretrained.check`) as the task's."""
    config = task.config
    pretrained.check(config.family, form, task.inputs, checkpoint, seed, config.data)
