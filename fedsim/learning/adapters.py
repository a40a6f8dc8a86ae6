"""Low-rank adapters on the matrices of a model's blocks (LoRA, Hu et al., ICLR 2022): W = W0 + scale B A.

Where B and A are given, R between them may be all that is trained: B R A (Fed-SB, 2025).

In training they stand beside their matrices, W0 x + scale B (A x): neither B A nor a gradient of its size is formed.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.fields import refuse
from fedsim.core.tree import State, Tree
from fedsim.learning.objectives import Frozen
from fedsim.learning.rates import rate_of
from fedsim.learning.task import Batch, Task
from fedsim.models import Form, get_family


A, B = "a", "b"  # parts of adapters, under the names of the matrices
HEAD = "head"  # beside them: what comes after the blocks
R, MODEL = "r", "model"  # of adapters B R A, the inner factor; beside A and B that nobody trains, W0


def adapted(task: Task, form: Form) -> dict[str, int]:
    """Every matrix of a block that reads one axis and writes another, and which of its dimensions it writes.

    A fused matrix has one adapter.
    """
    found = {}
    for name, spec in task.specs(form).items():
        modes = [dim.mode for dim in next(iter(spec.parts(name).values())).parsed]
        if spec.layer is not None and sorted(modes) == ["read", "write"]:
            found[name] = modes.index("write")
    return found


def rank_of(task: Task, target: Form, form: Form, rank: int) -> int:
    """The rank of a device with a small model of `form`: its rate of the `rank` of those that hold the target.

    **Raises:** `ValueError` as `fedsim.learning.rates.rate_of` does.
    """
    return math.ceil(rank * rate_of(task, target, form))


def check_rank(task: Task, form: Form, rank: int, forms: Sequence[Form] = ()) -> None:
    """Refuse what cannot be an adapter of a model of this form.

    **Arguments:**

    - `forms`: of the small models of devices whose ranks go by their rates.

    **Raises:** `ValueError` for a rank that some matrix does not have, or a device whose rate cannot be told.
    """
    for small in forms:
        rank_of(task, form, small, rank)
    with torch.device("meta"):
        module = get_family(task.config.family).build(form, task.inputs)
    ranks = {name: min(module.get_parameter(name).shape) for name in adapted(task, form)}
    name, most = min(ranks.items(), key=lambda found: found[1])
    if rank > most:
        refuse("algorithm.rank", rank, f"at most {most}, the rank of {name} in the target {form}")


def fresh(matrices: Mapping[str, Tensor], writes: Mapping[str, int], rank: int, generator: torch.Generator) -> State:
    """Adapters that change nothing yet: A uniform in +-1 / sqrt(in), `(rank, in)`; B zero, `(out, rank)`."""
    a, b = dict[str, Tensor](), dict[str, Tensor]()
    for name, position in sorted(writes.items()):
        out, in_ = matrices[name].shape[position], matrices[name].shape[1 - position]
        drawn = torch.rand(rank, in_, generator=generator)
        a[name] = (2 * drawn - 1) / math.sqrt(in_)
        b[name] = torch.zeros(out, rank)
    return {A: a, B: b}


def products(adapters: State, writes: Mapping[str, int]) -> Tree:
    """B A of each matrix, laid out as the matrix is."""
    changes = {name: adapters[B][name] @ adapters[A][name] for name in writes}
    return {name: change if writes[name] == 0 else change.mT for name, change in changes.items()}


def applied(base: Tree, adapters: State, writes: Mapping[str, int], scale: float) -> Tree:
    """The model with its adapters merged into it; gradients reach them."""
    return {**base, **{name: base[name] + scale * change for name, change in products(adapters, writes).items()}}


def logits_beside(
    task: Task, form: Form, model: Mapping[str, Tensor], adapters: State, scale: float, batch: Batch
) -> Tensor:
    """Logits of what `applied` gives, the adapters beside their matrices; gradients reach them and `model`."""
    skeleton, hooks = task.skeleton(form), []

    def beside(name: str):
        def add(module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> Tensor:
            return result + scale * (arguments[0] @ adapters[A][name].mT @ adapters[B][name].mT)

        return add

    try:
        for name in adapters[B]:
            module = skeleton.get_submodule(name.rpartition(".")[0])
            hooks.append(module.register_forward_hook(beside(name)))
        return task.forward(form, {**model}, batch)
    finally:
        for hook in hooks:
            hook.remove()


@dataclasses.dataclass(frozen=True)
class AdapterLoss:
    """The task's loss of a model with adapters; trained are factors and, under `HEAD`, what comes after the blocks.

    - `frozen["model"]`: W0. - `frozen["adapters"]`: factors that are not trained, if there are any.
    """

    task: Task
    form: Form
    scale: float

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        model = {**frozen["model"], **parameters.get(HEAD, {})}
        adapters = {**frozen.get("adapters", {}), **parameters}
        logits = logits_beside(self.task, self.form, model, adapters, self.scale, batch)
        return self.task.loss(logits.float(), batch)


@dataclasses.dataclass(frozen=True)
class InnerLoss:
    """The task's loss of a model with adapters B R A; trained are R and, under `HEAD`, parameters of the model.

    - `frozen["model"]`: W0. - `frozen["a"]`, `frozen["b"]`: A and B of each matrix.
    """

    task: Task
    form: Form

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        factors = {A: frozen[A], B: with_inner(frozen[B], parameters[R])}
        model = {**frozen[MODEL], **parameters[HEAD]}
        logits = logits_beside(self.task, self.form, model, factors, 1.0, batch)
        return self.task.loss(logits.float(), batch)


def with_inner(b: Tree, r: Tree) -> Tree:
    """B R of each matrix, `(out, r)`."""
    return {name: b[name] @ r[name] for name in b}


def outer_factors(matrices: Tree, writes: dict[str, int], rank: int, generator: torch.Generator) -> State:
    """B of orthonormal columns, `(out, rank)`, and A of orthonormal rows, `(rank, in)`, of each matrix."""
    a, b = dict[str, Tensor](), dict[str, Tensor]()
    for name, position in sorted(writes.items()):
        out, in_ = matrices[name].shape[position], matrices[name].shape[1 - position]
        for part, size in ((b, out), (a, in_)):
            drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
            part[name] = torch.linalg.qr(drawn).Q.float()
        a[name] = a[name].T.contiguous()
    return {A: a, B: b}


def norm(adapters: State, writes: Mapping[str, int]) -> float:
    """Frobenius norm of all B A together."""
    return math.sqrt(sum(float(change.double().square().sum()) for change in products(adapters, writes).values()))


def resized(adapters: State, rank: int) -> State:
    """Factors cut to their first ranks, or padded with zeros; what else there is as it is."""
    state = {**adapters}
    if A in state:
        state[A] = {n: F.pad(a, (0, 0, 0, max(0, rank - len(a))))[:rank] for n, a in state[A].items()}
    if B in state:
        state[B] = {n: F.pad(b, (0, max(0, rank - b.shape[1])))[:, :rank] for n, b in state[B].items()}
    return state
