"""How much of the target a participant can hold: rates, the forms they give, and which axes they cut.

A rate r keeps ceil(r D) of the coordinates of each axis that is cut: the residual stream, the inner width of the MLP,
and the coordinates of every head, of which there stay as many (HeteroFL, Diao et al., ICLR 2021). The rates there are
by default are all that keep a whole number of every head's coordinates, D / D, ..., 2 / D, 1 / D ("fitting"): a device
trains as much as it can hold. The papers' powers of two leave up to three quarters of it unused. Attention is then
divided by the square root of what a head has left, as in any model of that form. Heads that rotary position embeddings
turn cannot be cut inside, where each pair of coordinates has a frequency of its own: there, whole heads of keys and
values go, with the queries that read them.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.core.submodel import Cut, ParamSpec
from fedsim.learning.task import Task
from fedsim.models import Form, Inputs, get_family


FITTING, POWERS = "fitting", (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
Rates = tuple[float, ...] | Literal["fitting", "powers_of_two"]


def check_rates(rates: Rates) -> None:
    """**Raises:** `ValueError` unless these are rates, largest first."""
    if isinstance(rates, str):
        return
    if not rates or any(not 0 < rate <= 1 for rate in rates) or list(rates) != sorted({*rates}, reverse=True):
        refuse("algorithm.rates", rates, "fractions of the target above 0 and at most 1, each once, largest first")


def rates_of(task: Task, target: Form, rates: Rates) -> tuple[float, ...]:
    """The rates that there are, largest first."""
    if rates == "powers_of_two":
        return POWERS
    if isinstance(rates, str):
        specs = task.specs(target)
        parts = target.axes["kv_head" if "kv_head" in cut_axes(specs) else "head_dim"]
        return tuple(part / parts for part in range(parts, 0, -1))
    return rates


def _exists(task: Task, target: Form, rate: float) -> bool:
    """Whether the family has a sub-model of this rate."""
    try:
        sub_form(task, target, rate)
    except ValueError:
        return False
    return True


def rate_of(task: Task, target: Form, form: Form, rates: Rates = FITTING) -> float:
    """The largest rate whose sub-model of the target has no more parameters than a model of `form`; else the last.

    **Raises:** `ValueError` if the family cannot build a sub-model that has to be compared.
    """
    own, there = parameter_count(task, form), rates_of(task, target, rates)
    if rates == FITTING:  # one coordinate of every head, or one head, and layers that are narrower still
        finer = (there[-1] / 2**halvings for halvings in range(1, 5))
        there = (*there, *(rate for rate in finer if _exists(task, target, rate)))
    first = bisect.bisect_left(there, True, key=lambda rate: parameter_count(task, sub_form(task, target, rate)) <= own)
    return there[min(first, len(there) - 1)]


def sub_form(task: Task, target: Form, rate: float) -> Form:
    """The form of the target's sub-model at a rate; normalisations add what the target's add.

    **Raises:** `ValueError` if the family has no model of this form.
    """
    return _sub_form(task.config.family, target, rate, task.inputs)


@functools.lru_cache(maxsize=256)
def _sub_form(family_name: str, target: Form, rate: float, inputs: Inputs) -> Form:
    family = get_family(family_name)
    whole = family.form(family.config(target, inputs))
    if rate == 1:
        return whole
    sizes = {axis: kept_of(size, rate) for axis, size in whole.axes.items()}
    fields = {"width": sizes["embed"], "mlp": sizes["mlp"]}
    if "kv_head" in cut_axes(family.specs(target, inputs)):
        fields |= {"kv_heads": sizes["kv_head"], "heads": sizes["kv_head"] * whole.axes["group"]}
    else:
        fields |= {"head_dim": sizes["head_dim"]}
    try:
        form = dataclasses.replace(whole, **fields)
        family.check(form, inputs)
    except ValueError as error:
        raise ValueError(f"the sub-model at rate {rate:g} of the target {target}: {error}") from error
    return form


def kept_of(size: int, rate: float) -> int:
    """`ceil(rate size)`, at least 1; a rate is a float, and 0.55 x 100 is to be 55."""
    return max(1, math.ceil(round(rate * size, 9)))


def cut_axes(specs: Mapping[str, ParamSpec]) -> tuple[str, ...]:
    """The axes that a rate cuts."""
    used = {axis for spec in specs.values() for dim in spec.parsed_parts for axis in dim.axes}
    return ("embed", "mlp", "kv_head" if "rotary" in used else "head_dim")


def cut_at(task: Task, target: Form, rate: float, first: Mapping[str, int] | None = None) -> Cut:
    """The sub-model at a rate that has the first coordinates of each axis.

    **Arguments:**

    - `first`: of each axis, the coordinate to begin with; the axis is a ring.
    """
    specs, form = task.specs(target), sub_form(task, target, rate)
    lists = {axis: window(target.axes[axis], form.axes[axis], (first or {}).get(axis, 0)) for axis in cut_axes(specs)}
    return Cut(specs, target.axes, lists)


def window(size: int, kept: int, first: int) -> Tensor:
    """`kept` coordinates of an axis of this size from `first` on, going round."""
    return (first + torch.arange(kept)) % size


def smallest(task: Task, forms: Sequence[Form]) -> Form:
    """The form with the fewest parameters; of equal ones the first by name."""
    return min(forms, key=lambda form: (parameter_count(task, form), str(form)))


def parameter_count(task: Task, form: Form) -> int:
    """Parameters of a model of this form."""
    return _parameter_count(task.config.family, form, task.inputs)


@functools.lru_cache(maxsize=256)
def _parameter_count(family: str, form: Form, inputs: Inputs) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in get_family(family).build(form, inputs).parameters())
