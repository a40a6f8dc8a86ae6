"""One function that stands for several: proof that objectives differ in tensors alone.

Objectives are closures: functions of parameters and batch that have captured a task, a form, hyperparameters, and now
and then tensors (an anchor, a frozen model). Those of two participants are one function if their code is the same and
what they captured is equal but for tensors, of which only the shapes need be. That function is what `alike` returns,
with a place for each tensor that differs. Whatever it does not know it takes for different.

Functions are taken to be pure: what they write to is written once for all. What they find in their modules is shared.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor


# Equal if `==` says so. What is none of these is taken apart.
ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Unlike(Exception):
    """Values that are not one value but for tensors; the text says where they part."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lift:
    """The place of a tensor, and what each of the values has there."""

    tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Open:
    """A value made of `parts`, some of which lack their tensors."""

    parts: tuple[Any, ...]
    build: Callable[[Sequence[Any]], Any]


def alike(values: Sequence[Any], own: tuple[type, ...] = ()) -> Any:
    """One value that stands for several.

    Fields of objects may differ as well, as long as they are not read: a participant's context holds its id. Reading
    one from what stands for all raises `Unlike`.

    - `own`: types that are never looked into, because what is one participant's is no other's.

    **Returns:** the value; a `Lift` or an `Open` if it lacks tensors (`lifts` says which, `filled` puts them in).
    **Raises:** `Unlike`.
    """
    return _Merge(own).of(values)


def lifts(value: Any) -> list[Lift]:
    """The places of tensors in what `alike` returned, each once."""
    if isinstance(value, Open):
        return list({id(lift): lift for part in value.parts for lift in lifts(part)}.values())
    return [value] if isinstance(value, Lift) else []


def filled(value: Any, tensors: Mapping[Lift, Tensor]) -> Any:
    """What `alike` returned, with a tensor in each of its places."""
    if isinstance(value, Open):
        return value.build([filled(part, tensors) for part in value.parts])
    return tensors[value] if isinstance(value, Lift) else value


# parts ----------------------------------------------------------------------------------------------------------------


class _Refused(str):
    """Why nothing stands for some values."""


class _Differing:
    """In the place of a field that differs."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __get__(self, instance: object, owner: type) -> Any:
        raise Unlike(self.why)


@dataclasses.dataclass(frozen=True)
class _Merge:
    """One `alike`.

    `seen`: ids of values -> these, that nothing else takes their ids, and what stands for them: a tensor in two places
    is one tensor.
    """

    own: tuple[type, ...]
    seen: dict[tuple[int, ...], tuple[Sequence[Any], Any]] = dataclasses.field(default_factory=dict)

    def of(self, values: Sequence[Any]) -> Any:
        first, key = values[0], tuple(map(id, values))
        if all(value is first for value in values):
            return first
        if key not in self.seen:
            self.seen[key] = values, _Refused(f"a {type(first).__name__} holds itself")  # as long as it is looked into
            try:
                self.seen[key] = values, self._apart(values)
            except Unlike as difference:
                self.seen[key] = values, _Refused(difference)
        found = self.seen[key][1]
        if isinstance(found, _Refused):
            raise Unlike(found)
        return found

    def _apart(self, values: Sequence[Any]) -> Any:
        first, kind = values[0], type(values[0])
        if any(type(value) is not kind for value in values):
            raise Unlike(f"a {kind.__name__} is something else elsewhere")
        if isinstance(first, Tensor):
            if len({(t.shape, t.dtype, t.device) for t in values}) > 1 or any(t.requires_grad for t in values):
                raise Unlike(f"a tensor {tuple(first.shape)} is of another kind elsewhere, or trained")
            return Lift(tuple(values))
        if kind in ATOMS:
            if any(value != first for value in values):
                raise Unlike(f"{first!r} is not the same everywhere")
            return first
        if kind.__new__ is object.__new__ and hasattr(first, "__dict__"):
            return self._objects(values)
        build, parts = _taken_apart(first)
        return self._built(build, [parts, *(_taken_apart(value)[1] for value in values[1:])], first)

    def _objects(self, values: Sequence[Any]) -> Any:
        """An object with the fields that are alike; the others raise when they are read."""
        first, kind = values[0], type(values[0])
        if kind in self.own:
            raise Unlike(f"a {kind.__name__} is each participant's own")
        fields = [_fields(value) for value in values]
        if any(each.keys() != fields[0].keys() for each in fields):
            raise Unlike(f"a {kind.__name__} has other fields elsewhere")
        same, differing = [], {}
        for name in fields[0]:
            try:
                self.of([each[name] for each in fields])
                same.append(name)
            except Unlike as difference:
                differing[name] = _Differing(f"{kind.__name__}.{name}: {difference}")
        standing = type(kind.__name__, (kind,), differing) if differing else kind

        def build(parts: Sequence[Any]) -> Any:
            made = object.__new__(standing)
            vars(made).update(zip(same, parts, strict=True))
            return made

        return self._built(build, [[each[name] for name in same] for each in fields], None if differing else first)

    def _built(self, build: Callable[[Sequence[Any]], Any], parts: Sequence[Sequence[Any]], whole: Any) -> Any:
        """What is made of merged parts; `whole`, if there is one, where they are the parts it has."""
        if len({len(each) for each in parts}) > 1:
            raise Unlike("there are more or fewer parts elsewhere")
        merged = tuple(map(self.of, zip(*parts, strict=True)))
        if whole is not None and all(map(operator.is_, merged, parts[0])):
            return whole
        return Open(merged, build) if any(isinstance(part, Lift | Open) for part in merged) else build(merged)


def _fields(value: object) -> dict[str, Any]:
    """What an object holds; of a dataclass its fields, for what else it holds it has computed from them."""
    held = vars(value)
    if not dataclasses.is_dataclass(value):
        return held
    return {field.name: held[field.name] for field in dataclasses.fields(value) if field.name in held}


def _taken_apart(value: Any) -> tuple[Callable[[Sequence[Any]], Any], tuple[Any, ...]]:
    """The parts of a value, and how to make one of others like them. **Raises:** `Unlike` if it is of another kind."""
    if type(value) in (list, tuple):
        return type(value), tuple(value)
    if type(value) is dict:
        return lambda parts: dict(zip(parts[0], parts[1:], strict=True)), (tuple(value), *value.values())
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        return lambda parts: functools.partial(parts[0], *parts[1], **parts[2]), parts
    if type(value) is MethodType:
        return lambda parts: MethodType(*parts), (value.__func__, value.__self__)
    if type(value) is FunctionType:
        try:
            captured = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError as error:  # a cell is still empty
            raise Unlike(f"{value.__qualname__} has captured what is not there yet") from error
        modules = value.__globals__

        def function(parts: Sequence[Any]) -> FunctionType:
            code, defaults, keywords, *contents = parts
            made = FunctionType(code, modules, code.co_name, defaults, tuple(map(CellType, contents)))
            made.__kwdefaults__ = keywords
            return made

        return function, (value.__code__, value.__defaults__, value.__kwdefaults__, *captured)
    raise Unlike(f"a {type(value).__name__} cannot be looked into")
