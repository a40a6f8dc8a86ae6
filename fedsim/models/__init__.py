"""Model families: one Hugging Face family a file. `get_family("vit")` finds the file of that name."""

import importlib
import pkgutil

from fedsim.core.fields import refuse, shown
from fedsim.core.modules import module_named
from fedsim.models.family import Family, Form, Inputs
from fedsim.models.like import Like


__all__ = ["Family", "Form", "Inputs", "Like", "families", "get_family"]

# What families are written with, and checkpoints.
NOT_FAMILIES = {
    "attention",
    "checkpoint",
    "declare",
    "family",
    "heads",
    "ladders",
    "like",
    "onnx_weights",
    "preparation",
    "pretrained",
}


def families() -> list[str]:
    """Names of the families in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_FAMILIES)


def get_family(name: str) -> Family:
    """The family declared in `fedsim/models/<name>.py`, or in any importable module given as `package.module`.

    **Raises:** `ValueError` naming the families there are.
    """
    if "." not in name and name not in families():
        raise ValueError(
            f"task.family={shown(name)}: must be one of {', '.join(families())}, or a module's dotted name"
        )
    what = f"task.family={shown(name)}"
    module = module_named(name, what) if "." in name else importlib.import_module(f"fedsim.models.{name}")
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        refuse("task.family", name, "a module that declares FAMILY, an instance of fedsim.models.Family")
    return family
