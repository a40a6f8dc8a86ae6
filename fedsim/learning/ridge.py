"""Ridge regression of classes on features, from sums over examples; layers that are given, not trained."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.tree import Tree, mapped
from fedsim.data.dataset import Split
from fedsim.learning.features import features
from fedsim.learning.task import Task
from fedsim.models import Form


def sums(f_nd: Tensor, labels_n: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """`G = phi^T phi` and `H = phi^T onehot(y)`, `(D, D)` and `(D, C)`; phi is `(f, 1)`, 1 for a bias: D = d + 1."""
    phi_nD = F.pad(f_nd, (0, 1), value=1.0)
    return phi_nD.T @ phi_nD, phi_nD.T @ F.one_hot(labels_n, classes).to(phi_nD)


@torch.no_grad()
def sums_of(
    task: Task,
    form: Form,
    model: Tree,
    shard: Split,
    batch_size: int,
    device: torch.device,
    size: int,
    then: Callable[[Tensor], Tensor] = lambda f_nd: f_nd,
) -> tuple[Tensor, Tensor]:
    """`sums` over a shard, of the features that the head of a model reads; in float64, on the CPU.

    - `size`: D; without the constant where it is d. - `then`: what is made of features, in float64.
    """
    classes, model = task.inputs.num_classes, mapped(in_double, model)
    G, H = (torch.zeros(size, columns, dtype=torch.float64) for columns in (size, classes))
    for index in torch.arange(len(shard.labels)).split(batch_size) if len(shard.labels) else ():
        batch = mapped(in_double, task.batch(shard, index, device))
        g, h = sums(then(features(task, form, model, batch)), batch["labels"], classes)
        G, H = G + g[:size, :size].cpu(), H + h[:size].cpu()
    return G, H


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
