"""Models cut in depth: which parameters come after the blocks, and a model that can be left after some of them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.core.tree import State
from fedsim.learning.objectives import Frozen
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


EXIT = "exit"  # tails beside a body: {"exit": {"<depth>": {...}}}


def ends_at(depth: int, exits: int) -> tuple[int, ...]:
    """Depths at which a model of `depth` blocks may be left, evenly: `(8, 4)` gives 2, 4, 6, 8."""
    return tuple(sorted({max(1, round(depth * (number + 1) / exits)) for number in range(exits)}))


def shallower(form: Form, depth: int) -> Form:
    """The same form with fewer blocks."""
    return dataclasses.replace(form, depth=depth)


def tail(task: Task, form: Form) -> tuple[str, ...]:
    """Names of the parameters that come after the blocks, as the family says: but for what is tied.

    **Raises:** `ValueError` if the family names none: a model would have exits without a head.
    """
    specs = task.specs(form)
    names = tuple(name for name, _ in task.skeleton(form).named_parameters() if specs[name].after)
    if not names:
        accepted = "a family that says which parameters stand after its blocks (`ParamSpec.after`)"
        refuse("task.family", task.config.family, accepted)
    return names


def up_to(task: Task, form: Form, depth: int) -> set[str]:
    """Names of the parameters of what comes before the blocks and of the first `depth` blocks."""
    end = {*tail(task, form)}
    return {n for n, spec in task.specs(form).items() if n not in end and (spec.layer is None or spec.layer < depth)}


def exit_logits(
    task: Task,
    form: Form,
    body: Mapping[str, Tensor],
    tails: Sequence[Mapping[str, Tensor]],
    depths: Sequence[int],
    batch: Batch,
) -> list[Tensor]:
    """Logits at each exit; every block runs once, what comes before the blocks once an exit.

    **Arguments:**

    - `form`: of the whole model. - `body`: its parameters but for the tail, at least of the blocks up to the last exit.
    - `tails`: the tail of each exit, under the names of the whole model's. - `depths`: ascending.
    """
    specs, cut = task.specs(form), shallower(form, depths[-1])
    logits: list[Tensor] = []
    before, result = 0, None
    for depth, end in zip(depths, tails, strict=True):
        held = range(before, depth)
        used = {name: t for name, t in body.items() if specs[name].layer is None or specs[name].layer in held}
        with _blocks_alone(task, cut, held, result) as results:
            logits.append(task.forward(cut, used | dict(end), batch))
        before, result = depth, results[-1]
    return logits


@dataclasses.dataclass(frozen=True)
class ExitsLoss:
    """The sum of the task's losses at some exits and, if they teach each other, c times what they learn (DepthFL).

    - `form`: of the whole model. - `depths`: of the exits, ascending. - `taught`: whether they teach each other.

    - `frozen["ramped"]`: c, a scalar.
    """

    task: Task
    form: Form
    depths: tuple[int, ...]
    taught: bool

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        body = {name: tensor for name, tensor in parameters.items() if name != EXIT}
        tails = [parameters[EXIT][str(depth)] for depth in self.depths]
        exits = exit_logits(self.task, self.form, body, tails, self.depths, batch)
        logits = [each.float() for each in exits]
        loss = torch.stack([self.task.loss(each, batch) for each in logits]).sum()
        if not self.taught:
            return loss
        return loss + frozen["ramped"] * sum(self._distance(logits, own, batch) for own in range(len(logits)))

    def _distance(self, logits: list[Tensor], own: int, batch: Batch) -> Tensor:
        """Mean KL divergence of one exit from each of the others, which are held fixed."""
        student, others = logits[own], [each.detach() for number, each in enumerate(logits) if number != own]
        distance = self.task.distillation
        found = [distance(student, each, batch) - distance(each, each, batch) for each in others]
        return torch.stack(found).mean()


@contextlib.contextmanager
def _blocks_alone(task: Task, form: Form, held: range, result: Any) -> Iterator[list[Any]]:
    """Run some blocks of a skeleton; those before them say `result`, those after them what the last one returned.

    Blocks stay where they are in the stack, for some do what depends on their number.

    **Yields:** a list whose last entry, once the skeleton has run, is what the last block returned.
    """
    module, results = task.skeleton(form), [result]
    names = {spec.layer: name.removesuffix(f".{spec.role}") for name, spec in task.specs(form).items()}
    blocks = [module.get_submodule(names[layer]) for layer in range(form.depth)]
    others = [block for layer, block in enumerate(blocks) if layer not in held]
    for block in others:
        block.forward = lambda *arguments, **named: results[-1]
    hook = blocks[held[-1]].register_forward_hook(lambda block, arguments, returned: results.append(returned))
    try:
        yield results
    finally:
        hook.remove()
        for block in others:
            del block.forward
