"""The LiGO operator on a tree with named axes (Wang et al., ICLR 2023, arXiv 2303.00980).

    width   W' = B_out W A_in^T    b' = B_out b    norm g' = B_R g    embedding E' = E B_R^T
    depth   W'[k] = sum_l w[m, k, l] W[l]

Linear in the small weights, differentiable in its own tensors: `B` (how the coordinates of an axis are written), `A`
(how they are read: the same matrix up to a fixed scale of its rows, or one of its own) and `w`, a table L2 x L1 for
each module m of the block, shared by weight and bias. Which matrices there are and what they start as is the preset's
business (`fedgrow_algo.presets`); where they apply is read off the named axes (`fedsim.submodel`), so nothing here
knows the name of a model or of a parameter.

Letters: D1, D2 small and large size of an axis; L1, L2 small and large depth; k a large block, l a small one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from fedsim.submodel import Dim, ParamSpec, join_fused, split_fused, split_specs
from fedsim.tree import Tree


Specs = Mapping[str, ParamSpec]
Axes = Mapping[str, int]
READ = ".read"  # ending of the name of an axis' second matrix, where a preset reads with one of its own


@dataclasses.dataclass(frozen=True)
class Preset:
    """One way to build a LiGO operator.

    - `per`: width matrices belong to "source" blocks (widen each small block, then mix) or to "target" blocks (mix in
      the small space, then widen). Never once per (target, source) pair: that costs L1 x L2 widenings.
    - `own_read`: the residual axis is read with a matrix of its own instead of the one it is written with.
    - `init(operator, generator)`: the tensors training starts from.
    - `scale(operator, dim)`: fixed factors `(D2,)` on the rows of the matrix in this use of it; None: ones.
    - `check(operator)`: refuses, with a `ValueError`, sizes the preset cannot map.
    """

    name: str
    per: str
    own_read: bool
    init: Callable[["Operator", torch.Generator], Tree]
    scale: Callable[["Operator", Dim], Tensor | None]
    check: Callable[["Operator"], None]


@dataclasses.dataclass(frozen=True)
class Operator:
    """A LiGO operator from one size of a model family to a larger one. It holds sizes; its tensors come in and go out.

    - `small`, `large`: the named axes of every parameter at either size.
    - `small_axes`, `large_axes`: the sizes of those axes.

    **Raises:** `ValueError` where an axis would shrink, or the preset cannot map the sizes.
    """

    preset: Preset
    small: Specs
    large: Specs
    small_axes: Axes
    large_axes: Axes

    def __post_init__(self) -> None:
        for group in self.groups:
            old, new = self.sizes(group)
            if new < old:
                raise ValueError(f"a growth operator cannot shrink: axis {group!r} would go from {old} to {new}")
        self.preset.check(self)

    # sizes and names ------------------------------------------------------------------------------------------------

    @cached_property
    def depths(self) -> tuple[int, int]:
        """`(L1, L2)`."""
        return depth(self.small), depth(self.large)

    @cached_property
    def small_parts(self) -> Specs:
        """`small` with fused projections taken apart: each has a map and a row of the depth table of its own."""
        return split_specs(self.small)

    @cached_property
    def large_parts(self) -> Specs:
        """`large`, likewise."""
        return split_specs(self.large)

    @cached_property
    def groups(self) -> dict[str, Dim]:
        """Each group of dimensions that shares a map, in order of appearance."""
        return {dim.group: dim for spec in self.small_parts.values() for dim in spec.parsed if dim.axes}

    def sizes(self, group: str) -> tuple[int, int]:
        """`(D1, D2)` of a group."""
        dim = self.groups[group]
        old, new = dim.size(self.small_axes), dim.size(self.large_axes)
        assert old is not None and new is not None
        return old, new

    @cached_property
    def whole(self) -> set[str]:
        """Groups that live outside the stack as well: one map for the whole network, as skip connections demand."""
        return {
            dim.group for spec in self.small_parts.values() if spec.layer is None for dim in spec.parsed if dim.axes
        }

    @cached_property
    def residual(self) -> set[str]:
        """Groups of the whole network that blocks write to: the axis of the skip connections."""
        return self.whole & self._in_blocks("write")

    @cached_property
    def read(self) -> set[str]:
        """Groups that some parameter reads. Heads that nobody reads (queries, keys) meet in a dot product instead."""
        outside = {d.group for s in self.small_parts.values() if s.layer is None for d in s.parsed if d.mode == "read"}
        return outside | self._in_blocks("read")

    def _in_blocks(self, mode: str) -> set[str]:
        specs = [spec for spec in self.small_parts.values() if spec.layer is not None]
        return {dim.group for spec in specs for dim in spec.parsed if dim.mode == mode}

    @cached_property
    def modules(self) -> dict[str, bool]:
        """The block's modules in order; whether each writes the residual axis (an output projection)."""
        modules: dict[str, bool] = {}
        for spec in self.small_parts.values():
            if spec.layer is not None:
                writes = any(dim.mode == "write" and dim.group in self.residual for dim in spec.parsed)
                modules[spec.module] = modules.get(spec.module, False) or writes
        return modules

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the operator's tensors: what is trained, and what a Global-LiGO sends."""
        old_depth, new_depth = self.depths
        maps = old_depth if self.preset.per == "source" else new_depth
        shapes: dict[str, tuple[int, ...]] = {}
        for group in self.groups:
            old, new = self.sizes(group)
            shapes[f"width.{group}"] = (new, old) if group in self.whole else (maps, new, old)
            if self.preset.own_read and group in self.residual:
                shapes[f"width.{group}{READ}"] = (new, old)
        return shapes | {f"depth.{module}": (new_depth, old_depth) for module in self.modules}

    # the operator ---------------------------------------------------------------------------------------------------

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tree:
        """The tensors training starts from; names and shapes are `shapes`."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.preset.init(self, generator).items()}
        assert {name: tuple(t.shape) for name, t in tensors.items()} == self.shapes
        return tensors

    def stack(self, small: Mapping[str, Tensor]) -> Tree:
        """The small weights with blocks stacked, `(L1, ...)` a role; others as they are. Done once: they are frozen."""
        if small.keys() != self.small.keys():
            raise ValueError(f"not a model of the small form: {sorted(small.keys() ^ self.small.keys())[:4]}")
        parts = split_fused(small, self.small, self.small_axes)
        blocks: dict[str, list[Tensor]] = {}
        stacked: Tree = {}
        for name, spec in self.small_parts.items():
            if spec.layer is None:
                stacked[name] = parts[name]
            else:
                blocks.setdefault(spec.role, []).append(parts[name])
        return stacked | {role: torch.stack(tensors) for role, tensors in blocks.items()}

    def grow(self, tensors: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> Tree:
        """The large weights, by name: `stacked` from `stack`, `tensors` as `init` returns them."""
        grown: Tree = {}
        blocks: dict[str, Tensor] = {}
        for name, spec in self.large_parts.items():
            if spec.layer is None:
                grown[name] = self._widen(tensors, stacked[name][None], spec)[0]
                continue
            if spec.role not in blocks:
                table, block = tensors[f"depth.{spec.module}"], stacked[spec.role]
                if self.preset.per == "source":
                    blocks[spec.role] = mix(table, self._widen(tensors, block, spec))
                else:
                    blocks[spec.role] = self._widen(tensors, mix(table, block), spec)
            grown[name] = blocks[spec.role][spec.layer]
        return join_fused(grown, self.large)

    def __call__(self, tensors: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> Tree:
        """`grow(tensors, stack(small))`."""
        return self.grow(tensors, self.stack(small))

    def matrix(self, tensors: Mapping[str, Tensor], dim: Dim) -> Tensor:
        """The map a dimension is grown with: `(D2, D1)`, or one a block."""
        own = self.preset.own_read and dim.group in self.residual and dim.mode != "write"
        matrix = tensors[f"width.{dim.group}{READ if own else ''}"]
        scale = self.preset.scale(self, dim)
        return matrix if scale is None else scale.to(matrix)[:, None] * matrix

    def _widen(self, tensors: Mapping[str, Tensor], blocks: Tensor, spec: ParamSpec) -> Tensor:
        for position, dim in enumerate(spec.parsed):
            if dim.axes:
                blocks = widen(blocks, self.matrix(tensors, dim), position + 1)
        return blocks


def widen(W_L: Tensor, B: Tensor, position: int) -> Tensor:
    """`W' = B W` along one dimension of each block (LiGO, width operator; `W A^T` is the same along the other).

    **Arguments:**

    - `W_L`: blocks, `(L, ...)` with size D1 at `position`.
    - `B`: `(D2, D1)` for all blocks, or `(L, D2, D1)`.

    **Returns:** `(L, ...)` with size D2 at `position`.
    """
    W = W_L.movedim(position, -1)
    rows = W.reshape(W.shape[0], -1, W.shape[-1])  # (L, everything else, D1)
    return (rows @ B.mT).reshape(*W.shape[:-1], -1).movedim(-1, position)


def mix(w: Tensor, W_L: Tensor) -> Tensor:
    """`W'[k] = sum_l w[k, l] W[l]` (LiGO, depth operator): `(L2, L1)` and `(L1, ...)` to `(L2, ...)`."""
    return (w @ W_L.flatten(1)).reshape(w.shape[0], *W_L.shape[1:])


def depth(specs: Specs) -> int:
    """Number of blocks."""
    return 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
