"""Presets: which matrices a LiGO operator has, how they are tied and where training starts.

A number in a table always names its preset.
"""

import math

import torch
from torch import Tensor

from fedgrow_algo.ligo import READ, Operator, Preset
from fedsim.submodel import Dim
from fedsim.tree import Tree


def by_name(name: str) -> Preset:
    """**Raises:** `ValueError` naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"algorithm.preset={name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


# paper: full matrices, tied in and out, Xavier ------------------------------------------------------------------------


def xavier(operator: Operator, generator: torch.Generator) -> Tree:
    """`B` Xavier normal, `w = 1/L1`: the grown model starts at chance."""
    tensors: Tree = {}
    for name, shape in operator.shapes.items():
        if name.startswith("depth."):
            tensors[name] = torch.full(shape, 1.0 / shape[-1])
        else:
            std = math.sqrt(2.0 / (shape[-1] + shape[-2]))
            tensors[name] = torch.randn(shape, generator=generator) * std
    return tensors


def tied(operator: Operator, dim: Dim) -> None:
    """`A = B` in every use."""
    return None


def any_sizes(operator: Operator) -> None:
    """Full matrices map any size to any larger one, across head borders."""
    return None


# preserving: the grown model computes what the small one did ----------------------------------------------------------


def copies(old: int, new: int) -> Tensor:
    """Which old unit each new one copies: `(new,)`, old units first and in order."""
    return torch.arange(new) % old


def shares(old: int, new: int) -> Tensor:
    """How much of an old unit's work each of its copies does: `(new,)`, summing to 1 over the copies of a unit.

    Unequal on purpose (1/3 and 2/3 for two copies): copies that are read alike get like gradients and stay copies for
    ever (LEMON, Wang et al., ICLR 2024).
    """
    index = torch.arange(new, dtype=torch.float64)
    rank, count = index // old, (new - 1 - index % old) // old + 1
    return (rank + 1.0) / (count * (count + 1) / 2)


def along_axes(operator: Operator, dim: Dim, of_axis) -> list[Tensor]:
    """`of_axis(old, new)` for each axis of a product."""
    return [of_axis(operator.small_axes[axis], operator.large_axes[axis]) for axis in dim.axes]


def copied_units(operator: Operator, dim: Dim) -> Tensor:
    """`copies` on a product of axes, head-major `(D2,)`: whole heads are copied, nothing is mixed across heads."""
    index = torch.zeros(1, dtype=torch.long)
    for axis, copied in zip(dim.axes, along_axes(operator, dim, copies), strict=True):
        index = (index[:, None] * operator.small_axes[axis] + copied).flatten()
    return index


def product(factors: list[Tensor]) -> Tensor:
    """Outer product of vectors, flattened with the first factor slowest."""
    result = torch.ones(1, dtype=torch.float64)
    for factor in factors:
        result = (result[:, None] * factor).flatten()
    return result


def unequal_copies(operator: Operator, dim: Dim) -> Tensor | None:
    """Row factors that make the reader undo the writer, `A^T B = I`, and keep attention and normalisation as they were.

    - An axis inside a block (values, MLP): readers divide each unit's work among its copies.
    - Heads nobody reads (queries and keys meet in q.k / sqrt(e)): both sides take the square root of the share, and
      of the correction sqrt(e'/e) of the temperature.
    - The residual axis: the normalised new coordinates are 0 (their value is the mean of the others) and the old ones
      grow by sqrt(D2/D1), which the gain takes back; the shift of the new ones is 0, so any reader of them is exact.
    """
    old, new = operator.sizes(dim.group)
    if dim.group in operator.residual:
        if dim.mode == "gain":
            return torch.full((new,), math.sqrt(old / new), dtype=torch.float64)
        if dim.mode == "shift":
            return (torch.arange(new) < old).double()
        return None
    if dim.mode == "read":
        return product(along_axes(operator, dim, shares))
    if dim.group not in operator.read:
        heads, within = dim.axes[0], dim.axes[1:]
        head_dims = [shares(operator.small_axes[axis], operator.large_axes[axis]) for axis in within]
        temperature = (new / operator.large_axes[heads]) / (old / operator.small_axes[heads])
        share = product([torch.ones(operator.large_axes[heads], dtype=torch.float64), *head_dims])
        return share.sqrt() * temperature**0.25
    return None


def exact(operator: Operator, generator: torch.Generator) -> Tree:
    """Copies in width, blocks that add nothing in depth: the grown pre-norm model computes what the small one did.

    In depth, block k of the large model is block l(k) of the small one; where l(k) repeats, the block is new and its
    output projections start at zero.
    """
    old_depth, new_depth = operator.depths
    source = [k * old_depth // new_depth for k in range(new_depth)]
    tensors: Tree = {}
    for name, shape in operator.shapes.items():
        if name.startswith("depth."):
            table = torch.zeros(shape, dtype=torch.float64)
            for k, block in enumerate(source):
                new = k > 0 and source[k - 1] == block
                table[k, block] = 0.0 if new and operator.modules[name.removeprefix("depth.")] else 1.0
            tensors[name] = table
            continue
        group = name.removeprefix("width.").removesuffix(READ)
        one_hot = torch.nn.functional.one_hot(copied_units(operator, operator.groups[group]), shape[-1]).double()
        if group in operator.residual and not name.endswith(READ):
            one_hot[shape[-1] :] = 1.0 / shape[-1]
        elif group in operator.residual:  # reads of new coordinates are free: made unlike, so that no two stay alike
            one_hot *= (1 + torch.arange(shape[-2]) // shape[-1])[:, None]
        tensors[name] = one_hot.expand(shape).clone()
    return tensors


def no_shrinking_heads(operator: Operator) -> None:
    """Copies need every axis, and the depth, to be at least as large as before."""
    old_depth, new_depth = operator.depths
    if new_depth < old_depth:
        raise ValueError(
            f"preset 'preserving' cannot drop blocks: depth would go from {old_depth} to {new_depth} "
            f"(preset 'paper' mixes any depth into any other)"
        )
    for axis, old in operator.small_axes.items():
        if operator.large_axes[axis] < old:
            raise ValueError(
                f"preset 'preserving' copies whole heads: axis {axis!r} cannot go from {old} to "
                f"{operator.large_axes[axis]} (choose heads so that neither their number nor their size shrinks)"
            )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("paper", "source", False, xavier, tied, any_sizes),
        Preset("preserving", "target", True, exact, unequal_copies, no_shrinking_heads),
    )
}
