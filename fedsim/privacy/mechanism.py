"""What bounds an update, and the noise that hides it: the Gaussian and the Skellam mechanism on trees of tensors.

Norms, differences and noise are computed in float64, and rounded once to what the tensors are. A clipped update in
float32 may be longer than C by the rounding of its numbers, about 1e-7 of them; that real numbers are drawn with
finitely many digits is not accounted for either (Mironov 2012).
"""

import math

import numpy as np
import torch
from torch import Tensor

from fedsim.core.tree import Tree


def clipped(tree: Tree, received: Tree, clip: float, *, per_tensor: bool) -> tuple[Tree, bool]:
    """An update whose difference to what was received has at most this norm: each tensor's times 1 / sqrt(G), or the
    whole's.

    **Returns:** it, with the very tensors that needed no clipping, and whether none did.
    """
    moved = {name: tensor.double() - received.get(name, torch.zeros(())).double() for name, tensor in tree.items()}
    norms = {name: float(tensor.norm()) for name, tensor in moved.items()}
    whole = math.hypot(*norms.values())
    kept, most = dict(tree), clip / math.sqrt(len(tree)) if per_tensor else clip
    for name, tensor in tree.items():
        norm = norms[name] if per_tensor else whole
        if norm > most:
            kept[name] = (tensor.double() - moved[name] * (1 - most / norm)).to(tensor.dtype)
    return kept, all(kept[name] is tree[name] for name in tree)


def noised(tree: Tree, std: float, stream: torch.Generator) -> Tree:
    """Every number and a Gaussian of this standard deviation, drawn in float64 and in order of name."""
    if not std:
        return tree

    def one(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=stream, dtype=torch.float64).mul_(std)
        return drawn.to(tensor.device).add_(tensor).to(tensor.dtype)

    return {name: one(tree[name]) for name in sorted(tree)}


def noised_whole(tree: Tree, step: float, variance: float, drawn: np.random.Generator) -> Tree:
    """Every number rounded to a multiple of `step`, and as many steps of noise as two Poisson numbers differ by.

    - `variance`: of the noise, in squared steps.

    **Returns:** float64, in which a secure sum's words can be told exactly.
    """

    def one(tensor: Tensor) -> Tensor:
        plus, minus = (drawn.poisson(variance / 2, tuple(tensor.shape)) for _ in range(2))
        noise = torch.from_numpy(np.asarray(plus - minus, np.float64)).to(tensor.device)
        return (torch.round(tensor.double() / step) + noise) * step

    return {name: one(tree[name]) for name in sorted(tree)}
