"""Every field of an experiment, with its annotation."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from benchmarks.suites import tiny


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and annotation of every field below an experiment, inner ones too; the first of a tuple's items."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{path}{field.name}"
        yield name, hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from fields_of(inner, f"{name}.")
        elif isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0]):
            yield f"{name}.0", type(inner[0])
            yield from fields_of(inner[0], f"{name}.0.")


FIELDS = dict(fields_of(tiny()))
