"""What a classifier sees: the representation of an example that a model's head is given."""

from collections.abc import Mapping

from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.data.config import PER_TOKEN
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


def check_classes(task: Task) -> None:
    """**Raises:** `ValueError` unless every example has a class."""
    if task.inputs.kind in PER_TOKEN:
        refuse("task.data.kind", task.inputs.kind, "'image' or 'text': each example has a class")


def head(task: Task, form: Form) -> str:
    """The name of the linear layer that gives each class its score. Of models that classify examples."""
    (name,) = {n for n, spec in task.specs(form).items() if len(spec.dims) == 2 and spec.dims[0] == "=class"}
    return name.rpartition(".")[0]


def feature_size(task: Task, form: Form) -> int:
    """How many numbers that layer is given for an example."""
    return task.skeleton(form).get_parameter(f"{head(task, form)}.weight").shape[1]


def features(task: Task, form: Form, tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The input of the head's linear layer, `(n, d)`; gradients reach `tree`.

    The layer hands on what it is given, so what the model does with scores (the last token's alone, in some families)
    it does with features.
    """
    module = task.skeleton(form).get_submodule(head(task, form))
    hook = module.register_forward_hook(lambda layer, arguments, scores: arguments[0])
    try:
        return task.forward(form, {**tree}, batch)
    finally:
        hook.remove()
