"""What a sub-model keeps, read off what was taken out of a model whose entries are their own coordinates."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedsim.core.submodel import join_fused, split_fused, split_specs
from fedsim.core.tree import Tree
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form, get_family


Kept = dict[tuple[str, int], list[int]]  # (parameter, dimension) -> coordinates of the larger model, in local order

MOST_DIMENSIONS = 4


def shapes_of(task: Task, form: Form) -> dict[str, torch.Size]:
    """Names and shapes of the model that the family builds, without memory."""
    with torch.device("meta"):
        model = get_family(task.config.family).build(form, task.inputs)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def coordinates(task: Task, form: Form, dimension: int) -> Tree:
    """A model whose entries say where they are along one dimension; in each part of a fused one, counted from 0."""
    return dict(_coordinates(task.config, form, dimension))


@functools.lru_cache(maxsize=128)
def _coordinates(config: TaskConfig, form: Form, dimension: int) -> Tree:
    task = Task(config)
    whole = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes_of(task, form).items()}
    parts = split_fused(whole, task.specs(form), form.axes)
    for name, tensor in parts.items():
        if dimension < tensor.ndim:
            number = torch.arange(tensor.shape[dimension], dtype=torch.float64)
            parts[name] = number.reshape(-1, *[1] * (tensor.ndim - dimension - 1)).expand(tensor.shape).clone()
    return join_fused(parts, task.specs(form))


def kept_by(task: Task, target: Form, small: Form, extract: Callable[[Tree], Mapping[str, Tensor]]) -> Kept:
    """Which coordinates of the target a sub-model of the form `small` has, fused parameters apart."""
    kept: Kept = {}
    for dimension in range(MOST_DIMENSIONS):
        parts = split_fused(extract(coordinates(task, target, dimension)), task.specs(small), small.axes)
        for name, tensor in parts.items():
            if dimension < tensor.ndim:
                rows = tensor.movedim(dimension, 0).reshape(tensor.shape[dimension], -1)
                assert (rows == rows[:, :1]).all(), f"{name}: what is kept depends on the other dimensions"
                kept[name, dimension] = rows[:, 0].long().tolist()
    return kept


def assert_aligned(task: Task, target: Form, small: Form, kept: Kept) -> None:
    """What a sub-model is must be a network: coordinates that meet in it are one coordinate of the larger one.

    One list of the residual stream everywhere, in one order; one list of the MLP in each block; each local head from
    one global head, the same one for queries, keys and values, with equal lists for queries and keys; heads that are
    turned whole and in order; tokens, classes, positions and pixels all there.
    """
    specs, sizes = split_specs(task.specs(target)), small.axes
    residual: dict[str, set] = {}
    inner: dict[int | None, set] = {}
    heads: dict[tuple[int | None, str], set] = {}
    tied = {"embed"}
    for (name, dimension), coordinates in kept.items():
        spec = specs[name]
        dim = spec.parsed[dimension]
        tied |= {dim.group} if dim.tied else set()
        if not dim.axes:
            assert coordinates == [*range(len(coordinates))], f"{name}: all there, in order"
        elif dim.axes == ("embed",):
            residual.setdefault(dim.group, set()).add(tuple(coordinates))
        elif dim.axes == ("mlp",):
            inner.setdefault(spec.layer, set()).add(tuple(coordinates))
        else:
            *_, last = dim.axes
            grid = torch.tensor(coordinates).reshape(-1, sizes[last])
            whole, inside = grid // target.axes[last], grid % target.axes[last]
            assert (whole == whole[:, :1]).all(), f"{name}: a local head is made of several"
            numbers = whole[:, 0]
            if "group" in dim.axes:  # queries that share keys and values: all of them, in order
                group = target.axes["group"]
                shared = numbers[::group] // group
                expected = (shared[:, None] * group + torch.arange(group)).flatten()
                assert torch.equal(numbers, expected), f"{name}: queries read keys that are not theirs"
                rows = inside.reshape(-1, group, sizes[last])
                assert (rows == rows[:, :1]).all(), f"{name}: a group of heads has several lists"
                numbers, inside = shared, rows[:, 0]
            assert len({*numbers.tolist()}) == len(numbers), f"{name}: two local heads are of one"
            if last == "rotary":
                assert (inside == torch.arange(target.axes["rotary"])).all(), f"{name}: a turned head is cut"
            key = tuple(numbers.tolist()), tuple(map(tuple, inside.tolist()))
            heads.setdefault((spec.layer, dim.group), set()).add(key)
    for lists in (*residual.values(), *inner.values(), *heads.values()):
        assert len(lists) == 1, "one axis, several lists"
    assert len({only for group in tied & {*residual} for only in residual[group]}) == 1, "a tied head is misread"
    for layer in inner:
        ((query,), (key,), (value,)) = (heads[layer, group] for group in ("query", "key", "value"))
        assert query == key, "queries meet keys of other coordinates"
        assert query[0] == value[0], "attention of one head weighs values of another"
    for (name, _), coordinates in kept.items():
        assert len({*coordinates}) == len(coordinates), f"{name}: a coordinate twice"
