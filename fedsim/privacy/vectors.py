"""An update as one vector: what it changes of what was received, in float64, tensor after tensor in order of name.

x_k = update_k - received, and 0 for received where nothing was received under a name
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedsim.algorithm import ClientUpdate, Payload
from fedsim.core.tree import PATH, Tree, flat, nested


def change(update: ClientUpdate, received: Payload) -> Tensor:
    """What an update changes, `(size,)`."""
    return torch.cat([(tensor.double() - origin).flatten() for _, tensor, origin in _beside(update, received)])


def with_change(update: ClientUpdate, received: Payload, vector: Tensor) -> ClientUpdate:
    """The same client's update if it changed this, `(size,)`; the inverse of `change`, but for rounding."""
    tree: Tree = {}
    for name, tensor, origin in _beside(update, received):
        part, vector = vector[: tensor.numel()], vector[tensor.numel() :]
        tree[name] = (origin + part.view(tensor.shape)).to(tensor.dtype)
    return dataclasses.replace(update, tree=nested(tree))


def changes(updates: Sequence[ClientUpdate], received: Payload) -> Tensor:
    """What updates change, `(clients, size)`. **Raises:** `ValueError` for updates of different names or shapes."""
    check_alike(updates)
    return torch.stack([change(update, received) for update in updates])


def squared_distances(x: Tensor) -> Tensor:
    """Between rows, `(n, n)`. Not by way of products, which lose small distances between long vectors."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def check_alike(updates: Sequence[ClientUpdate]) -> None:
    """**Raises:** `ValueError` for updates of different names or shapes, naming one tensor and both participants."""
    if not updates:
        return
    first, *others = updates
    expected = _shapes(first)
    for update in others:
        shapes = _shapes(update)
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                there, here = (found.get(name, "missing") for found in (expected, shapes))
                raise ValueError(
                    f"updates that are compared must have the same names and shapes: {name!r} is {there} in that of "
                    f"participant {first.client}, and {here} in that of participant {update.client}"
                )


def _shapes(update: ClientUpdate) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in flat(update.tree).items()}


def _beside(update: ClientUpdate, received: Payload) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, tensor, and in float64 what was received in its place, in order of name."""
    tree, before = flat(update.tree), flat(received)
    for name in sorted(tree, key=lambda name: name.split(PATH)):
        tensor, origin = tree[name].detach(), before.get(name)
        if origin is None or origin.shape != tensor.shape:
            origin = torch.zeros_like(tensor)
        yield name, tensor, origin.detach().double()
