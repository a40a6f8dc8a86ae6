"""Dual-LiGO: two operators of one kind, one private, one shared.

    M_i = Local_i(S_i)        small form of participant i -> common intermediate form
    T_i = Global(M_i)         intermediate form           -> target form

Local and Global are the same class with different sizes (`fedgrow_algo.ligo.Operator`). The grown model is run with the
grown tensors in place of the module's parameters, so gradients reach the operator through an unmodified Hugging Face
forward pass, and the operator is applied once a step, not once an example.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fedgrow_algo.ligo import Operator
from fedgrow_algo.low_rank import LowRank
from fedgrow_algo.presets import by_name
from fedsim.core.tree import PATH, Tree, flat
from fedsim.learning.objectives import Frozen, Objective, TaskLoss
from fedsim.learning.task import Batch, Task
from fedsim.models import Form, get_family


USUAL_BATCH = 64  # texts
HEAD = "head"  # part of what is frozen: parameters that stand in the place of grown ones


def operator_between(preset: str, task: Task, small: Form, large: Form) -> Operator:
    """The LiGO operator, of full maps, from one form of the task's family to another.

    **Raises:** `ValueError` if the preset cannot map `small` into `large`; both forms are named.
    """
    return _operator(preset, Task(task.config), small, large)


@functools.lru_cache(maxsize=64)
def _operator(preset: str, task: Task, small: Form, large: Form) -> Operator:
    post_norm = get_family(task.config.family).post_norm
    try:
        return Operator(by_name(preset), task.specs(small), task.specs(large), small.axes, large.axes, post_norm)
    except ValueError as error:
        sizes = {name: (size, vars(large)[name]) for name, size in vars(small).items() if size != vars(large)[name]}
        told = ", ".join(f"form.{name} {old} and {new}" for name, (old, new) in sizes.items())
        raise ValueError(f"growing {small} into {large}: {error} ({told})") from error


def of_rank(rank: int | None, preset: str, task: Task, small: Form, large: Form) -> Operator | LowRank:
    """The same with maps of this rank; None: full ones. **Raises:** as `operator_between` does."""
    full = operator_between(preset, task, small, large)
    return full if rank is None else LowRank(full, rank)


@dataclasses.dataclass(frozen=True)
class GrownLoss:
    """The task's loss of the model of form `large` grown from one of form `small`; trained are the operator's tensors.

    - `checkpoint`: keep nothing of what lies between small and grown weights; grow again in the backward pass.
    - `rank`: of the maps; None: full ones.
    - `objective`: another loss of the grown model. Of a table that `looked_up` names it sees the rows of the batch.
    - `frozen["small"]`: the small model as `prepared` returns it. - `frozen["head"]`: what stands in the place of
      grown parameters; nothing if all are grown. The rest is the objective's.
    """

    task: Task
    preset: str
    small: Form
    large: Form
    checkpoint: bool = False
    rank: int | None = None
    objective: Objective | None = None

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        objective = self.objective or TaskLoss(self.task, self.large)
        weights = {**self.weights(parameters, frozen["small"], batch), **frozen.get(HEAD, {})}
        return objective(weights, frozen, batch)

    def logits(self, tensors: Mapping[str, Tensor], small: Mapping[str, Any], batch: Batch) -> Tensor:
        """Logits of the grown model; gradients reach the operator's `tensors`, and `small`, prepared."""
        return self.task.forward(self.large, self.weights(tensors, small, batch), batch)

    def weights(self, tensors: Mapping[str, Tensor], small: Mapping[str, Any], batch: Batch) -> Tree:
        """The weights of the grown model, likewise."""
        if self.checkpoint:
            return recomputed(self._grow, tensors, small, batch, use_reentrant=False, preserve_rng_state=False)
        return self._grow(tensors, small, batch)

    def _grow(self, tensors: Mapping[str, Tensor], small: Mapping[str, Any], batch: Batch) -> Tree:
        """The grown weights; of a large table of tokens only the rows that the batch uses."""
        operator = of_rank(self.rank, self.preset, self.task, self.small, self.large)
        full = operator if isinstance(operator, Operator) else operator.full
        table = looked_up(self.task, full, small)
        if table is None:
            return operator.grow(tensors, small)
        ids, size = batch["input_ids"].flatten(), _rows(small, table)
        first = first_of_each(ids, size)[:, None]
        tree = operator.grow(tensors, _at(table, small, lambda rows: rows[ids] * first))
        grown_rows = tree[table].new_zeros(size, tree[table].shape[-1])
        return tree | {table: grown_rows.index_add_(0, ids, tree[table])}


def _at(name: str, tree: Mapping[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same tree with the tensors of one name, at any level, changed."""
    return {
        key: _at(name, value, function) if isinstance(value, Mapping) else function(value) if key == name else value
        for key, value in tree.items()
    }


def _rows(tree: Mapping[str, Any], name: str) -> int:
    """How many rows the tensors of a name have, at any level."""
    return next(len(value) for path, value in flat(tree).items() if path.split(PATH)[-1] == name)


def looked_up(task: Task, operator: Operator, small: Mapping[str, Any]) -> str | None:
    """The table of tokens of which a step needs only the rows of the tokens in its batch: one that no head reads.

    None where a usual batch could use every row: growing all of them is then as cheap.
    """
    tables = [name for name, spec in operator.small.items() if spec.dims == ("=token", "embed")]
    if not tables or any(dim.tied for dim in operator.dims):
        return None
    (table,) = tables
    assert task.inputs.max_length
    return table if _rows(small, table) > USUAL_BATCH * task.inputs.max_length else None


def first_of_each(ids: Tensor, size: int) -> Tensor:
    """Whether each entry is the first of its value: `(n,)` numbers below `size` to `(n,)` of bools."""
    places = torch.arange(len(ids), device=ids.device)
    first = places.new_full((size,), len(ids)).scatter_reduce(0, ids, places, "amin")
    return first[ids] == places


def grown(operator: Operator | LowRank, tensors: Mapping[str, Tensor], small: Mapping[str, Any]) -> Tree:
    """The weights grown from a prepared small model, as a tree of their own, detached."""
    return {name: tensor.detach().clone() for name, tensor in operator.grow(tensors, small).items()}
