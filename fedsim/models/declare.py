"""What family files are written with: refusals, settings of the Hugging Face config, the layout of a stack."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedsim.core.fields import describe, matches, refuse
from fedsim.core.submodel import ParamSpec
from fedsim.models.family import Form, Inputs


if TYPE_CHECKING:  # torch models are only built where they are needed
    from transformers import PretrainedConfig

Dims = Mapping[str, tuple[str, ...]]  # of each parameter, by its name within the model or within a block

# What a setting may be: values to choose from, a type, or the smallest whole number that the data allow.
Accepted = tuple[str, ...] | type | int

# Those without parameters of their own: a parameter without named axes could not be grown.
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh")


def refuse_kind(family: str, inputs: Inputs, *kinds: str) -> None:
    """**Raises:** `ValueError` unless the data are of one of these kinds."""
    if inputs.kind not in kinds:
        accepted = " or ".join(repr(kind) for kind in kinds)
        raise ValueError(f"task.family={family!r}: its models are for data of kind {accepted}, not {inputs.kind!r}")


def refuse_grouped_queries(family: str, form: Form) -> None:
    """**Raises:** `ValueError` unless each head of queries has keys and values of its own."""
    if form.kv_heads not in (None, form.heads):
        refuse("form.kv_heads", form.kv_heads, f"form.heads={form.heads}: {family!r} has no grouped queries")


def refuse_head_size(family: str, form: Form) -> None:
    """**Raises:** `ValueError` unless the heads share the width among them."""
    if form.head_size * form.heads != form.width:
        accepted = f"form.width / form.heads = {form.width} / {form.heads}, as in every model of {family!r}"
        refuse("form.head_dim", form.head_dim, accepted)


def refuse_foreign(config: "PretrainedConfig", model_type: str) -> None:
    """**Raises:** `ValueError` unless the config is one of this family."""
    if config.model_type != model_type:
        refuse("config.model_type", config.model_type, repr(model_type))


def chosen(inputs: Inputs, accepted: Mapping[str, Accepted]) -> dict[str, Any]:
    """Fields of the Hugging Face config that the experiment decides: its settings, and sizes at their smallest.

    **Raises:** `ValueError` for a field that may not be set, naming those that may, or a value it cannot have.
    """
    fields: dict[str, Any] = {name: may_be for name, may_be in accepted.items() if isinstance(may_be, int)}
    for name, value in inputs.settings:
        if name not in accepted:
            refuse("task.settings", name, f"among {', '.join(sorted(accepted))}; forms and data decide the rest")
        field, may_be = f"task.settings.{name}", accepted[name]
        if isinstance(may_be, tuple):
            if value not in may_be:
                refuse(field, value, f"one of {', '.join(may_be)}")
        elif isinstance(may_be, int):
            if not isinstance(value, int) or isinstance(value, bool) or value < may_be:
                refuse(field, value, f"a whole number, and at least the {may_be} of the data")
        elif not matches(value, may_be):
            refuse(field, value, describe(may_be))
        fields[name] = float(value) if may_be is float else value
    return fields


def stacked(
    form: Form,
    before: Dims,
    prefix: str,
    block: Dims,
    after: Dims,
    kind: Callable[[int], str] = lambda layer: "",
) -> dict[str, ParamSpec]:
    """The named axes of a model: `prefix + number + "." + role` in every block, and what stands around the blocks.

    **Arguments:**

    - `before`: what blocks are given: embeddings, and all that they share. - `after`: what reads the last block.
    - `kind`: of the block of each number, where blocks with the same parameters compute something else.

    **Raises:** `ValueError` for a name that is in two tables: parameters of one role are grown as one.
    """
    if both := sorted((before.keys() | after.keys()) & block.keys()):
        raise ValueError(f"{', '.join(both)}: outside the stack and within a block; names must differ")
    if both := sorted(before.keys() & after.keys()):
        raise ValueError(f"{', '.join(both)}: before the blocks and after them; names must differ")
    specs = {name: ParamSpec(dims, None, name) for name, dims in before.items()}
    specs |= {name: ParamSpec(dims, None, name, after=True) for name, dims in after.items()}
    for layer in range(form.depth):
        specs |= {f"{prefix}{layer}.{role}": ParamSpec(dims, layer, role, kind(layer)) for role, dims in block.items()}
    return specs


def without(dims: Dims, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A table less some of its rows."""
    left_out = {*names}
    return {name: texts for name, texts in dims.items() if name not in left_out}
