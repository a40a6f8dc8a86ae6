"""Model families: one Hugging Face family a file. `get_family("vit")` finds the file of that name."""

import importlib
import pkgutil

from fedsim.models.family import Family, Form, Inputs


__all__ = ["Family", "Form", "Inputs", "families", "get_family"]

# What families are written with, and checkpoints.
NOT_FAMILIES = {"attention", "declare", "family", "heads", "preparation", "pretrained"}


def families() -> list[str]:
    """Names of the families in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_FAMILIES)


def get_family(name: str) -> Family:
    """The family declared in `fedsim/models/<name>.py`, or in any importable module given as `package.module`.

    **Raises:** `ValueError` naming the families there are.
    """
    if "." not in name and name not in families():
        raise ValueError(f"task.family={name!r}: must be one of {', '.join(families())}, or a module's dotted name")
    family = getattr(importlib.import_module(name if "." in name else f"fedsim.models.{name}"), "FAMILY", None)
    if not isinstance(family, Family):
        raise ValueError(f"task.family={name!r}: must be a module that declares FAMILY")
    return family
