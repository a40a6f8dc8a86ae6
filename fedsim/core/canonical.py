"""Dataclasses as JSON values that stay the same from version to version, and back: what run ids are hashes of."""

import dataclasses
import importlib
from typing import Any


# Modules whose classes are written into configs and run ids under another name, which is older than where they lie.
WRITTEN_AS = {
    "fedsim.learning.task": "fedsim.task",
    "fedsim.learning.server_opt": "fedsim.server_opt",
    "fedsim.models.pretrained": "fedsim.pretrained",
    "__mp_main__": "__main__",  # a script, as the processes see it that it starts
}


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


def revived(value: Any) -> Any:
    """The inverse of `canonical`: the dataclasses a JSON value describes. Placement fields take their defaults."""
    return _made(with_todays_names(value))


def _made(value: Any) -> Any:
    if isinstance(value, dict):
        return class_written(value["class"])(**{name: _made(item) for name, item in value.items() if name != "class"})
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    return value


def with_todays_names(value: Any) -> Any:
    """A config in which fields, and values of theirs, have today's names; those of classes not known here stay."""
    if isinstance(value, list):
        return [with_todays_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        kind = class_written(value["class"]) if "." in value.get("class", "") else None
    except (ImportError, AttributeError):
        kind = None
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    older = {field.metadata["written_as"][0]: field for field in fields if "written_as" in field.metadata}
    found = {}
    for name, item in value.items():
        if name in older:
            name, words = older[name].name, older[name].metadata["written_as"][1]
            item = {old: new for new, old in words.items()}.get(item, item)
        found[name] = with_todays_names(item)
    return found


def class_written(name: str) -> Any:
    """The class that configs call so. **Raises:** `ImportError` or `AttributeError` if there is none."""
    written, _, name = name.rpartition(".")
    lies_in = {old: new for new, old in WRITTEN_AS.items() if old != "__main__"}
    return getattr(importlib.import_module(lies_in.get(written, written)), name)
