"""Dual-LiGO: two operators of one kind, one private, one shared.

    M_i = Local_i(S_i)        small form of participant i -> common intermediate form
    T_i = Global(M_i)         intermediate form           -> target form

Local and Global are the same class with different sizes (`fedgrow_algo.ligo.Operator`). The grown model is run with the
grown tensors in place of the module's parameters, so gradients reach the operator through an unmodified Hugging Face
forward pass, and the operator is applied once a step, not once an example.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fedgrow_algo.ligo import Operator
from fedgrow_algo.presets import by_name
from fedsim.core.tree import Tree
from fedsim.learning.task import Batch, Task
from fedsim.learning.training import Forward
from fedsim.models import Form, get_family


USUAL_BATCH = 64  # texts


def operator_between(preset: str, task: Task, small: Form, large: Form) -> Operator:
    """The LiGO operator from one form of the task's family to another.

    **Raises:** `ValueError` if the preset cannot map `small` into `large`; both forms are named.
    """
    post_norm = get_family(task.config.family).post_norm
    try:
        return Operator(by_name(preset), task.specs(small), task.specs(large), small.axes, large.axes, post_norm)
    except ValueError as error:
        raise ValueError(f"growing {small} into {large}: {error}") from error


def grown_forward(
    task: Task, operator: Operator, stacked: Mapping[str, Tensor], large: Form, checkpoint: bool = False
) -> Forward:
    """`(operator's tensors, batch) -> logits` of the model of form `large` grown from a small one, which stays frozen.

    **Arguments:**

    - `stacked`: the small model's weights as `operator.stack` returns them.
    - `checkpoint`: keep nothing of what lies between small and grown weights; grow again in the backward pass.
    """

    table = looked_up(task, operator, stacked)

    def grow(tensors: Mapping[str, Tensor], batch: Batch) -> Tree:
        if table is None:
            return operator.grow(tensors, stacked)
        ids, rows = batch["input_ids"].flatten(), stacked[table]
        used = rows[ids] * first_of_each(ids, len(rows))[:, None]
        tree = operator.grow(tensors, {**stacked, table: used})
        grown_rows = tree[table].new_zeros(len(rows), tree[table].shape[-1])
        return tree | {table: grown_rows.index_add(0, ids, tree[table])}

    def forward(tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if checkpoint:
            tree = recomputed(grow, tensors, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            tree = grow(tensors, batch)
        return task.forward(large, tree, batch)

    return forward


def looked_up(task: Task, operator: Operator, stacked: Mapping[str, Tensor]) -> str | None:
    """The table of tokens of which a step needs only the rows of the tokens in its batch: one that no head reads.

    None where a usual batch could use every row: growing all of them is then as cheap.
    """
    tables = [name for name, spec in operator.small.items() if spec.dims == ("=token", "embed")]
    if not tables or any(dim.tied for dim in operator.dims):
        return None
    (table,) = tables
    assert task.inputs.max_length
    return table if len(stacked[table]) > USUAL_BATCH * task.inputs.max_length else None


def first_of_each(ids: Tensor, size: int) -> Tensor:
    """Whether each entry is the first of its value: `(n,)` numbers below `size` to `(n,)` of bools."""
    places = torch.arange(len(ids), device=ids.device)
    first = places.new_full((size,), len(ids)).scatter_reduce(0, ids, places, "amin")
    return first[ids] == places


def grown(operator: Operator, tensors: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> Tree:
    """The grown weights as a tree of their own, detached."""
    return {name: tensor.detach().clone() for name, tensor in operator.grow(tensors, stacked).items()}
