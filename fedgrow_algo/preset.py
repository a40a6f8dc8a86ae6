"""What a preset is: one way to build a LiGO operator (`fedgrow_algo.ligo`); those there are: `fedgrow_algo.presets`."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fedsim.core.tree import Tree


READ = ".read"  # ending of the name of an axis' second matrix, where a preset reads with one of its own
NEXT = ".next"  # the same, where a preset writes coordinates of a block from the block above it


@dataclasses.dataclass(frozen=True)
class Preset:
    """One way to build a LiGO operator.

    - `per`: width matrices belong to "source" blocks (widen each small block, then mix) or to "target" blocks (mix in
      the small space, then widen). Never once per (target, source) pair: that costs L1 x L2 widenings.
    - `init(operator, generator)`: the tensors training starts from.
    - `check(operator)`: refuses, with a `ValueError`, sizes the preset cannot map.
    - `exact(operator)`: whether, at these sizes, the start computes what the small model computed.
    - `scale(operator, dim)`: fixed factors on the rows of the matrix in this use of it; None: ones.
    - `share(D1, D2)`: how much of a unit's work each of its copies does, where a reader copies an axis: `(D2,)`.
    - `own_read`: the residual axis is read with a matrix of its own instead of the one it is written with.
    - `own_next`: blocks write some of their coordinates from the block above, with matrices of their own.
    - `fixed_top`: matrices are `[I ; C]` and only C, of D2 - D1 rows, is a tensor of the operator.
    - `chunked`: the MLP axis is a number of chunks as wide as the residual axis, all mapped by one matrix.
    - `depth_by`: a depth table for each "module" (weight and bias share it) or for each "role".
    """

    name: str
    per: Literal["source", "target"]
    init: Callable[..., Tree]
    check: Callable[..., None]
    exact: Callable[..., bool]
    scale: Callable[..., Tensor | None]
    share: Callable[[int, int], Tensor]
    own_read: bool = False
    own_next: bool = False
    fixed_top: bool = False
    chunked: bool = False
    depth_by: Literal["module", "role"] = "module"


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a dimension, and whether the matrix spans it ("map"), or it stays ("keep"), or it is copied."""

    old: int
    new: int
    kind: Literal["map", "keep", "copy"]
    axis: str
