"""Checks on the fields of frozen dataclasses: refused with the field, the value and what is accepted."""

import dataclasses
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any


WHOLE = 2**63 - 1  # the largest whole number that tensors and tables hold
MANY = 10**6  # where nothing else is said: no run has more rounds, participants, or coordinates of a layer
SHOWN = 200  # characters of a bad value that a message repeats


def refuse(field: str, value: object, accepted: str) -> typing.NoReturn:
    """Raise the `ValueError` every bad setting ends in."""
    raise ValueError(f"{field}={shown(value)}: must be {accepted}")


def shown(value: object) -> str:
    """A bad value as messages repeat it: cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, lists in lists in lists
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def path_of(text: str | os.PathLike[str], field: str) -> Path:
    """A path as a person writes it: `~` is their home. **Raises:** `ValueError` for what can be no path."""
    text = os.fspath(text)
    if not text.strip() or "\0" in text:
        refuse(field, text, "a path")
    return Path(os.path.expanduser(text))


def check_types(instance: Any, prefix: str = "") -> None:
    """Compare each field of a dataclass with its annotation.

    **Raises:** `ValueError` naming `prefix.field`, the value and the accepted type. A bool is no number, an int is a
    float, NaN is refused everywhere; whole numbers end at `MANY`, or what the field's `metadata={"most": ...}` says.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if not matches(value, hint):
            refuse(dotted(prefix, field.name), value, describe(hint))
        counts = hint is int or int in typing.get_args(hint)
        if counts and isinstance(value, int) and abs(value) > (most := field.metadata.get("most", MANY)):
            refuse(dotted(prefix, field.name), value, f"at most {most}" if value > 0 else f"at least {-most}")


def matches(value: object, hint: Any) -> bool:
    """Whether `value` is what the annotation says. Understands the annotations experiments are written with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if hint is float:
        return matches(value, int) or (isinstance(value, float) and not math.isnan(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= WHOLE
    return isinstance(value, origin or hint)


def describe(hint: Any) -> str:
    """An annotation in words: `int | None` -> "a whole number or None"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is tuple:
        if arguments == (float, float):
            return "two numbers, as [0.08,1]"
        return f"a tuple of {describe(arguments[0])}" if arguments else "a tuple"
    words = {
        int: "a whole number below 2**63",
        float: "a number (a whole one below 2**63)",
        str: "a text",
        bool: "true or false",
        type(None): "None",
    }
    return words.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def check_range(
    instance: Any,
    prefix: str,
    *names: str,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse a number outside its range; None passes (an optional field that is not set)."""
    for name in names:
        value = getattr(instance, name)
        if value is None:
            continue
        field = dotted(prefix, name)
        if above is not None and not value > above:
            refuse(field, value, f"greater than {above}")
        if least is not None and not value >= least:
            refuse(field, value, f"at least {least}")
        if most is not None and not value <= most:
            refuse(field, value, f"at most {most}")
        if math.isinf(value):
            refuse(field, value, "finite")


def check_sha256(instance: Any, prefix: str) -> None:
    """Refuse a field `sha256` that is no such hash; None passes."""
    value = instance.sha256
    if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
        refuse(dotted(prefix, "sha256"), value, "64 digits of 0..9 and a..f, or None")


def dotted(prefix: str, name: str) -> str:
    """`("algorithm", "lr")` -> `"algorithm.lr"`."""
    return f"{prefix}.{name}" if prefix else name
