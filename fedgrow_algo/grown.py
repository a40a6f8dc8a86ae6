"""Public models that everyone begins with, grown into the form that a method trains (`Experiment.start`).

    form of a checkpoint          its weights as they are
    larger than a checkpoint      the largest that fits, grown by a preset, untrained
    a checkpoint's, but shallower the first blocks of the shallowest such checkpoint, and what comes after the blocks

So FedAvg of any form, HeteroFL on the target, adapters of the target, and Fed-Grow's small models can all begin with
what is public, and a comparison gives nobody more than the others.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from fedgrow_algo.dual_ligo import grown, operator_between
from fedgrow_algo.presets import PRESETS
from fedsim.core.fields import check_types, refuse
from fedsim.core.seeding import generator
from fedsim.core.tree import Tree
from fedsim.data.content import stamp
from fedsim.learning.exits import shallower, tail, up_to
from fedsim.learning.rates import parameter_count
from fedsim.learning.starts import Start, check_start, load_small
from fedsim.learning.task import Task
from fedsim.models import Form, get_family
from fedsim.models.checkpoint import Checkpoint, files_of
from fedsim.models.pretrained import form_of


@dataclasses.dataclass(frozen=True)
class Grown(Start):
    """Checkpoints, and how they grow.

    - `checkpoints`: one or several of a ladder, all of the task's family and vocabulary.
    - `preset`: the growth operator (`fedgrow_algo.presets`); one with random numbers draws them from the seed.
    """

    checkpoints: tuple[Checkpoint, ...]
    preset: str = "preserving"

    def __post_init__(self) -> None:
        check_types(self, "start")
        if self.preset not in PRESETS:
            refuse("start.preset", self.preset, f"one of {', '.join(PRESETS)}")
        if not self.checkpoints:
            refuse("start.checkpoints", self.checkpoints, "at least one checkpoint")

    def parameters(self, task: Task, form: Form, seed: int) -> Tree:
        contents = tuple(stamp(*files_of(each)) for each in self.checkpoints)
        return dict(_parameters(self, Task(task.config), form, seed, contents))

    def downloads(self, task: Task, form: Form) -> Mapping[str, int]:
        checkpoint, _ = self._nearest(task, form)
        weights = [path for path in files_of(checkpoint) if path.suffix in (".safetensors", ".bin")]
        return {checkpoint.path: sum(Path(path).stat().st_size for path in weights)}

    def _nearest(self, task: Task, form: Form) -> tuple[Checkpoint, Form]:
        """The checkpoint that a model of this form is made of, and its form."""
        wanted = _sizes(task, form)
        held = [(each, form_of(task.config.family, each)) for each in self.checkpoints]
        sizes = [_sizes(task, own) for _, own in held]
        fits = [each for each, own in zip(held, sizes, strict=True) if all(own[a] <= wanted[a] for a in own)]
        if fits:
            return max(fits, key=lambda each: parameter_count(task, each[1]))
        deeper = [each for each, own in zip(held, sizes, strict=True) if own | {"depth": wanted["depth"]} == wanted]
        if deeper:
            return min(deeper, key=lambda each: each[1].depth)
        there = ", ".join(str(own) for _, own in held)
        accepted = f"a checkpoint no larger than {form}, or as wide and deeper; there are {there}"
        refuse("start.checkpoints", [each.path for each in self.checkpoints], accepted)


def _sizes(task: Task, form: Form) -> dict[str, int]:
    """Every axis of a form, as the family builds it, and its depth."""
    family = get_family(task.config.family)
    whole = family.form(family.config(form, task.inputs))
    return {**whole.axes, "depth": whole.depth}


@functools.lru_cache(maxsize=4)
def _parameters(start: Grown, task: Task, form: Form, seed: int, contents: object) -> Tree:
    checkpoint, held = start._nearest(task, form)
    check_start(task, held, checkpoint, seed)
    small = load_small(task, held, checkpoint, seed)
    if _sizes(task, held) == _sizes(task, form):
        return small
    if held.depth > form.depth:
        cut = shallower(held, form.depth)
        kept = up_to(task, held, form.depth) | {*tail(task, held)}
        return {name: small[name] for name in task.specs(cut) if name in kept}
    operator = operator_between(start.preset, task, held, form)
    return grown(operator, operator.init(generator(seed, "start")), operator.stack(small))
