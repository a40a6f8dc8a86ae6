"""The sizes and names that decide what a LiGO operator is made of (`fedgrow_algo.ligo`), read off named axes."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property

from fedgrow_algo.equations import Specs, depth
from fedgrow_algo.preset import NEXT, READ, Factor, Preset
from fedsim.core.submodel import Dim, ParamSpec, split_specs


Axes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A preset, and a model family at a smaller and a larger size.

    - `small`, `large`: the named axes of every parameter at either size.
    - `small_axes`, `large_axes`: the sizes of those axes.
    - `post_norm`: whether blocks normalise after adding to the residual stream.

    **Raises:** `ValueError` where an axis would shrink, or the preset cannot map the sizes.
    """

    preset: Preset
    small: Specs
    large: Specs
    small_axes: Axes
    large_axes: Axes
    post_norm: bool = False

    def __post_init__(self) -> None:
        for group in self.groups:
            old, new = self.sizes(group)
            if new < old:
                raise ValueError(f"a growth operator cannot shrink: axis {group!r} would go from {old} to {new}")
        if "rotary" in self.axes and self.small_axes["rotary"] != self.large_axes["rotary"]:
            old, new = self.small_axes["rotary"], self.large_axes["rotary"]
            raise ValueError(
                f"form.head_dim: rotary position embeddings give each pair of a head's coordinates a frequency, so "
                f"heads cannot grow from {old} to {new} coordinates; give both forms one head_dim, or more heads"
            )
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
    def dims(self) -> tuple[Dim, ...]:
        """Every named dimension there is, each once, in order of appearance."""
        parts = (*self.small_parts.values(), *self.large_parts.values())
        return tuple(dict.fromkeys(dim for spec in parts for dim in spec.parsed if dim.axes))

    @cached_property
    def roles(self) -> dict[str, ParamSpec]:
        """What blocks have, one parameter of each role, in order of appearance. A block may lack a norm."""
        parts = (*self.small_parts.values(), *self.large_parts.values())
        return {spec.role: spec for spec in parts if spec.layer is not None}

    @cached_property
    def kinds(self) -> tuple[list[str], list[str]]:
        """What sets each block apart, of the small model and of the large one."""
        old, new = (
            [kind for _, kind in sorted({(s.layer, s.kind) for s in specs.values() if s.layer is not None})]
            for specs in (self.small, self.large)
        )
        return old, new

    @cached_property
    def axes(self) -> set[str]:
        """The axes that some parameter has."""
        return {axis for dim in self.dims for axis in dim.axes}

    @cached_property
    def groups(self) -> dict[str, Dim]:
        """Each group of dimensions that shares a map, in order of appearance, and the dimension that writes it."""
        writers = {dim.group: dim for dim in reversed(self.dims) if dim.mode == "write"}
        return {dim.group: writers[dim.group] for dim in self.dims}

    def sizes(self, group: str) -> tuple[int, int]:
        """`(D1, D2)` of a group, as it is written."""
        old, new = self.groups[group].size(self.small_axes), self.groups[group].size(self.large_axes)
        assert old is not None and new is not None
        return old, new

    def factors(self, dim: Dim) -> list[Factor]:
        """A dimension taken apart, first factor slowest."""
        factors: list[Factor] = []
        for axis in dim.axes:
            old, new = self.small_axes[axis], self.large_axes[axis]
            if axis not in self.groups[dim.group].axes:
                factors.append(Factor(old, new, "copy", axis))
            elif axis == "rotary":
                factors.append(Factor(old, new, "keep", axis))
            elif axis == "mlp" and self.preset.chunked:
                chunks = old // self.small_axes["embed"]
                factors += [Factor(chunks, chunks, "keep", axis), Factor(old // chunks, new // chunks, "map", axis)]
            else:
                factors.append(Factor(old, new, "map", axis))
        return factors

    def mapped(self, dim: Dim) -> tuple[int, int]:
        """`(D1, D2)` of the matrix a dimension is grown with: all of the dimension, or some factors of it."""
        spanned = [factor for factor in self.factors(dim) if factor.kind == "map"]
        return math.prod(factor.old for factor in spanned), math.prod(factor.new for factor in spanned)

    @cached_property
    def whole(self) -> set[str]:
        """Groups that live outside the stack as well: one map for the whole network, as skip connections demand."""
        outside = [spec for spec in self.small_parts.values() if spec.layer is None]
        return {dim.group for spec in outside for dim in spec.parsed if dim.axes}

    @cached_property
    def residual(self) -> set[str]:
        """Groups of the whole network that blocks write to: the axis of the skip connections."""
        return self.whole & self._in_blocks("write")

    @cached_property
    def read(self) -> set[str]:
        """Groups that some parameter reads. Heads that nobody reads (queries, keys) meet in a dot product instead."""
        return {dim.group for dim in self.dims if dim.mode == "read" or dim.tied}

    @cached_property
    def shifted(self) -> set[str]:
        """Groups whose normalisation subtracts the mean, as LayerNorm's; RMSNorm's has a gain alone."""
        return {dim.group for dim in self.dims if dim.mode == "shift" or dim.centred}

    @cached_property
    def starts_normalised(self) -> bool:
        """Whether the residual stream begins as what a normalisation says, and not as embeddings."""
        before = [spec for spec in self.small_parts.values() if spec.layer is None and not spec.after]
        return any(dim.mode == "gain" and dim.group in self.residual for spec in before for dim in spec.parsed)

    def _in_blocks(self, mode: str) -> set[str]:
        blocks = [spec for spec in self.small_parts.values() if spec.layer is not None]
        return {dim.group for spec in blocks for dim in spec.parsed if dim.mode == mode}

    @cached_property
    def tables(self) -> dict[str, bool]:
        """The depth tables in order: one a module, or a role; whether each writes the residual axis."""
        tables: dict[str, bool] = {}
        for spec in self.roles.values():
            writes = any(dim.mode == "write" and dim.group in self.residual for dim in spec.parsed)
            tables[self.table(spec)] = tables.get(self.table(spec), False) or writes
        return tables

    def table(self, spec: ParamSpec) -> str:
        """The depth table that mixes a parameter."""
        return spec.module if self.preset.depth_by == "module" else spec.role

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the operator's tensors: what is trained, and what a Global-LiGO sends."""
        old_depth, new_depth = self.depths
        maps = old_depth if self.preset.per == "source" else new_depth
        shapes: dict[str, tuple[int, ...]] = {}
        for group, dim in self.groups.items():
            old, new = self.mapped(dim)
            rows = new - old if self.preset.fixed_top else new
            shapes[f"width.{group}"] = (rows, old) if group in self.whole else (maps, rows, old)
            if self.preset.own_read and group in self.residual:
                shapes[f"width.{group}{READ}"] = (rows, old)
            if self.preset.own_next and group in self._in_blocks("write"):
                shapes[f"width.{group}{NEXT}"] = shapes[f"width.{group}"]
        return shapes | {f"depth.{table}": (new_depth, old_depth) for table in self.tables}
