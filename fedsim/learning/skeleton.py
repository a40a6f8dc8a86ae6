"""Modules that trees of parameters are run in: one for each form, shared by the whole process; never change one."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fedsim.core.seeding import torch_seeded
from fedsim.models import Form, Inputs, get_family


# Whether models take their mask as it is instead of looking at it, as `torch.func.vmap` needs; whether they drop out.
MASKED: ContextVar[bool] = ContextVar("MASKED", default=False)
DROPPING: ContextVar[bool] = ContextVar("DROPPING", default=False)


def skeleton(family: str, form: Form, inputs: Inputs, dropout: float) -> nn.Module:
    """A module in evaluation mode; inside `dropping`, one that drops out with this probability."""
    return _built(family, form, inputs, MASKED.get(), dropout if DROPPING.get() else 0.0)


def called_with(module: nn.Module, tree: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """What the module returns with these parameters in the place of its own; gradients reach `tree`.

    `torch.func.functional_call` finds the place of every name anew, which takes as long as a layer of a small model.
    """
    places = _places(module)
    own = [(held, key, held[key]) for name in tree for held, key in places[name]]
    try:
        for name, tensor in tree.items():
            for held, key in places[name]:
                held[key] = tensor
        return module(**inputs)
    finally:
        for held, key, parameter in own:
            held[key] = parameter


@contextlib.contextmanager
def masked_attention() -> Iterator[None]:
    """Inside, no skeleton looks at its attention mask to do without it: the same to rounding."""
    before = MASKED.set(True)
    try:
        yield
    finally:
        MASKED.reset(before)


@contextlib.contextmanager
def dropping(seed: int) -> Iterator[None]:
    """Inside, skeletons drop out by draws of this seed; torch's global stream is then put back."""
    before = DROPPING.set(True)
    try:
        with torch_seeded(seed):
            yield
    finally:
        DROPPING.reset(before)


@functools.lru_cache(maxsize=32)
def _places(module: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where the module holds each parameter: in several places, if weights are tied."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in names.values()}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append((part._parameters, key))
    return places


@functools.lru_cache(maxsize=32)
def _built(family_name: str, form: Form, inputs: Inputs, masked: bool, dropout: float) -> nn.Module:
    family = get_family(family_name)
    with torch_seeded(0):  # the values are never used, but drawing them must not move the caller's stream
        module: Any = family.with_dropout(form, inputs, dropout) if dropout else family.build(form, inputs).eval()
    if masked and getattr(module, "_supports_sdpa", False):  # Hugging Face's, and without attention of its own
        from fedsim.models.attention import always_masked

        module.set_attn_implementation(always_masked())
    return module.requires_grad_(False)
