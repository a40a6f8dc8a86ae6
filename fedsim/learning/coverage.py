"""What the server of a partial-training method holds: the model, and which of its coordinates were ever trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.core.submodel import Cut, ParamSpec, ScatterMean, join_fused, split_fused, split_specs
from fedsim.core.tree import State, Tree
from fedsim.core.updates import ClientUpdate, Partial
from fedsim.data.dataset import Split
from fedsim.learning import server_opt
from fedsim.learning.server_opt import ServerOptimizer
from fedsim.learning.task import Task
from fedsim.models import Form


MODEL, COVERED = "model", "covered"  # parts of the server's state
ROWS = "rows"  # beside the parameters in an update: which classes and tokens it vouches for


def start(model: Tree, server: ServerOptimizer) -> State:
    """The server's first state: nothing is covered."""
    nothing = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in model.items()}
    return {MODEL: server.start(model), COVERED: nothing}


def model_of(state: State) -> Tree:
    """The model in a server's state."""
    return server_opt.model_of(state[MODEL])


def covered_of(state: State) -> Tree:
    """Which of its coordinates were trained so far, of bools."""
    return state[COVERED]


def averaged(
    state: State,
    updates: Iterable[ClientUpdate | Partial],
    task: Task,
    target: Form,
    server: ServerOptimizer,
    cut_of: Callable[[int], Cut],
) -> tuple[State, Tree]:
    """Each coordinate's mean over the clients of the round that have it (`fedsim.core.submodel.ScatterMean`).

    **Arguments:**

    - `target`: the form of the model in `state`. - `server`: what it makes of the mean.
    - `cut_of`: where a client's sub-model lies in the target.

    **Returns:** the next state, and which coordinates were trained in this round, of bools.
    """
    mean = ScatterMean(model_of(state), task.specs(target), target.axes)
    for update in updates:
        assert isinstance(update, ClientUpdate), "sums do not say where they belong"
        tree = {name: tensor for name, tensor in update.tree.items() if name != ROWS}
        mean.add(cut_of(update.client), tree, update.weight, update.tree.get(ROWS, {}))
    now, before = mean.covered(), state[COVERED]
    ever = {name: before[name] | now[name] for name in before}
    return {MODEL: server.step(state[MODEL], mean.mean(), where=now), COVERED: ever}, now


def everywhere(cuts: Sequence[tuple[int, Cut]], source: Mapping[str, Tensor]) -> Tree:
    """The mean of some blocks of a model, in the place of every block, in float64.

    **Arguments:**

    - `cuts`: how many blocks an axis has, and where the block lies. Where numbers differ, the mean of what each gives.

    A block of one tensor counts once, however many of the cuts it is in.
    """
    specs, total = cuts[0][1].specs, {}
    numbers = sorted({number for number, _ in cuts})
    for number in numbers:
        of_size = [cut for n, cut in cuts if n == number]
        axes, mean = of_size[0].small_axes, {}
        blocks = [split_fused(cut.extract(source), specs, axes) for cut in of_size]
        for name in blocks[0]:
            distinct = {_first(cut, name): block[name].double() for cut, block in zip(of_size, blocks, strict=True)}
            mean[name] = torch.stack([*distinct.values()]).mean(0)
        tiles = {axis: torch.arange(size) % axes[axis] for axis, size in of_size[0].axes.items()}
        tiled = Cut(split_specs(specs), axes, tiles).extract(mean)
        total = {name: tensor / len(numbers) + total.get(name, 0.0) for name, tensor in tiled.items()}
    return join_fused(total, specs)


def _first(cut: Cut, name: str) -> tuple[int, ...]:
    """Where the block of one parameter begins: what tells it from others of its size."""
    return tuple(0 if kept is None else int(kept[0]) for kept in cut.places[name])


def present(task: Task, split: Split, tree: Mapping[str, Tensor], specs: Mapping[str, ParamSpec]) -> Tree:
    """Which classes and tokens a split has, of bools; tokens that mean no text are everyone's."""
    inputs, data = task.inputs, split.inputs
    found = {"token": data.get("input_ids", torch.zeros(0)), "class": data.get("labels", split.labels)}
    special = [id_ for id_ in (inputs.padding_id, inputs.end_id, inputs.mask_id) if id_ is not None]
    rows: Tree = {}
    for name, spec in specs.items():
        for position, text in enumerate(spec.dims):
            kind = text.removeprefix("=")
            if text.startswith("=") and kind in found and kind not in rows:
                seen = torch.zeros(tree[name].shape[position], dtype=torch.bool)
                ids = found[kind].flatten().long()
                seen[ids[ids >= 0]] = True
                if kind == "token":
                    seen[special] = True
                rows[kind] = seen
    return rows
