"""Named axes: what each dimension of each parameter of a transformer is.

Growth operators and sub-model extraction are operations on *axes*, never on parameter names. A family declares
one `ParamSpec` a parameter and a method reads only those: a method works for every family, a family for every method.

How a dimension is written (`ParamSpec.dims`):

| text | meaning |
|---|---|
| `"embed"` | this dimension *writes* the axis: it makes its coordinates |
| `"<embed"` | it *reads* the axis: the next layer's view of coordinates that another parameter wrote |
| `"*embed"`, `"+embed"` | gain and shift of a normalisation over the axis |
| `"*-embed"` | a gain without a shift, where the mean is subtracted all the same: LayerNorm's, not RMSNorm's |
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

A sub-model keeps some coordinates of each axis (`Cut`): it is taken out with `Cut.extract`, and what several of them
have learned goes back with `ScatterMean`.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fedsim.core.tree import Tree


FUSED = " + "  # a shift's "+" is never followed by a space

# Which coordinates of an axis a sub-model keeps, in its own order: by axis, "embed", or for one block alone, "mlp.3",
# or for one group alone, "pooled:embed".
Lists = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of one parameter, parsed from its text form (of one part, where the dimension is fused)."""

    mode: str  # "write", "read", "gain", "shift", or "fixed"
    group: str  # dimensions of one group (in one block) share a map
    axes: tuple[str, ...]  # sizes multiply, first axis slowest; none: never resized
    tied: bool = False  # a gain or shift whose result is read by a tied matrix
    centred: bool = False  # a gain alone, of a normalisation that subtracts the mean

    @staticmethod
    def parse(text: str) -> "Dim":
        assert FUSED not in text, f"split {text!r} first"
        if not text or text.startswith("="):
            return Dim("fixed", text[1:], ())
        mode = {"<": "read", "*": "gain", "+": "shift"}.get(text[0], "write")
        body = text[mode != "write" :]
        centred = mode == "gain" and body.startswith("-")
        body = body.removeprefix("-")
        tied = mode in ("gain", "shift") and body.startswith("<")
        group, _, axes = body[tied:].rpartition(":")
        return Dim(mode, group or axes, tuple(axes.split()), tied, centred)

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
    - `kind`: sets its block apart from others that compute something else with the same parameters (local attention).
    - `after`: whether it stands after the blocks: last normalisation, pooler, head. Early exits have one each of these.
    """

    dims: tuple[str, ...]
    layer: int | None
    role: str
    kind: str = ""
    after: bool = False

    @cached_property
    def parsed(self) -> tuple[Dim, ...]:
        return tuple(Dim.parse(text) for text in self.dims)

    @cached_property
    def parsed_parts(self) -> tuple[Dim, ...]:
        """Dimensions of all its parts."""
        return tuple(dim for part in self.parts(self.role).values() for dim in part.parsed)

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

        A part is called by the group of its dimension, `c_attn.weight` -> `c_attn/query.weight`, and by its number
        where parts share a group (`Wi/mlp1.weight`): its weight and its bias are a module of their own.
        """
        if self.fused is None:
            return {name: self}
        before, texts, after = self.dims[: self.fused], self.dims[self.fused].split(FUSED), self.dims[self.fused + 1 :]
        groups = [Dim.parse(text).group for text in texts]
        assert "" not in groups, f"{self.role}: a fused part needs an axis"
        labels = [
            group if groups.count(group) == 1 else f"{group}{1 + groups[:number].count(group)}"
            for number, group in enumerate(groups)
        ]
        return {
            _part(name, label): dataclasses.replace(self, dims=(*before, text, *after), role=_part(self.role, label))
            for label, text in zip(labels, texts, strict=True)
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


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a sub-model lies in a larger model of the same depth.

    - `specs`, `axes`: of the larger model. - `lists`: what is kept of each axis; all of an axis that is not there.
    """

    specs: Mapping[str, ParamSpec]
    axes: Mapping[str, int]
    lists: Lists

    @cached_property
    def small_axes(self) -> dict[str, int]:
        """Sizes of the sub-model's axes; an axis has one size in all blocks."""
        sizes = dict(self.axes)
        for key, kept in self.lists.items():
            sizes[key.rpartition(":")[2].partition(".")[0]] = len(kept)
        return sizes

    @cached_property
    def places(self) -> dict[str, tuple[Tensor | None, ...]]:
        """For each parameter (fused ones apart), the coordinates kept of each dimension; None: all there are."""
        return {
            name: tuple(self._kept(dim, spec.layer) for dim in spec.parsed)
            for name, spec in split_specs(self.specs).items()
        }

    def _kept(self, dim: Dim, layer: int | None) -> Tensor | None:
        if not dim.axes:
            return None
        index = torch.zeros(1, dtype=torch.long)
        for axis in dim.axes:  # head-major: the coordinates of a head stay together
            keys = (f"{axis}.{layer}", f"{dim.group}:{axis}", axis)
            kept = next((self.lists[key] for key in keys if key in self.lists), torch.arange(self.axes[axis]))
            index = (index[:, None] * self.axes[axis] + kept).flatten()
        return index

    def extract(self, tree: Mapping[str, Tensor]) -> Tree:
        """The sub-model's parameters; gradients reach `tree`."""
        parts = split_fused(tree, self.specs, self.axes)
        for name, places in self.places.items():
            for position, kept in enumerate(places):
                if kept is not None:
                    parts[name] = parts[name].index_select(position, kept.to(parts[name].device))
        return join_fused(parts, self.specs)


class ScatterMean:
    """Each coordinate's weighted mean over the sub-models that have it; where none has, it stays as it was.

        theta_c <- sum_k w_k theta_kc / sum_k w_k    over the k that cover c

    The server update of partial training (HeteroFL, Diao et al., ICLR 2021, equation 3, is the case w = 1). Two sums,
    in the order of `add`, in float64.
    """

    def __init__(self, whole: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], axes: Mapping[str, int]) -> None:
        self.whole, self.specs, self.axes = whole, specs, axes
        parts = split_fused(whole, specs, axes)
        self.sums: Tree = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parts.items()}
        self.weights: Tree = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parts.items()}

    def add(
        self, cut: Cut, tree: Mapping[str, Tensor], weight: float, rows: Mapping[str, Tensor] | None = None
    ) -> None:
        """One sub-model.

        **Arguments:**

        - `rows`: which classes ("class") and tokens ("token") it vouches for, of bools; the others' rows do not count.
        """
        parsed = {name: spec.parsed for name, spec in split_specs(cut.specs).items()}
        for name, tensor in split_fused(tree, cut.specs, cut.small_axes).items():
            weights = torch.full_like(tensor, weight, dtype=torch.float64)
            for position, dim in enumerate(parsed[name]):
                if rows and not dim.axes and dim.group in rows:
                    vouched = rows[dim.group].to(weights)
                    weights *= vouched.reshape(-1, *[1] * (tensor.ndim - position - 1))
            at = _grid(cut.places[name], tensor)
            self.sums[name][at] += weights * tensor.double()
            self.weights[name][at] += weights

    def mean(self) -> Tree:
        """The next model, in the dtypes of the last."""
        before = split_fused(self.whole, self.specs, self.axes)
        parts = {
            name: torch.where(weight > 0, self.sums[name] / weight, before[name].double()).to(before[name].dtype)
            for name, weight in self.weights.items()
        }
        return join_fused(parts, self.specs)

    def covered(self) -> Tree:
        """Which coordinates somebody had, of bools, under the names and in the shapes of the whole model."""
        return join_fused({name: weight > 0 for name, weight in self.weights.items()}, self.specs)


def _grid(places: tuple[Tensor | None, ...], tensor: Tensor) -> tuple[Tensor, ...]:
    """Index of the block where a sub-model's tensor lies: one index a dimension, shaped to broadcast."""
    grid = []
    for position, kept in enumerate(places):
        index = torch.arange(tensor.shape[position]) if kept is None else kept
        grid.append(index.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - position - 1)))
    return tuple(grid)
