"""Functions on trees.

A `Tree` is flat, tensors by name: a model, an operator. A `State` may be nested, `{"model": {...}, "momentum": {...}}`:
what server and clients keep, what is sent, what is trained. It is flattened where it is written, hashed or added up.
Functions take both. A part without tensors is as good as absent (`ordered` drops it): read it with `.get(name, {})`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


Tree = dict[str, Tensor]
State = dict[str, Any]  # tensors by name, or states
PATH = "::"  # between the names of parts and of tensors, where a state is flat
PIECE = 2**16  # elements


def flat(state: Mapping[str, Any], separator: str = PATH) -> Tree:
    """`{"a": {"b": t}}` -> `{"a::b": t}`.

    **Raises:** `ValueError` for a name that could not be told apart, or two tensors that would have one name.
    """
    found: Tree = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r}: a name in a state must be a text")
        if PATH in name or name[:1] == ":" or name[-1:] == ":":
            raise ValueError(f"{name!r}: a name in a state must not contain {PATH!r}, nor begin or end with ':'")
        if not isinstance(value, Tensor) and isinstance(value, Mapping):
            part = {f"{name}{separator}{path}": tensor for path, tensor in flat(value, separator).items()}
        else:
            part = {name: value}
        if not found.keys().isdisjoint(part):
            raise ValueError(f"{min(found.keys() & part)!r}: two tensors of a state have this name, written flat")
        found |= part
    return found


def nested(tree: Mapping[str, Any]) -> State:
    """The inverse of `flat`."""
    state: State = {}
    for path, value in tree.items():
        *parts, name = path.split(PATH)
        part = state
        for each in parts:
            part = part.setdefault(each, {})
        part[name] = value
    return state


def tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a state."""
    for value in state.values():
        if isinstance(value, Tensor):  # asked first: it is by far the faster question
            yield value
        else:
            yield from tensors(value)


def mapped(function: Callable[[Tensor], Tensor], state: Mapping[str, Any]) -> State:
    """The same state of other tensors."""
    return {n: function(value) if isinstance(value, Tensor) else mapped(function, value) for n, value in state.items()}


def numel(state: Mapping[str, Any]) -> int:
    """Number of parameters: of floating-point tensors only, for masks and indices are none."""
    return sum(tensor.numel() for tensor in tensors(state) if tensor.is_floating_point())


def nbytes(state: Mapping[str, Any]) -> int:
    """Bytes of what would be sent: numel x itemsize, names not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))


def ordered(state: Mapping[str, Any]) -> State:
    """The same tensors in order of name, each contiguous.

    Order decides sums over tensors (gradient norms), strides the rounding of products; files and messages forget both.
    """
    kept: State = {}
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            kept[name] = value.contiguous()
        elif not isinstance(value, Mapping):
            raise TypeError(f"{name!r} in a state is {value!r}: must be a tensor, or tensors by name")
        elif part := ordered(value):
            kept[name] = part
    return kept


def clone(state: Mapping[str, Any]) -> State:
    """The same in order of name, sharing no memory with the argument and belonging to no graph."""
    return mapped(lambda tensor: tensor.detach().clone(), ordered(state))


def lent(state: Mapping[str, Any]) -> State:
    """The same for somebody else, who may write into it: memory is shared until then, and copied by the first write."""
    return mapped(lent_tensor, state)


def lent_tensor(tensor: Tensor) -> Tensor:
    """`lent` of one tensor. On other devices than the CPU it is copied at once, which takes little time there."""
    return torch._lazy_clone(tensor) if tensor.is_cpu else tensor.clone()


def untouched(borrowed: State, state: State) -> bool:
    """Whether what is `lent` of a state still has its content."""
    one, other = flat(borrowed), flat(state)
    # Some ways of reading, such as `numpy()`, copy the memory as writing does.
    shared: Callable[[Tensor], bool] = torch._C._is_cow_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return all(shared(one[name]) or torch.equal(one[name], other[name]) for name in other)


def given_away(tensor: Tensor) -> Tensor:
    """A tensor of no graph into whose memory nobody else can write: copied where anybody else holds that memory."""
    memory = tensor.untyped_storage()
    alone = memory.resizable() and torch._C._storage_Use_Count(memory._cdata) == 2  # the tensor, and `memory`
    return tensor if alone else tensor.clone()


def to(state: Mapping[str, Any], device: torch.device | str) -> State:
    """The same on another device; tensors already there are not copied."""
    return mapped(lambda tensor: tensor.to(device), state)


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
    _check_alike(sum_, tree)
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
    _check_alike(left, right)
    for name, tensor in left.items():
        tensor.add_(right[name])
    return left


def quotient(sum_: Tree, weight: float, like: Mapping[str, Tensor]) -> Tree:
    """`sum_ / weight`, in the dtype of `like`. Empties `sum_`: tensor by tensor its memory is free again."""
    return {name: sum_.pop(name).div_(weight).to(like[name].dtype) for name in list(sum_)}


def _check_alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    if left.keys() != right.keys():
        raise ValueError(f"trees of different names cannot be added: {sorted(left.keys() ^ right.keys())[:4]}")
    for name, tensor in left.items():
        if tensor.shape != right[name].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(right[name].shape)}"
            raise ValueError(f"trees of different shapes cannot be added: {name!r} is {shapes}")


def sha256(state: Mapping[str, Any]) -> str:
    """Hash of names, dtypes, shapes and bits, in order of name: equal hashes mean equal tensors of equal names."""
    digest, tree = hashlib.sha256(), flat(state, ".")
    for name in sorted(tree):
        tensor = tree[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Hash of a text, for chains of hashes."""
    return hashlib.sha256(text.encode()).hexdigest()
