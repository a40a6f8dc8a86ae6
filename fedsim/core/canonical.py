"""Dataclasses as JSON values that stay the same from version to version, and back: what run ids are hashes of."""

import contextvars
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.core.fields import describe, matches, refuse


ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedsim", "fedgrow_algo", "baselines")
LONGEST, DEEPEST, LARGEST = 2**20, 32, 2**63  # characters, levels and numbers of a stored config

# Modules whose classes are written into configs and run ids under another name, which is older than where they lie.
WRITTEN_AS = {
    "fedsim.learning.task": "fedsim.task",
    "fedsim.learning.server_opt": "fedsim.server_opt",
    "fedsim.models.checkpoint": "fedsim.pretrained",
    "__mp_main__": "__main__",  # a script, as the processes see it that it starts
}


_reviving = contextvars.ContextVar("reviving", default=False)


def canonical(value: Any) -> Any:
    """A JSON value that says the same as a tree of dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if _decides(value, field)]
        module = type(value).__module__
        kind = {"class": f"{WRITTEN_AS.get(module, module)}.{type(value).__qualname__}"}
        return kind | dict(_written(field, getattr(value, field.name)) for field in fields)
    if isinstance(value, tuple | list):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # --set lr=1 and lr=1.0 are one experiment
    return value


def _written(field: dataclasses.Field, value: Any) -> tuple[str, Any]:
    """A field as configs write it: by an older name, with older words, where it has `metadata=written_as(...)`."""
    name, words = field.metadata.get("written_as", (field.name, {}))
    return name, words.get(value, value) if words else canonical(value)


def written_as(name: str, **words: str) -> dict[str, Any]:
    """Metadata of a field that was called otherwise when runs were recorded, and so were its values."""
    return {"written_as": (name, words)}


def _decides(value: Any, field: dataclasses.Field) -> bool:
    """Whether a field is part of what a run is: not where it runs, nor a default that came after runs were named."""
    later = field.metadata.get("later") and getattr(value, field.name) == field.default
    return not field.metadata.get("placement") and not later


def parsed(text: str) -> Any:
    """A stored config as JSON values.

    **Raises:** `ValueError` for a text that no config is written as: too long, too deep, numbers that are none.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a config of {len(text)} characters: must be at most {LONGEST}")
    try:
        value = json.loads(text, parse_constant=_refused)
    except RecursionError as error:
        raise ValueError(f"a config that is too deep: must be at most {DEEPEST} levels") from error
    _check_values(value, DEEPEST)
    if not isinstance(value, dict):
        raise ValueError("a config that is no JSON object")
    return value


def _refused(word: str) -> None:
    raise ValueError(f"a config with {word}: must hold finite numbers")


def _check_values(value: Any, deeper: int) -> None:
    if isinstance(value, dict | list):
        if not deeper:
            raise ValueError(f"a config that is too deep: must be at most {DEEPEST} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(item, deeper - 1)
    elif isinstance(value, int | float) and not abs(value) < LARGEST:
        _refused(repr(value)[:40])


def revived(value: Any, kind: type = object, modules: Sequence[ModuleType] = ()) -> Any:
    """The inverse of `canonical`: the dataclasses a JSON value describes. Placement fields take their defaults.

    The value may be anybody's, and runs no code of its choice: a class is made only if it is known (`class_known`) and
    is what the field takes that holds it.

    - `kind`: what it must be. - `modules`: where the user says that classes may lie, too.

    **Raises:** `ValueError` naming the field.
    """
    token = _reviving.set(True)
    try:
        made = _made(with_todays_names(value), kind, "config", modules)
    finally:
        _reviving.reset(token)
    if not isinstance(made, kind):
        refuse("config", str(made)[:80], describe(kind))
    return made


def reviving() -> bool:
    """Whether what is made right now was stored: it is complete, and files that it names may have changed since."""
    return _reviving.get()


def _made(value: Any, hint: Any, path: str, modules: Sequence[ModuleType]) -> Any:
    if isinstance(value, dict) and "class" in value:
        kind = class_known(str(value["class"]), modules)
        if kind is None:
            raise ValueError(
                f"{path}={value['class']!r}: not a frozen dataclass of fedsim, its methods, or a module that was "
                "imported here; if it is yours, name its module: --import MODULE (modules=[...] in Python)"
            )
        if not any(isinstance(each, type) and issubclass(kind, each) for each in _options(hint)):
            refuse(path, value["class"], describe(hint))
        return _instance(kind, {name: item for name, item in value.items() if name != "class"}, path, modules)
    if isinstance(value, list):
        of_items = next((typing.get_args(each) for each in _options(hint) if typing.get_origin(each) is tuple), ())
        hints = of_items[:1] * len(value) if of_items[1:] == (...,) else (*of_items, *[object] * len(value))
        return tuple(_made(item, hints[n], f"{path}.{n}", modules) for n, item in enumerate(value))
    return value


def _instance(kind: type, values: dict[str, Any], path: str, modules: Sequence[ModuleType]) -> Any:
    """An object of a class that is known, of fields that have the types its annotations say."""
    fields, hints = {field.name: field for field in dataclasses.fields(kind) if field.init}, typing.get_type_hints(kind)
    for name in values.keys() - fields.keys():
        refuse(f"{path}.{name}", values[name], f"a field of {kind.__name__}: {', '.join(fields)}")
    made = {}
    for name, field in fields.items():
        if name in values:
            made[name] = _made(values[name], hints[name], f"{path}.{name}", modules)
            if not matches(made[name], hints[name]):
                refuse(f"{path}.{name}", made[name], describe(hints[name]))
            if field.metadata.get("module") and "." in made[name] and _known_module(made[name]) is None:
                accepted = "a module that was imported here (--import MODULE, or modules=[...] in Python)"
                refuse(f"{path}.{name}", made[name], accepted)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}: {kind.__name__} lacks its field {name}")
    if inspect.isabstract(kind):
        raise ValueError(f"{path}: {kind.__name__} is abstract, and no run's")
    return kind(**made)


def _options(hint: Any) -> tuple[Any, ...]:
    """What an annotation allows: the parts of a union, or itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def with_todays_names(value: Any) -> Any:
    """A config in which fields, and values of theirs, have today's names; those of classes not known here stay."""
    if isinstance(value, list):
        return [with_todays_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = class_known(str(value.get("class", "")))
    fields = dataclasses.fields(kind) if kind is not None else ()
    older = {field.metadata["written_as"][0]: field for field in fields if "written_as" in field.metadata}
    found = {}
    for name, item in value.items():
        if name in older:
            name, words = older[name].name, older[name].metadata["written_as"][1]
            item = {old: new for new, old in words.items()}.get(item, item) if isinstance(item, str) else item
        found[name] = with_todays_names(item)
    return found


def class_known(name: str, modules: Sequence[ModuleType] = ()) -> Any:
    """The frozen dataclass that configs call so, in a module that was imported here or comes with fedsim; else None.

    - `modules`: where classes of a script are looked for, which configs say to be of `__main__`.
    """
    written, _, name = name.rpartition(".")
    lies_in = {old: new for new, old in WRITTEN_AS.items() if old != "__main__"}
    module: Any
    for module in (_known_module(lies_in.get(written, written)), *(modules if written == "__main__" else ())):
        kind: Any = getattr(module, "__dict__", {}).get(name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
            parameters = getattr(kind, "__dataclass_params__", None)
            return kind if parameters is not None and parameters.frozen else None
    return None


def _known_module(name: str) -> ModuleType | None:
    """A module that was imported already, or lies in this distribution. No other is imported as a file names it."""
    if name in sys.modules:
        return sys.modules[name]
    parts = name.split(".")
    if parts[0] not in PACKAGES or not all(part.isidentifier() for part in parts):
        return None
    path = ROOT.joinpath(*parts)
    files = [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()]
    found = importlib.util.find_spec(name) if files else None
    if found is None or found.origin is None or Path(found.origin).resolve() not in files:
        return None
    return importlib.import_module(name)
