"""Ridge regression of classes on features, from sums over examples; layers that are given, not trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sums(f_nd: Tensor, labels_n: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """`G = phi^T phi` and `H = phi^T onehot(y)`, `(D, D)` and `(D, C)`; phi is `(f, 1)`, 1 for a bias: D = d + 1."""
    phi_nD = F.pad(f_nd, (0, 1), value=1.0)
    return phi_nD.T @ phi_nD, phi_nD.T @ F.one_hot(labels_n, classes).to(phi_nD)


def ridge(g: Tensor, h: Tensor, gamma: float) -> Tensor:
    """`W = (G + gamma I)^{-1} H`: `(D, D)` and `(D, C)` give `(D, C)`."""
    return torch.linalg.solve(g + gamma * torch.eye(len(g), dtype=g.dtype), h)


def in_double(tensor: Tensor) -> Tensor:
    """In float64, so that sums do not tell how examples were divided; whole numbers stay."""
    return tensor.double() if tensor.is_floating_point() else tensor


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of this weight, `(out, in)`, and bias, `(out,)`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # where nothing is drawn
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return layer


def random_relu(width: int, count: int, generator: torch.Generator) -> nn.Sequential:
    """`relu(V f + b)`, V of entries N(0, 1 / width) and b of N(0, 1): `(n, width)` gives `(n, count)`."""
    weight, bias = (torch.randn(count, size, generator=generator) for size in (width, 1))
    return nn.Sequential(linear(weight / width**0.5, bias[:, 0]), nn.ReLU())
