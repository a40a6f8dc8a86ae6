"""Verbs on trees. A tree is a `dict[str, Tensor]`: a model, an operator, an update, a private state."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


Tree = dict[str, Tensor]


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


def scaled_sum(sum_: Mapping[str, Tensor] | None, tree: Mapping[str, Tensor], weight: float) -> Tree:
    """`sum + weight * tree` in float64; `sum=None` starts a sum.

    Integers times float32 are exact in float64, so the mean of one tree, or of equal trees, is that tree bit by bit.
    """
    if sum_ is None:
        return {name: tensor.detach().double() * weight for name, tensor in tree.items()}
    _check_same_names(sum_, tree)
    return {name: torch.add(sum_[name], tree[name].detach().double(), alpha=weight) for name in sum_}


def added(left: Mapping[str, Tensor] | None, right: Mapping[str, Tensor]) -> Tree:
    """`left + right`; `left=None` stands for zero."""
    if left is None:
        return dict(right)
    _check_same_names(left, right)
    return {name: left[name] + right[name] for name in left}


def _check_same_names(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    if left.keys() != right.keys():
        raise ValueError(f"trees of different names cannot be added: {sorted(left.keys() ^ right.keys())[:4]}")


def divided(sum_: Mapping[str, Tensor], weight: float, like: Mapping[str, Tensor]) -> Tree:
    """`sum / weight`, in the dtype of `like`."""
    return {name: (tensor / weight).to(like[name].dtype) for name, tensor in sum_.items()}


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
