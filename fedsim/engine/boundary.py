"""What the methods of an algorithm return, checked where it arrives: before it is kept, added up or sent on.

A participant's methods are checked in the process that holds it, inline and on Ray alike. What is refused there is that
participant's failure, as if its method had raised, and `Experiment.on_error` says what becomes of it.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fedsim.core import tree as trees
from fedsim.core.fields import shown
from fedsim.core.tree import State, Tree
from fedsim.core.updates import ClientUpdate


FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
DTYPES = frozenset(FLOATS | {torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
LARGEST = 1e308  # a metric
LEAST, MOST = 1e-200, 2**53  # weights whose products with numbers of fp32 neither vanish nor overflow in float64

Layout = Mapping[str, tuple[torch.dtype, torch.Size]]  # of a state, flat


@dataclasses.dataclass(frozen=True)
class Sent:
    """How the updates of a tier look: as `layout`, or, where `as_received`, as the payload."""

    layout: Layout
    as_received: bool


def layout_of(state: Mapping[str, Any]) -> Layout:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in trees.flat(state).items()}


def checked(returned: Any, client: int, sent: Sent | None, received: Mapping[str, Any]) -> tuple[ClientUpdate, State]:
    """What `client_update` returned, if it can be averaged and kept. The update is contiguous, on the CPU, of no graph.

    - `sent`: how the update looks, if that is known; `received`: the payload.

    **Raises:** `ValueError` naming the field, what it is and what is accepted.
    """
    tree, (update, state) = check_outcome(returned, client), returned
    found = {path: (tensor.dtype, tensor.shape) for path, tensor in tree.items()}
    if sent is not None and found != sent.layout and not (sent.as_received and found == layout_of(received)):
        _refuse_layout(found, layout_of(received) if sent.as_received else sent.layout)
    metrics = check_metrics(update.metrics)
    tree = {
        path: tree[path].detach().cpu().contiguous() for path in sorted(tree, key=lambda path: path.split(trees.PATH))
    }
    weight = _weight(update.weight, least=LEAST if tree else 0)
    check_finite(tree, "ClientUpdate.tree", "; a training that diverges ends so: a lower learning rate may help")
    return ClientUpdate(client, trees.nested(tree), weight, metrics), state


def check_outcome(returned: Any, client: int) -> Tree:
    """What `client_update` returned is an update of this client and a state, whatever numbers are in them.

    **Returns:** the update's tensors, flat.
    """
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], ClientUpdate)):
        _refuse("what client_update returns", _kind(returned), "a ClientUpdate and the next private state")
    update, state = returned
    if isinstance(update.client, bool) or not isinstance(update.client, numbers.Integral) or update.client != client:
        _refuse("ClientUpdate.client", _shown(update.client), f"{client}, the client's own id")
    check_state(state, "private state")
    return check_state(update.tree, "ClientUpdate.tree")


def check_state(state: Any, field: str) -> Tree:
    """It is made of plain tensors in memory, by name. **Returns:** them, flat."""
    if not isinstance(state, Mapping):
        _refuse(field, _kind(state), "tensors, or mappings of tensors, by name")
    try:
        tree = trees.flat(state)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    for path, value in tree.items():
        # nn.Parameter is a class of its own, but holds no more than a tensor. Others may mean anything.
        plain = type(value) is Tensor or type(value) is nn.Parameter
        if not plain or value.dtype not in DTYPES or value.layout is not torch.strided or value.is_meta:
            found = f"{_kind(value)} {_described(value)}" if isinstance(value, Tensor) else _kind(value)
            _refuse(f"{field}[{path!r}]", found, "a dense torch.Tensor of floats, ints or bools, in memory")
    return tree


def check_finite(tree: Tree, field: str, hint: str = "") -> None:
    """No number is NaN or infinite. A sum is finite only if all of it is, and takes a tenth of looking at each."""
    for path, tensor in tree.items():
        if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
            continue
        nan, bad = int(tensor.isnan().sum()), int((~tensor.isfinite()).sum())
        if bad:
            kinds = " and ".join([*(["NaN"] if nan else []), *(["inf"] if bad > nan else [])])
            _refuse(f"{field}[{path!r}]", f"{kinds} in {bad} of {tensor.numel()} numbers", f"finite{hint}")


def _weight(weight: Any, least: float) -> float:
    is_number: bool = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if is_number and least <= weight <= MOST:  # pyright: ignore[reportOperatorIssue]
        return weight if type(weight) is int else float(weight)
    _refuse("ClientUpdate.weight", _shown(weight), f"a number from {LEAST:g} to 2**53 (0 if there are no tensors)")


def check_metrics(metrics: Any) -> dict[str, float]:
    """They are finite numbers by name."""
    return dict(_metrics(metrics))


def _metrics(metrics: Any) -> Iterator[tuple[str, float]]:
    if not isinstance(metrics, Mapping):
        _refuse("ClientUpdate.metrics", _kind(metrics), "numbers by name")
    for name, value in metrics.items():
        if not isinstance(name, str):
            _refuse("ClientUpdate.metrics", f"{{{_shown(name)}: ...}}", "numbers by name, which is a text")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
            _refuse(f"ClientUpdate.metrics[{name!r}]", _shown(value), "a finite number")
        yield name, value


def _refuse_layout(found: Layout, expected: Layout) -> NoReturn:
    accepted = "as this tier's clients send without data, unless the algorithm says `updates_vary`"
    for path in sorted(found.keys() | expected.keys()):
        there, wanted = (_entry(layout.get(path)) for layout in (found, expected))
        if there != wanted:
            _refuse(f"ClientUpdate.tree[{path!r}]", there, f"{wanted}, {accepted}")
    raise AssertionError("two layouts that differ nowhere")


def _entry(entry: tuple[torch.dtype, torch.Size] | None) -> str:
    return "missing" if entry is None else f"{str(entry[0]).removeprefix('torch.')} {tuple(entry[1])}"


def _described(tensor: Tensor) -> str:
    return f"of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}, {tensor.layout}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__qualname__}"


def _shown(value: Any) -> str:
    """A value that may be anything."""
    return shown(value) if isinstance(value, int | float | str | None) else _kind(value)


def _refuse(field: str, found: str, accepted: str) -> NoReturn:
    raise ValueError(f"{field}={found}: must be {accepted}")
