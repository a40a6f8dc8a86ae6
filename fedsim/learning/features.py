"""Features: what a classifier's head reads, at one width for models of all widths.

    h = what the head of a model reads, as wide as its form
    z = P h, the features; P is a projection of the model's own, and absent where h has their width already
    W z + b, the logits

A model is a tree with the names of its form, a head that reads z, and P under `PROJECTION`.

Letters: N examples, C classes, F width of the features, W width of a form.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.fields import refuse
from fedsim.core.tree import Tree
from fedsim.data.dataset import Split
from fedsim.learning.objectives import Frozen
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


PROJECTION = "projection"


def check_classes(task: Task) -> None:
    """**Raises:** `ValueError` unless each example has one class: only then has a class a mean of features."""
    if task.inputs.kind not in ("image", "text"):
        refuse("task.data", task.inputs.kind, "of kind 'image' or 'text': one class an example")


def width_of(forms: Sequence[Form], features: int | None) -> int:
    """Width of the features: as asked for, or that of the widest form."""
    return features or max(form.width for form in forms)


def head_of(task: Task, form: Form) -> tuple[str, ...]:
    """Names of the head's parameters: those with a row for each class."""
    return tuple(name for name, spec in task.specs(form).items() if spec.parsed_parts[0].group == "class")


def head(task: Task, form: Form) -> str:
    """The name of the linear layer that they belong to."""
    return head_of(task, form)[0].rpartition(".")[0]


def feature_size(task: Task, form: Form) -> int:
    """How many numbers that layer is given for an example."""
    return task.skeleton(form).get_parameter(f"{head(task, form)}.weight").shape[1]


def with_features(task: Task, form: Form, model: Tree, width: int, generator: torch.Generator) -> Tree:
    """The model with features of this width: where its head reads another, P and a head of that width are drawn."""
    if form.width == width:
        return model
    names = head_of(task, form)
    device = model[names[0]].device
    found = {name: tensor for name, tensor in model.items() if name not in names}
    found[PROJECTION] = drawn_matrix((width, form.width), generator).to(device)
    for name in names:
        matrix = model[name].dim() == 2
        drawn = drawn_matrix((len(model[name]), width), generator) if matrix else torch.zeros(len(model[name]))
        found[name] = drawn.to(device)
    return found


def drawn_matrix(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix as torch draws that of a linear layer: uniform in +-1 / sqrt(in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def logits_and_features(task: Task, form: Form, model: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `(N, C)` and features `(N, F)` from one forward pass; gradients reach `model`.

    In the head's place stands one that says both: whatever the model does with logits afterwards, as GPT-2 takes those
    of the last token, it does with features.
    """
    names = head_of(task, form)
    linear: dict[str, Any] = {name.rpartition(".")[2]: model[name] for name in names}
    rest = {name: tensor for name, tensor in model.items() if name not in (*names, PROJECTION)}

    def both(h: Tensor) -> Tensor:
        z = F.linear(h, model[PROJECTION]) if PROJECTION in model else h
        return torch.cat([F.linear(z, **linear), z], -1)

    module = task.skeleton(form).get_submodule(head(task, form))
    module.forward = both
    try:
        logits, features = task.forward(form, rest, batch).tensor_split([task.inputs.num_classes], -1)
    finally:
        del module.forward
    return logits, features


def features(task: Task, form: Form, model: Tree, batch: Batch) -> Tensor:
    """Features `(N, F)`; gradients reach `model`."""
    return logits_and_features(task, form, model, batch)[1]


def plain(task: Task, form: Form, model: Tree) -> nn.Module:
    """The Hugging Face module that gives the same logits: W P is its head, to rounding."""
    if PROJECTION not in model:
        return task.module(form, model)
    merged = {name: model[name] @ model[PROJECTION] for name in head_of(task, form) if model[name].dim() == 2}
    return task.module(form, model | merged)


@dataclasses.dataclass(frozen=True)
class FeatureLoss:
    """The task's loss of a model with features."""

    task: Task
    form: Form

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return self.task.loss(logits_and_features(self.task, self.form, parameters, batch)[0].float(), batch)


@dataclasses.dataclass(frozen=True)
class PrototypeLoss:
    """The task's loss, and `weight` times the mean squared distance of features from the prototype of their class.

    - `frozen["prototypes"]`: `(C, F)`. - `frozen["known"]`: which of them there are, `(C,)`; of others, no distance.
    """

    task: Task
    form: Form
    weight: float

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        logits, features = logits_and_features(self.task, self.form, parameters, batch)
        wanted, known = (_of(batch["labels"], frozen[name].float()) for name in ("prototypes", "known"))
        distance = ((features.float() - wanted).square() * known[:, None]).mean()
        return self.task.loss(logits.float(), batch) + self.weight * distance


def _of(labels: Tensor, rows: Tensor) -> Tensor:
    """The row of each label; of an image that is mixed, its shares of rows."""
    return labels @ rows if labels.is_floating_point() else rows[labels]


@torch.no_grad()
def prototypes(
    task: Task, form: Form, model: Tree, shard: Split, batch_size: int, device: torch.device
) -> tuple[Tree, Tree]:
    """Mean features `(F,)` of each class of a shard, and how many examples it has, by the class's number.

    A shard without examples, by which it is counted what is sent, stands for one with all classes: at most so much is.
    """
    classes = task.inputs.num_classes
    width = len(model[PROJECTION]) if PROJECTION in model else form.width
    sums, counts = torch.zeros(classes, width, dtype=torch.float64), torch.bincount(shard.labels, minlength=classes)
    for index in torch.arange(len(shard.labels)).split(batch_size) if len(shard.labels) else ():
        batch = task.batch(shard, index, device)
        features = logits_and_features(task, form, model, batch)[1].double().cpu()
        sums += F.one_hot(shard.labels[index], classes).double().T @ features
    held = [label for label in range(classes) if counts[label] or not len(shard.labels)]
    means = {str(label): (sums[label] / counts[label].clamp(min=1)).float() for label in held}
    return means, {str(label): counts[label].float() for label in held}


def points_of(sent: Iterable[Tree]) -> tuple[Tensor, Tensor]:
    """Prototypes of several clients, by the class's number: `(N, F)`, and their classes `(N,)`, client by client."""
    pairs = [(tree[label], int(label)) for tree in sent for label in sorted(tree, key=int)]
    if not pairs:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    return torch.stack([point for point, _ in pairs]), torch.tensor([label for _, label in pairs])


def fitted(
    start: Tree,
    loss: Callable[[Tree, Tensor, Tensor], Tensor],
    points_NF: Tensor,
    labels_N: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tree:
    """What plain SGD at the server makes of `start` on what clients sent, in an order that is drawn for each epoch.

    Where nothing came, `start` itself.

    - `loss`: of the parameters, on some points and their labels.
    """
    if not len(labels_N):
        return start
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=lr)
    for _ in range(epochs):
        for index in torch.randperm(len(labels_N), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss(leaves, points_NF[index], labels_N[index]).backward()
            optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}
