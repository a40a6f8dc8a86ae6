"""The LiGO operator on a tree with named axes (Wang et al., ICLR 2023, arXiv 2303.00980).

    width   W' = B_out W A_in^T    b' = B_out b    norm g' = B_R g    embedding E' = E B_R^T
    depth   W'[k] = sum_l w[m, k, l] W[l]

Linear in the small weights, differentiable in its own tensors: `B` (how the coordinates of an axis are written), `A`
(how they are read: the same matrix up to a fixed scale of its rows, or one of its own) and `w`, a table L2 x L1 for
each module m of the block. Which matrices there are and what they start as is the preset's business
(`fedgrow_algo.presets`); where they apply is read off the named axes (`fedsim.core.submodel`), so nothing here knows
the name of a model or of a parameter.

A map need not span its whole dimension (`Factor`): coordinates that RoPE turns keep their place in every head, heads
that share a key's and value's head are copied, and one map may serve several chunks of an MLP. Letters: D1, D2 small
and large size of an axis; L1, L2 small and large depth; k a large block, l a small one.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fedgrow_algo.equations import copies, mix, widen
from fedgrow_algo.preset import NEXT, READ, Factor
from fedgrow_algo.sizes import Sizes
from fedsim.core.submodel import Dim, ParamSpec, join_fused, split_fused
from fedsim.core.tree import State, Tree


ALIGNED = 16  # columns that are multiplied together are padded to a multiple of this: odd strides are slow
MIX = -1  # in a plan: the step that mixes blocks; other steps are positions of dimensions


@dataclasses.dataclass(frozen=True)
class Operator(Sizes):
    """A LiGO operator from one size of a model family to a larger one. It holds sizes; its tensors come in and go out.

    **Raises:** `ValueError` where an axis would shrink, or the preset cannot map the sizes.
    """

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tree:
        """The tensors training starts from; names and shapes are `shapes`."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.preset.init(self, generator).items()}
        assert {name: tuple(t.shape) for name, t in tensors.items()} == self.shapes
        return tensors

    def stack(self, small: Mapping[str, Tensor]) -> Tree:
        """The small weights with blocks stacked, `(L1, ...)` a role; others as they are. Done once: they are frozen.

        A normalisation that a block lacks counts as what it would start as.
        """
        if small.keys() != self.small.keys():
            raise ValueError(f"not a model of the small form: {sorted(small.keys() ^ self.small.keys())[:4]}")
        parts = split_fused(small, self.small, self.small_axes)
        stacked = {name: parts[name] for name, spec in self.small_parts.items() if spec.layer is None}
        held = {(spec.role, spec.layer): parts[name] for name, spec in self.small_parts.items()}
        like = next(iter(small.values()))
        for role, spec in self.roles.items():
            blocks = [held.get((role, layer)) for layer in range(self.depths[0])]
            stacked[role] = torch.stack([self._absent(spec, like) if block is None else block for block in blocks])
        return stacked

    def _absent(self, spec: ParamSpec, like: Tensor) -> Tensor:
        """The gain or the shift of a normalisation that changes nothing."""
        assert all(dim.mode in ("gain", "shift") for dim in spec.parsed), f"{spec.role}: some blocks lack it"
        sizes = [dim.size(self.small_axes) or 1 for dim in spec.parsed]
        return like.new_full(sizes, float(spec.parsed[0].mode == "gain"))

    def drawn(self, generator: torch.Generator) -> State:
        """What stays as it was drawn, beside what is trained (`fedgrow_algo.low_rank`): here nothing."""
        return {}

    def prepared(self, stacked: Tree, drawn: State) -> Tree:
        """What `grow` takes of a small model, made once (`fedgrow_algo.low_rank`): here `stacked` itself."""
        return stacked

    def grow(self, tensors: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> Tree:
        """The large weights, by name: `stacked` from `stack`, `tensors` as `init` returns them."""
        maps = {dim: self.matrix(tensors, dim) for dim in self.dims}
        begun = self._begun(maps, stacked)
        grown: Tree = {}
        blocks: dict[str, tuple[Tensor, ...]] = {}
        for name, spec in self.large_parts.items():
            if spec.layer is None:
                tensor = stacked[name][None]
                for position, dim in enumerate(spec.parsed):
                    if dim.axes:
                        tensor = self.widened(tensor, maps[dim], dim, position)
                grown[name] = tensor[0]
                continue
            if spec.role not in blocks:
                tensor = begun.get(spec.role, stacked[spec.role])
                for step in self.plans[spec.role][spec.role in begun :]:
                    if step == MIX:
                        tensor = mix(tensors[f"depth.{self.table(spec)}"], tensor)
                    else:
                        tensor = self.widened_block(tensors, maps, tensor, spec.parsed[step], step)
                blocks[spec.role] = tensor.unbind()  # one gradient of the stack, not one a block
            grown[name] = blocks[spec.role][spec.layer]
        return join_fused(grown, self.large)

    def __call__(self, tensors: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> Tree:
        """`grow(tensors, stack(small))`."""
        return self.grow(tensors, self.stack(small))

    def matrix(self, tensors: Mapping[str, Tensor], dim: Dim) -> Tensor:
        """The map a dimension grows with, `(D2, D1)` of `mapped` or one a block; under `fixed_top` its lower part."""
        matrix, scale = self.tensor(tensors, dim), self.preset.scale(self, dim)
        return matrix if scale is None else scale.to(matrix)[:, None] * matrix

    def tensor(self, tensors: Mapping[str, Tensor], dim: Dim) -> Tensor:
        """The same without the preset's factors on its rows.

        Where blocks write from the block above as well, the sum of both maps: what everything else sees.
        """
        own = self.preset.own_read and dim.group in self.residual and (dim.mode == "read" or self._read_gain(dim))
        matrix = tensors[f"width.{dim.group}{READ if own else ''}"]
        if f"width.{dim.group}{NEXT}" in tensors:
            matrix = matrix + tensors[f"width.{dim.group}{NEXT}"]
        return matrix

    def _read_gain(self, dim: Dim) -> bool:
        """A gain alone (RMSNorm's) before blocks goes with their readers: coordinates written as 0 must not lose it."""
        return dim.mode == "gain" and dim.group not in self.shifted and not self.post_norm

    @cached_property
    def plans(self) -> dict[str, tuple[int, ...]]:
        """For each role of a block, the cheapest order of widening its dimensions and mixing blocks, by count."""
        plans: dict[str, tuple[int, ...]] = {}
        for spec in self.roles.values():
            shape = [dim.size(self.small_axes) or 1 for dim in spec.parsed]
            steps = [MIX, *(position for position, dim in enumerate(spec.parsed) if dim.axes)]
            orders = [order for order in itertools.permutations(steps) if self._allowed(order, spec)]
            plans[spec.role] = min(orders, key=lambda order: self.multiplications(order, spec, shape))
        return plans

    def _allowed(self, order: tuple[int, ...], spec: ParamSpec) -> bool:
        """A matrix that belongs to blocks meets only blocks it belongs to: its own, or, where a block writes from the
        block above, what has become its own."""
        named = [(position, dim) for position, dim in enumerate(spec.parsed) if dim.axes]
        above = [position for position, dim in named if self.preset.own_next and dim.mode == "write"]
        own = [position for position, dim in named if dim.group not in self.whole and position not in above]
        before = order[: order.index(MIX)]
        if self.preset.per == "target":
            return {*own, *above}.isdisjoint(before)
        return {*own, *above} <= {*before} and all(order.index(p) < order.index(q) for p in above for q in own)

    def multiplications(self, order: tuple[int, ...], spec: ParamSpec, shape: list[int]) -> int:
        """Multiplications of a forward and backward pass in this order, for a parameter `shape` of each small block.

        The first step's input is frozen, so it has a gradient less than the others.
        """
        blocks, sizes, total = self.depths[0], list(shape), 0
        for number, step in enumerate(order):
            passes = 2 if number == 0 else 3
            if step == MIX:
                total += passes * self.depths[0] * self.depths[1] * math.prod(sizes)
                blocks = self.depths[1]
                continue
            dim = spec.parsed[step]
            old, new = self.mapped(dim)
            copied = math.prod(factor.new / factor.old for factor in self.factors(dim) if factor.kind == "copy")
            twice = 2 if self.preset.own_next and dim.mode == "write" else 1
            rows = new - old if self.preset.fixed_top else new
            total += passes * twice * blocks * round(math.prod(sizes) * copied) * rows
            sizes[step] = dim.size(self.large_axes) or 1
        return total

    def _begun(self, maps: Mapping[Dim, Tensor], stacked: Mapping[str, Tensor]) -> Tree:
        """What the first steps of the plans make of blocks, where they widen with one matrix a block.

        All uses of a matrix are columns of one product: its gradient is then one product too, not a sum of several of
        the matrix' size. Small weights have no gradient: laying them side by side costs nothing in the backward pass.
        """
        uses: dict[int, list[tuple[str, Dim, int]]] = {}
        for spec in self.roles.values():
            first = self.plans[spec.role][0]
            if first == MIX:
                continue
            dim = spec.parsed[first]
            alone = {factor.kind for factor in self.factors(dim)} == {"map"} and not self.preset.fixed_top
            if alone and maps[dim].ndim == 3 and not (self.preset.own_next and dim.mode == "write"):
                uses.setdefault(id(maps[dim]), []).append((spec.role, dim, first + 1))
        begun: Tree = {}
        for group in uses.values():
            moved = [stacked[role].movedim(position, 1) for role, _, position in group]
            columns = [tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None] for tensor in moved]
            sizes = [column.shape[2] for column in columns]
            columns.append(columns[0].new_zeros(*columns[0].shape[:2], -sum(sizes) % ALIGNED))
            wide = widen(torch.cat(columns, 2), maps[group[0][1]], 1).split([*sizes, columns[-1].shape[2]], 2)
            for (role, _, position), tensor, part in zip(group, moved, wide[:-1], strict=True):
                begun[role] = part.reshape(*part.shape[:2], *tensor.shape[2:]).movedim(1, position)
        return begun

    def widened_block(
        self, tensors: Mapping[str, Tensor], maps: Mapping[Dim, Tensor], blocks: Tensor, dim: Dim, position: int
    ) -> Tensor:
        """One dimension of all blocks, `(L, ...)`."""
        if not (self.preset.own_next and dim.mode == "write"):
            return self.widened(blocks, maps[dim], dim, position)
        own, next_ = tensors[f"width.{dim.group}"], tensors[f"width.{dim.group}{NEXT}"]
        scale = self.preset.scale(self, dim)
        if scale is not None:
            own, next_ = (scale.to(matrix)[:, None] * matrix for matrix in (own, next_))
        return self.widened(blocks, own, dim, position) + self.widened(self.above(blocks), next_, dim, position)

    def above(self, blocks: Tensor) -> Tensor:
        """In each block's place the block above; the last one has none, and stays."""
        return blocks[torch.arange(1, len(blocks) + 1).clamp(max=len(blocks) - 1).to(blocks.device)]

    def widened(self, blocks: Tensor, B: Tensor, dim: Dim, position: int) -> Tensor:
        """One dimension of some blocks, `(L, ...)`, factor by factor; `position` does not count the blocks."""
        if {factor.kind for factor in self.factors(dim)} == {"map"}:
            return self._with_top(blocks, B, position + 1)
        return self.together(self._with_top(self.apart(blocks, dim, position), B, position + 1), dim, position)

    def apart(self, blocks: Tensor, dim: Dim, position: int) -> Tensor:
        """A dimension as two: what its map spans, D1, and what it does not, flat; what is copied is copied here."""
        factors, at = self.factors(dim), position + 1
        blocks = blocks.unflatten(at, [factor.old for factor in factors])
        for i, factor in enumerate(factors):
            if factor.kind == "copy" and factor.new != factor.old:
                blocks = blocks.index_select(at + i, copies(factor.old, factor.new).to(blocks.device))
                share = self.preset.share(factor.old, factor.new).to(blocks)
                blocks = blocks * share.reshape(-1, *[1] * (blocks.ndim - at - i - 1))
        spanned, _ = self._spanned(factors, at)
        moved = blocks.movedim(spanned, [*range(at, at + len(spanned))])
        return moved.reshape(*moved.shape[:at], self.mapped(dim)[0], -1, *moved.shape[at + len(factors) :])

    def together(self, blocks: Tensor, dim: Dim, position: int) -> Tensor:
        """The inverse of `apart`, once the map has made D2 of D1."""
        factors, at = self.factors(dim), position + 1
        spanned, rest = self._spanned(factors, at)
        sizes = [factors[i - at].new for i in (*spanned, *rest)]
        blocks = blocks.reshape(*blocks.shape[:at], *sizes, *blocks.shape[at + 2 :])
        return blocks.movedim([*range(at, at + len(spanned))], spanned).flatten(at, at + len(factors) - 1)

    def _spanned(self, factors: list[Factor], at: int) -> tuple[list[int], list[int]]:
        """Where the factors are that a map spans, and the others, if the first is at `at`."""
        kinds = [factor.kind == "map" for factor in factors]
        return [at + i for i, is_ in enumerate(kinds) if is_], [at + i for i, is_ in enumerate(kinds) if not is_]

    def _with_top(self, blocks: Tensor, B: Tensor, position: int) -> Tensor:
        """`widen`, or, where the matrix is `[I ; B]`, the blocks themselves on top of it."""
        wide = widen(blocks, B, position)
        return torch.cat([blocks, wide], position) if self.preset.fixed_top else wide
