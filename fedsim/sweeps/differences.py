"""In which fields two experiments differ, from their canonical JSON."""

import json
from collections.abc import Iterator
from typing import Any

from fedsim.core.canonical import with_todays_names
from fedsim.core.fields import dotted, shown


TOLD = 5  # how many fields a message names
ABSENT = "its default"  # fields that came later are not written while they have it


def differences(there: str, here: str) -> dict[str, tuple[Any, Any]]:
    """Dotted path of each field that differs -> its value in the one and in the other."""
    old, new = (with_todays_names(json.loads(config)) for config in (there, here))
    return dict(_different(old, new, ""))


def told(there: str, here: str) -> str:
    """The first differences in words: "rounds: 10 there, 20 here"."""
    found = [f"{path}: {_word(old)} there, {_word(new)} here" for path, (old, new) in differences(there, here).items()]
    return "; ".join([*found[:TOLD], *([f"and {len(found) - TOLD} more"] if len(found) > TOLD else [])])


def _different(there: Any, here: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(there, dict) and isinstance(here, dict) and there.get("class") == here.get("class"):
        for name in sorted(there.keys() | here.keys()):
            yield from _different(there.get(name, ABSENT), here.get(name, ABSENT), dotted(path, name))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _different(old, new, dotted(path, str(number)))
    elif there != here:
        yield path, (there, here)


def _word(value: Any) -> str:
    """A value in a message; a part of an experiment by its class alone."""
    if isinstance(value, dict):
        return str(value.get("class", "")).rpartition(".")[2]
    return value if value == ABSENT else shown(value)
