"""Settings as they are typed, `field=value`, put into a tree of frozen dataclasses."""

import ast
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

from fedsim.core.fields import matches, shown


LITERAL = 10_000  # characters that are read as a Python literal; longer ones are a text


def parsed(text: str) -> Any:
    """A value typed on the command line: a Python literal, true, false, none, or else a text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text) if len(text) <= LITERAL else text
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        try:
            return float(text)  # inf, nan
        except ValueError:
            return text
    return tuple(value) if isinstance(value, list) else value


def replaced(instance: Any, changes: dict[tuple[str, ...], Any], prefix: str) -> Any:
    """`instance` with all changes below it applied at once: fields that depend on each other move together.

    A part that was None is given as its class: it is made of the fields that are set and the defaults of the others.
    """
    whole = instance if isinstance(instance, type) else type(instance)
    hints: dict[str, Any] = {}
    if isinstance(instance, tuple):
        names: dict[str, Any] = {str(index): item for index, item in enumerate(instance)}
    elif dataclasses.is_dataclass(whole):
        names = {field.name: getattr(instance, field.name, dataclasses.MISSING) for field in dataclasses.fields(whole)}
        hints = typing.get_type_hints(whole)
    else:
        raise ValueError(f"--set {prefix}: {prefix} has no fields")
    values = dict(names)
    for name in dict.fromkeys(path[0] for path in changes):
        field = f"{prefix}.{name}" if prefix else name
        if name not in names:
            raise ValueError(f"--set {field}: no such field{nearest(name, list(names))}")
        part = _part(names[name], hints.get(name))
        if (name,) in changes:
            values[name] = changes[(name,)]
            if part is not None and not (name in hints and matches(values[name], hints[name])):
                fields = ", ".join(f"{field}.{inner.name}" for inner in dataclasses.fields(part))
                raise ValueError(f"{field}={shown(values[name])}: set its fields instead: {fields}")
            if typing.get_origin(hints.get(name)) is tuple and isinstance(values[name], str | int | float):
                of_parts = dataclasses.is_dataclass(typing.get_args(hints[name])[0])
                values[name] = values[name] if of_parts else (values[name],)
        below = {path[1:]: value for path, value in changes.items() if path[0] == name and len(path) > 1}
        if below:
            values[name] = replaced(part if values[name] is None else values[name], below, field)
    if isinstance(instance, tuple):
        return tuple(values.values())
    for name, value in values.items():
        if value is dataclasses.MISSING:
            raise ValueError(f"--set {prefix}: there is none, so {prefix}.{name} must be given as well")
    try:
        return whole(**values)
    except ValueError as error:
        if not prefix or str(error).startswith(prefix):
            raise
        raise ValueError(f"{prefix}: {error}") from error


def _part(value: Any, hint: Any) -> Any:
    """The dataclass whose fields can be set below a field: its value's, or where that is None, the one it may have."""
    kinds = (type(value),) if value is not None else (hint, *typing.get_args(hint))
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def nearest(name: str, names: Sequence[str]) -> str:
    """`"; did you mean a, b?"`, or all the names if none is near."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(sorted(names))}"
