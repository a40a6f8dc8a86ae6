"""Objectives: what local training minimises, as a function of trained tensors, frozen tensors and a batch.

An objective is a frozen dataclass. Its fields say what is computed (a form, a weight, a preset); tensors are never
fields but arguments. Two clients' trainings can therefore be computed as one exactly if their objectives are the same
(`identity`) and their tensors have equal shapes, and what a step costs is known by the same two things.

Write one at the top of a module. Its fields are numbers, texts, None, dtypes, devices, a `Task`, other frozen
dataclasses, and tuples of these. It must not branch on the value of a tensor nor call `.item()`: it is also called on
tensors without values, to count, and on those of many clients at once. What wraps another objective passes `frozen` on,
so it takes a name of its own in it.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.core.tree import State, Tree, flat
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


Frozen = Mapping[str, Any]  # tensors by name, or trees of them: what an objective reads and nobody trains


class Objective(Protocol):
    """A frozen dataclass that is called as below. Of randomness it uses none."""

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch, /) -> Tensor:
        """The loss, a scalar; gradients reach `parameters`, nested as the training's start is."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """The task's loss of the model of this form.

    - `frozen["model"]`: those of the model's parameters that are not trained; nothing if all are.
    """

    task: Task
    form: Form

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        logits = self.task.forward(self.form, {**frozen.get("model", {}), **parameters}, batch)
        return self.task.loss(logits.float(), batch)  # in fp32, for bf16 has three digits


@dataclasses.dataclass(frozen=True)
class Proximal:
    """`objective + mu / 2 |theta - anchor|^2` (FedProx, Li et al., MLSys 2020, equation 2).

    - `frozen["anchor"]`: a tree of the names it holds near.
    """

    objective: Objective
    mu: float

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        anchor, theta = flat(frozen["anchor"]), flat(parameters)
        distance = torch.stack([(theta[name] - anchor[name]).square().sum() for name in anchor]).sum()
        return self.objective(parameters, frozen, batch) + self.mu / 2 * distance


@dataclasses.dataclass(frozen=True)
class Corrected:
    """`objective`, with a correction added to its gradient, as SCAFFOLD's and FedDyn's; its value stays.

    - `frozen["correction"]`: a tree of the names it corrects.
    """

    objective: Objective

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        correction, theta = flat(frozen["correction"]), flat(parameters)
        inner = torch.stack([(correction[name] * theta[name]).sum() for name in theta if name in correction]).sum()
        return self.objective(parameters, frozen, batch) + (inner - inner.detach())


ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def identity(value: Any, name: str = "objective") -> Hashable:
    """What an objective is: equal for two exactly if they have the same types and values all the way down.

    **Raises:** `TypeError` for what has no such thing: it is no frozen dataclass, or holds tensors, lists, functions.
    """
    if type(value) in ATOMS:
        return type(value), value
    if type(value) is tuple:
        return tuple, *(identity(item, f"{name}[{at}]") for at, item in enumerate(value))
    if isinstance(value, Task):
        return type(value), identity(value.config, f"{name}.config")
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor: pass it in Training(..., frozen=...)")
    kind = type(value)
    if isinstance(value, type) or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        accepted = "a frozen dataclass" if name == "objective" else "a number, a text, a tuple or a frozen dataclass"
        raise TypeError(f"{name}={value!r}: must be {accepted}")
    if "<locals>" in kind.__qualname__:
        raise TypeError(f"{name}: {kind.__qualname__} must be defined at the top of its module")
    names = [field.name for field in dataclasses.fields(kind)]
    if more := getattr(value, "__dict__", {}).keys() - names:
        raise TypeError(f"{name}.{min(more)} must be a field of {kind.__qualname__}")
    return kind, *(identity(getattr(value, each), f"{name}.{each}") for each in names)
