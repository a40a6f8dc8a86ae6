"""Which parameters of a Hugging Face model are its head: only these differ between what a body is used for."""

from typing import TYPE_CHECKING

from fedsim.models.family import Inputs


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Constants that older versions of the library saved among the weights.
SAVED_CONSTANTS = ("masked_bias", "position_ids", "inv_freq")


def parts(module: "PreTrainedModel") -> list[list[str]]:
    """Names of the parameters that come after the body, one list a part: only these differ between tasks.

    A pooler belongs to the body's class, but is there for one kind of head alone.
    """
    body: nn.Module = module.base_model
    inside = {id(parameter) for name, parameter in body.named_parameters() if "pooler" not in name.split(".")}
    parts: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) not in inside:  # a tied head is inside
            parts.setdefault(name.split(".")[0], []).append(name)
    return list(parts.values())


def of_body(name: str, module: "PreTrainedModel") -> bool:
    """Whether a saved tensor that the model has no place for lies in the body; a saved body alone has no prefix."""
    steps = name.removeprefix(f"{module.base_model_prefix}.").split(".")
    body = {inner.split(".")[0] for inner, _ in module.base_model.named_parameters()}
    return steps[0] in body and steps[-1] not in SAVED_CONSTANTS


def other_classes(held: tuple[int, ...], wanted: tuple[int, ...], inputs: Inputs) -> bool:
    """Whether two shapes differ in the number of classes and in nothing else."""
    return wanted[:1] == (inputs.num_classes,) and held[1:] == wanted[1:]
