"""Verbs on trees. A tree is a `dict[str, Tensor]`: a model, an operator, an update, a private state."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


Tree = dict[str, Tensor]
PIECE = 2**16  # elements


def numel(tree: Mapping[str, Tensor]) -> int:
    """Number of parameters in a tree; sets and indices, which are not floating point, are none."""
    return sum(tensor.numel() for tensor in tree.values() if tensor.is_floating_point())


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of a tree as it would be sent: numel x itemsize, names not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tree.values())


def ordered(tree: Mapping[str, Tensor]) -> Tree:
    """The same tensors in order of name. Order decides sums over tensors (gradient norms), and files forget it."""
    return {name: tree[name] for name in sorted(tree)}


def clone(tree: Mapping[str, Tensor]) -> Tree:
    """A tree in order of name that shares no memory with the argument and belongs to no graph."""
    return {name: tensor.detach().clone() for name, tensor in ordered(tree).items()}


def to(tree: Mapping[str, Tensor], device: torch.device | str) -> Tree:
    """The tree on another device; tensors already there are not copied."""
    return {name: tensor.to(device) for name, tensor in tree.items()}


def prefixed(tree: Mapping[str, Tensor], prefix: str) -> Tree:
    """`{"a": t}` -> `{prefix + "a": t}`: several trees in one state."""
    return {prefix + name: tensor for name, tensor in tree.items()}


def under(tree: Mapping[str, Tensor], prefix: str) -> Tree:
    """The inverse of `prefixed`: entries whose name starts with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tree.items() if name.startswith(prefix)}


def scaled_sum(sum_: Tree | None, tree: Mapping[str, Tensor], weight: float) -> Tree:
    """`sum_ + weight * tree` in float64, written into `sum_`, which nobody else may hold; None starts a sum.

    Integers times float32 are exact in float64, so the mean of one tree, or of equal trees, is that tree bit by bit.
    """
    begun = sum_ is not None
    if sum_ is None:
        # Contiguous, as a transposed tensor is not: the pieces below are views of it.
        sum_ = {
            name: torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device) for name, tensor in tree.items()
        }
    _check_same_names(sum_, tree)
    for name, total in sum_.items():
        for into, piece in _pieces(total, tree[name].detach()):
            if begun:
                into.add_(piece.double(), alpha=weight)
            else:
                torch.mul(piece.double(), weight, out=into)
    return sum_


def _pieces(total: Tensor, added: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both in pieces that stay in the cache: what is converted need not be written to memory and read again."""
    if total.numel() <= PIECE:
        return [(total, added)]
    return zip(total.view(-1).split(PIECE), added.reshape(-1).split(PIECE), strict=True)


def accumulated(left: Tree | None, right: Mapping[str, Tensor]) -> Tree:
    """`left + right`, written into `left`, which nobody else may hold; `left=None` starts with a copy of `right`.

    One accumulator in memory, however many are added.
    """
    if left is None:
        return {name: tensor.detach().clone() for name, tensor in right.items()}
    _check_same_names(left, right)
    for name, tensor in left.items():
        tensor.add_(right[name])
    return left


def quotient(sum_: Tree, weight: float, like: Mapping[str, Tensor]) -> Tree:
    """`sum_ / weight`, in the dtype of `like`. Empties `sum_`: tensor by tensor its memory is free again."""
    return {name: sum_.pop(name).div_(weight).to(like[name].dtype) for name in list(sum_)}


def _check_same_names(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    if left.keys() != right.keys():
        raise ValueError(f"trees of different names cannot be added: {sorted(left.keys() ^ right.keys())[:4]}")


def sha256(tree: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bits, in order of name: equal hashes mean equal trees."""
    digest = hashlib.sha256()
    for name in sorted(tree):
        tensor = tree[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Hash of a text, for chains of hashes."""
    return hashlib.sha256(text.encode()).hexdigest()
