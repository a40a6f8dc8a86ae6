"""What a LiGO operator is made of, one function an equation (Wang et al., ICLR 2023, arXiv 2303.00980)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.core.submodel import ParamSpec


Specs = Mapping[str, ParamSpec]


def widen(W_L: Tensor, B: Tensor, position: int) -> Tensor:
    """`W' = B W` along one dimension of each block (LiGO, width operator; `W A^T` is the same along the other).

    **Arguments:**

    - `W_L`: blocks, `(L, ...)` with size D1 at `position`.
    - `B`: `(D2, D1)` for all blocks, or `(L, D2, D1)`.

    **Returns:** `(L, ...)` with size D2 at `position`.
    """
    if position == 1 and W_L.ndim == 3:  # the general way below would leave the result transposed in memory
        return B.expand(len(W_L), *B.shape[-2:]) @ W_L
    W = W_L.movedim(position, -1)
    rows = W.reshape(W.shape[0], -1, W.shape[-1])  # (L, everything else, D1)
    return (rows @ B.mT).reshape(*W.shape[:-1], -1).movedim(-1, position)


def mix(w: Tensor, W_L: Tensor) -> Tensor:
    """`W'[k] = sum_l w[k, l] W[l]` (LiGO, depth operator): `(L2, L1)` and `(L1, ...)` to `(L2, ...)`."""
    return (w @ W_L.flatten(1)).reshape(w.shape[0], *W_L.shape[1:])


def copies(old: int, new: int) -> Tensor:
    """Which old unit each unit of the larger axis copies: `(new,)`, old units first and in order."""
    return torch.arange(new) % old


def depth(specs: Specs) -> int:
    """Number of blocks."""
    return 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
