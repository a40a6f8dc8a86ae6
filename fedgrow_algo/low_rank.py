"""Low-rank LiGO, the project's own: every map of an operator is B0 + U V^T, and U alone is trained.

    B0                       the preset's start, kept; V, (D1, r), of orthonormal columns: both drawn from the seed
    U                        (D2, r), zero at first, so that growing starts where the preset does

Growing is linear in each map, so a matrix that is written by B0 + U V^T and read by A0 + P Q^T grows to

    B0 W A0^T  +  U (V^T W A0^T)  +  (B0 W Q) P^T  +  U (V^T W Q) P^T

What stands in brackets, and the first term, knows nothing of U and P: it is made once for a small model. A step then
costs O(d^2 r) a matrix, where full maps cost O(d^3). Sent are U and the depth tables; V is the same for all, so the
mean of U V^T is (the mean of U) V^T, exactly. With r = D1, V is the identity and the operator that of full maps.

Where maps belong to target blocks, blocks share the start of the first one and all of V, so that mixing them may wait
until U is known: `ligo`, which draws a start for each block, draws one for all here.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedgrow_algo.equations import mix, widen
from fedgrow_algo.ligo import Operator
from fedgrow_algo.preset import NEXT
from fedsim.core.submodel import Dim, ParamSpec, join_fused
from fedsim.core.tree import State, Tree, to


START, COLUMNS = "start", "columns"  # of what is drawn: B0 and V


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An operator of low rank; it is used as a `fedgrow_algo.ligo.Operator` is.

    - `full`: whose maps these are. - `rank`: r, of each map at most its smaller size D1.
    """

    full: Operator
    rank: int

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is trained, and of what a Global-LiGO sends: U of each map, and the depth tables."""
        return {
            name: (*shape[:-1], min(self.rank, shape[-1])) if _is_map(name) else shape
            for name, shape in self.full.shapes.items()
        }

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tree:
        """The tensors training starts from; names and shapes are `shapes`."""
        start = self.full.init(generator, dtype)
        zero = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes.items()}
        return {name: zero[name] if _is_map(name) else start[name] for name in self.shapes}

    def stack(self, small: Mapping[str, Tensor]) -> Tree:
        """As `Operator.stack`."""
        return self.full.stack(small)

    def drawn(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> State:
        """B0 by the name of its map, and V by that of its group: what is never trained.

        - `generator`: as `init` was given.
        """
        start = self.full.init(generator, dtype)
        for name, shape in self.full.shapes.items():
            if _is_map(name) and len(shape) == 3 and self.full.preset.per == "target":
                start[name] = start[name][0]
        sizes = {group: self.full.mapped(dim)[0] for group, dim in self.full.groups.items()}
        return {
            START: start,
            COLUMNS: {group: self._columns(size, generator).to(dtype) for group, size in sizes.items()},
        }

    def prepared(self, stacked: Mapping[str, Tensor], drawn: State) -> State:
        """What of growing does not change while U is trained: `{term: {name or role: tensor}}`.

        A term is "t" and, for each named dimension of a parameter, 0 where B0 has widened it, 1 where V^T has cut it.
        """
        like = next(iter(stacked.values()))
        start, V = to(drawn[START], like.device), to(drawn[COLUMNS], like.device)
        terms: State = {}
        for name, spec in self._parameters.items():
            found = {"t": stacked[name] if spec.layer is not None else stacked[name][None]}
            for position, dim in self._dims(spec):
                found = {
                    term + kind: self._widened(start, tensor, spec, dim, position)
                    if kind == "0"
                    else self._cut(tensor, V[dim.group], dim, position)
                    for term, tensor in found.items()
                    for kind in "01"
                }
            for term, tensor in found.items():
                terms.setdefault(term, {})[name] = tensor if spec.layer is not None else tensor[0]
        return terms

    def grow(self, tensors: Mapping[str, Tensor], prepared: Mapping[str, Any]) -> Tree:
        """The large weights, by name: `prepared` from `prepared`, `tensors` as `init` returns them."""
        with torch.autocast(next(iter(tensors.values())).device.type, enabled=False):  # all of it in one precision
            whole = {
                name: self._joined(tensors, prepared, name, spec).unbind() for name, spec in self._parameters.items()
            }
        grown = {
            name: whole[name][0] if spec.layer is None else whole[spec.role][spec.layer]
            for name, spec in self.full.large_parts.items()
        }
        return join_fused(grown, self.full.large)

    # parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _parameters(self) -> dict[str, ParamSpec]:
        """The parameters outside blocks by name, and those of blocks by role."""
        outside = {name: spec for name, spec in self.full.large_parts.items() if spec.layer is None}
        return outside | self.full.roles

    def _dims(self, spec: ParamSpec) -> list[tuple[int, Dim]]:
        """Named dimensions, first those that blocks write from the block above: other maps are those of the result."""
        named = [(position, dim) for position, dim in enumerate(spec.parsed) if dim.axes]
        return sorted(named, key=lambda each: not self._from_above(spec, each[1]))

    def _from_above(self, spec: ParamSpec, dim: Dim) -> bool:
        return self.full.preset.own_next and dim.mode == "write" and spec.layer is not None

    def _plain(self, spec: ParamSpec, dim: Dim) -> bool:
        """Whether one product with U widens the dimension."""
        return not self._from_above(spec, dim) and {factor.kind for factor in self.full.factors(dim)} == {"map"}

    def _columns(self, size: int, generator: torch.Generator) -> Tensor:
        """V: `(D1, r)`."""
        if self.rank >= size:
            return torch.eye(size, dtype=torch.float64)
        return torch.linalg.qr(torch.randn(size, self.rank, generator=generator, dtype=torch.float64)).Q

    def _joined(self, tensors: Mapping[str, Tensor], prepared: Mapping[str, Any], name: str, spec: ParamSpec) -> Tensor:
        """One parameter of all large blocks, `(L2, ...)`."""
        mixed_first = spec.layer is not None and self.full.preset.per == "target"
        table = tensors[f"depth.{self.full.table(spec)}"] if spec.layer is not None else None

        def term(kinds: str) -> Tensor:
            tensor = prepared[f"t{kinds}"][name]
            return tensor[None] if table is None else mix(table, tensor) if mixed_first else tensor

        def of(kinds: str, dims: list[tuple[int, Dim]]) -> Tensor:
            if not dims:
                return term(kinds)
            position, dim = dims[-1]
            rest, low = (of(f"{kind}{kinds}", dims[:-1]) for kind in "01")
            return self._plus_raised(rest, tensors, low, spec, dim, position)

        dims = self._dims(spec)
        if len(dims) == 2 and all(self._plain(spec, dim) for _, dim in dims):
            U, P = (self._outer(self.full.tensor(tensors, dim), dim) for _, dim in dims)
            joined = _matrices(term("00"), term("01"), term("10"), term("11"), U, P)
        else:
            joined = of("", dims)
        return joined if table is None or mixed_first else mix(table, joined)

    def _widened(self, start: Tree, blocks: Tensor, spec: ParamSpec, dim: Dim, position: int) -> Tensor:
        """One dimension by B0."""
        maps = {dim: self.full.matrix(start, dim)}
        if spec.layer is None:
            return self.full.widened(blocks, maps[dim], dim, position)
        return self.full.widened_block(start, maps, blocks, dim, position)

    def _cut(self, blocks: Tensor, V: Tensor, dim: Dim, position: int) -> Tensor:
        """One dimension by V^T; of what the map does not span, nothing changes: `(r, others)` in its place."""
        apart = self.full.apart(blocks, dim, position)
        return widen(apart, V.T, position + 1).flatten(position + 1, position + 2)

    def _plus_raised(
        self, rest: Tensor, tensors: Mapping[str, Tensor], low: Tensor, spec: ParamSpec, dim: Dim, position: int
    ) -> Tensor:
        """`rest`, and what `_cut` left of one dimension, by U."""
        at, rank = position + 1, min(self.rank, self.full.mapped(dim)[0])
        low = low.unflatten(at, (rank, -1))
        if self._from_above(spec, dim):
            own, next_ = (self._outer(tensors[f"width.{dim.group}{end}"], dim) for end in ("", NEXT))
            wide = widen(low, own, at) + widen(self.full.above(low), next_, at)
        else:
            wide = widen(low, self._outer(self.full.tensor(tensors, dim), dim), at)
        return rest + self.full.together(wide, dim, position)

    def _outer(self, U: Tensor, dim: Dim) -> Tensor:
        """U as this use of its map has it: with the preset's factors on its rows; zeros where rows of B0 are I."""
        scale = self.full.preset.scale(self.full, dim)
        U = U if scale is None else scale.to(U)[:, None] * U
        return F.pad(U, (0, 0, self.full.mapped(dim)[0], 0)) if self.full.preset.fixed_top else U


def _matrices(rest: Tensor, right: Tensor, left: Tensor, corner: Tensor, U: Tensor, P: Tensor) -> Tensor:
    """`rest + right P^T + U (left + corner P^T)` of matrices, `(L, D2, D2')`, in one pass over what is largest."""
    U, P = (each.expand(len(rest), *each.shape[-2:]) for each in (U, P))
    left = torch.baddbmm(left, corner, P.mT)
    return torch.baddbmm(rest, torch.cat([U, right], 2), torch.cat([left, P.mT], 1))


def _is_map(name: str) -> bool:
    return name.startswith("width.")
