"""Named axes: what each dimension of each parameter of a transformer is.

Growth operators and sub-model extraction are operations on *axes*, never on parameter names. A family declares
one `ParamSpec` a parameter and a method reads only those: a method works for every family, a family for every method.

How a dimension is written (`ParamSpec.dims`):

| text | meaning |
|---|---|
| `"embed"` | this dimension *writes* the axis: it makes its coordinates |
| `"<embed"` | it *reads* the axis: the next layer's view of coordinates that another parameter wrote |
| `"*embed"`, `"+embed"` | gain and shift of a normalisation over the axis |
| `"query:head head_dim"` | a product of axes, flattened head-major; `query` names the group that shares one map |
| `""` | never resized: vocabulary, positions, classes, pixels |
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of one parameter, parsed from its text form."""

    mode: str  # "write", "read", "gain", "shift", or "fixed"
    group: str  # dimensions of one group (in one block) share a map
    axes: tuple[str, ...]  # sizes multiply, first axis slowest

    @staticmethod
    def parse(text: str) -> "Dim":
        if not text:
            return Dim("fixed", "", ())
        mode = {"<": "read", "*": "gain", "+": "shift"}.get(text[0], "write")
        body = text[mode != "write" :]
        group, _, axes = body.rpartition(":")
        return Dim(mode, group or axes, tuple(axes.split()))

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
