"""Named axes: what each dimension of each parameter of a transformer is.

Growth operators and sub-model extraction are operations on *axes*, never on parameter names. A family declares
one `ParamSpec` a parameter and a method reads only those: a method works for every family, a family for every method.

How a dimension is written (`ParamSpec.dims`):

| text | meaning |
|---|---|
| `"embed"` | this dimension *writes* the axis: it makes its coordinates |
| `"<embed"` | it *reads* the axis: the next layer's view of coordinates that another parameter wrote |
| `"*embed"`, `"+embed"` | gain and shift of a normalisation over the axis |
| `"*<embed"`, `"+<embed"` | the same, where a tied matrix reads what is normalised (below) |
| `"query:head head_dim"` | a product of axes, flattened head-major; `query` names the group that shares one map |
| `"<value:kv_head group head_dim"` | a reader may have axes the writer lacks: `group` heads read each `kv_head` |
| `""` | never resized: positions, pixels |
| `"=token"`, `"=class"` | never resized either: a row for each token of the vocabulary, or each class |
| `"query:head head_dim + key:head head_dim"` | *fused*: the dimensions of several projections, one after another |

A tied matrix, a language model's head that is its token embedding, writes coordinates and reads them back: what other
readers do for themselves, only the normalisation before it can do.

A parameter with a fused dimension is several parameters to every method: `split_specs` and `split_fused` take them
apart, `join_fused` puts them together again, and what lies in between sees no fused dimension.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fedsim.tree import Tree


FUSED = " + "  # a shift's "+" is never followed by a space


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of one parameter, parsed from its text form (of one part, where the dimension is fused)."""

    mode: str  # "write", "read", "gain", "shift", or "fixed"
    group: str  # dimensions of one group (in one block) share a map
    axes: tuple[str, ...]  # sizes multiply, first axis slowest; none: never resized
    tied: bool = False  # a gain or shift whose result is read by a tied matrix

    @staticmethod
    def parse(text: str) -> "Dim":
        assert FUSED not in text, f"split {text!r} first"
        if not text or text.startswith("="):
            return Dim("fixed", text[1:], ())
        mode = {"<": "read", "*": "gain", "+": "shift"}.get(text[0], "write")
        body = text[mode != "write" :]
        tied = mode in ("gain", "shift") and body.startswith("<")
        group, _, axes = body[tied:].rpartition(":")
        return Dim(mode, group or axes, tuple(axes.split()), tied)

    def size(self, axes: Mapping[str, int]) -> int | None:
        """Length of the dimension in a model with these axis sizes; None where the dimension is never resized."""
        if not self.axes:
            return None
        size = 1
        for axis in self.axes:
            size *= axes[axis]
        return size


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Where one parameter sits in a transformer.

    - `dims`: one text a dimension, in the form above.
    - `layer`: the block's number; None outside the stack.
    - `role`: the parameter's name without its block number: equal in every block.
    """

    dims: tuple[str, ...]
    layer: int | None
    role: str

    @cached_property
    def parsed(self) -> tuple[Dim, ...]:
        return tuple(Dim.parse(text) for text in self.dims)

    @property
    def module(self) -> str:
        """The role without its last part: weight and bias of one projection are one module."""
        return self.role.rpartition(".")[0]

    @cached_property
    def fused(self) -> int | None:
        """Position of the fused dimension; None in most parameters."""
        positions = [position for position, text in enumerate(self.dims) if FUSED in text]
        assert len(positions) <= 1, f"{self.role}: {self.dims} has {len(positions)} fused dimensions"
        return positions[0] if positions else None

    def parts(self, name: str) -> "dict[str, ParamSpec]":
        """The parameters that the one of this name holds, in order: itself, unless a dimension is fused.

        A part is called by the group of its dimension, `c_attn.weight` -> `c_attn/query.weight`: its weight and its
        bias are a module of their own.
        """
        if self.fused is None:
            return {name: self}
        before, texts, after = self.dims[: self.fused], self.dims[self.fused].split(FUSED), self.dims[self.fused + 1 :]
        groups = [Dim.parse(text).group for text in texts]
        assert "" not in groups and len({*groups}) == len(groups), f"{self.role}: a fused part needs a group of its own"
        return {
            _part(name, group): ParamSpec((*before, text, *after), self.layer, _part(self.role, group))
            for group, text in zip(groups, texts, strict=True)
        }


def split_specs(specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The named axes with every fused parameter replaced by its parts."""
    return {part: spec for name, whole in specs.items() for part, spec in whole.parts(name).items()}


def split_fused(tree: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], axes: Mapping[str, int]) -> Tree:
    """A model as `split_specs(specs)` describes it: parts are views, all other tensors are as they were.

    **Arguments:**

    - `tree`, `specs`: equal names.
    - `axes`: sizes of the model's named axes.
    """
    split: Tree = {}
    for name, spec in specs.items():
        if spec.fused is None:
            split[name] = tree[name]
            continue
        parts = spec.parts(name)
        sizes = [part.parsed[spec.fused].size(axes) for part in parts.values()]
        split |= zip(parts, tree[name].split(sizes, spec.fused), strict=True)
    return split


def join_fused(tree: Mapping[str, Tensor], specs: Mapping[str, ParamSpec]) -> Tree:
    """The inverse of `split_fused`; gradients reach the parts."""
    return {
        name: tree[name] if spec.fused is None else torch.cat([tree[part] for part in spec.parts(name)], spec.fused)
        for name, spec in specs.items()
    }


def _part(name: str, group: str) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{module}/{group}.{tensor}"
