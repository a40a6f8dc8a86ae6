"""Participants that send, keep or raise what they must not: an algorithm that any process can import."""

import dataclasses
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.overhead_cases import Constant, without_model
from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    State,
    weighted_mean,
    weighted_sum,
)
from fedsim.core.tree import mapped
from fedsim.experiment import Experiment


ROUND = 2  # in which participants are wrong

Outcome = tuple[ClientUpdate, State]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Labelled(Tensor):
    """A tensor with a meaning of its own."""


def with_tensor(tensor: Any, name: str = "w") -> Callable[[Outcome], Outcome]:
    """Another leaf in the part `model` of an update."""
    return lambda right: (tree_of(right, {"model": {**right[0].tree["model"], name: tensor}}), right[1])


def with_number(number: float) -> Callable[[Outcome], Outcome]:
    def wrong(right: Outcome) -> Outcome:
        tensor = right[0].tree["model"]["w"].clone()
        tensor[1, 2] = number
        return with_tensor(tensor)(right)

    return wrong


def with_update(**fields: Any) -> Callable[[Outcome], Any]:
    return lambda right: (dataclasses.replace(right[0], **fields), right[1])


def with_state(state: Any) -> Callable[[Outcome], Any]:
    return lambda right: (right[0], state)


def tree_of(right: Outcome, changes: Mapping[str, Any]) -> ClientUpdate:
    return dataclasses.replace(right[0], tree={**right[0].tree, **changes})


def without(right: Outcome) -> Outcome:
    return tree_of(right, {"model": {"w": right[0].tree["model"]["w"]}}), right[1]


def raising(error: BaseException) -> Callable[[Outcome], Any]:
    def wrong(right: Outcome) -> Any:
        raise error

    return wrong


def exits(right: Outcome) -> Any:
    sys.exit(3)


def its_own_cause(right: Outcome) -> Any:
    error = ValueError("a circle")
    raise error from error


def asks_for_nothing_known(right: Outcome) -> Generator[Any, Any, Outcome]:
    yield "a training"
    return right


def never_returns_an_outcome(right: Outcome) -> Generator[Any, Any, None]:
    return
    yield


def itself(right: Outcome) -> Any:
    tree: dict[str, Any] = {}
    tree["tree"] = tree
    return ClientUpdate(right[0].client, tree, 1), right[1]


ONES = torch.ones(2, 3)
TREE, WEIGHT = r"ClientUpdate\.tree\['model::w'\]=", r"ClientUpdate\.weight="
# name -> what becomes of a right outcome, and what is said of it.
WRONG: Mapping[str, tuple[Callable[[Outcome], Any], str]] = MappingProxyType(
    {
        # numbers
        "nan": (with_number(np.nan), TREE + "NaN in 1 of 6 numbers: must be finite"),
        "inf": (with_number(np.inf), TREE + "inf in 1 of 6 numbers: must be finite"),
        "minus inf": (with_number(-np.inf), TREE + "inf in 1 of 6 numbers"),
        "all nan": (with_tensor(ONES * np.nan), TREE + "NaN in 6 of 6 numbers"),
        "inf and minus inf": (with_tensor(torch.tensor([[np.inf, -np.inf, 0.0]] * 2)), TREE + "inf in 4 of 6"),
        # names, shapes, dtypes
        "wider": (with_tensor(torch.ones(2, 4)), TREE + r"float32 \(2, 4\): must be float32 \(2, 3\), as this tier"),
        "one row": (with_tensor(torch.ones(1, 3)), TREE + r"float32 \(1, 3\): must be float32 \(2, 3\)"),
        "a number": (with_tensor(torch.ones(())), TREE + r"float32 \(\): must be"),
        "transposed": (with_tensor(ONES.t()), TREE + r"float32 \(3, 2\): must be"),
        "empty": (with_tensor(torch.ones(0, 3)), TREE + r"float32 \(0, 3\): must be"),
        "missing": (without, r"ClientUpdate\.tree\['model::b'\]=missing: must be float32 \(3,\)"),
        "extra": (with_tensor(ONES, "c"), r"ClientUpdate\.tree\['model::c'\]=float32 \(2, 3\): must be missing"),
        "flat": (with_update(tree={"w": ONES}), r"ClientUpdate\.tree\['model::b'\]=missing"),
        "nothing": (with_update(tree={}), r"ClientUpdate\.tree\['.*'\]=missing"),
        "float64": (with_tensor(ONES.double()), TREE + r"float64 \(2, 3\): must be float32"),
        "bfloat16": (with_tensor(ONES.bfloat16()), TREE + "bfloat16"),
        "integers": (with_tensor(ONES.long()), TREE + "int64"),
        "complex": (with_tensor(torch.ones(2, 3, dtype=torch.complex64)), TREE + "a Tensor of complex64"),
        "float8": (with_tensor(ONES.to(torch.float8_e4m3fn)), TREE + "a Tensor of float8_e4m3fn"),
        "sparse": (with_tensor(ONES.to_sparse()), TREE + "a Tensor .*sparse"),
        "meta": (with_tensor(ONES.to("meta")), TREE + "a Tensor .* on meta"),
        "subclass": (with_tensor(ONES.as_subclass(Labelled)), TREE + "a Labelled"),
        # what is no tensor
        "numpy": (with_tensor(np.ones((2, 3), np.float32)), TREE + "a ndarray: must be a dense torch.Tensor"),
        "list": (with_tensor([1.0]), TREE + "a list"),
        "float": (with_tensor(1.0), TREE + "a float"),
        "none": (with_tensor(None), TREE + "None"),
        "module": (with_tensor(nn.Linear(3, 2)), TREE + "a Linear"),
        "name of int": (with_tensor(ONES, 5), r"ClientUpdate\.tree: 5: a name in a state must be a text"),  # type: ignore[arg-type]
        "name of a path": (with_tensor(ONES, "a::b"), r"ClientUpdate\.tree: 'a::b': a name in a state must not"),
        "itself": (itself, "RecursionError"),
        "tree is a list": (with_update(tree=[ONES]), r"ClientUpdate\.tree=a list: must be tensors"),
        "tree is a tensor": (with_update(tree=ONES), r"ClientUpdate\.tree=a Tensor"),
        "tree is none": (with_update(tree=None), r"ClientUpdate\.tree=None"),
        # weights
        "weight 0": (with_update(weight=0), WEIGHT + "0: must be a number from 1e-200 to 2"),
        "weight -1": (with_update(weight=-1), WEIGHT + "-1"),
        "weight nan": (with_update(weight=float("nan")), WEIGHT + "nan"),
        "weight inf": (with_update(weight=float("inf")), WEIGHT + "inf"),
        "weight huge": (with_update(weight=1e300), WEIGHT + r"1e\+300"),
        "weight of digits": (with_update(weight=10**400), WEIGHT + "10000"),
        "weight tiny": (with_update(weight=1e-300), WEIGHT + "1e-300"),
        "weight true": (with_update(weight=True), WEIGHT + "True"),
        "weight text": (with_update(weight="12"), WEIGHT + "'12'"),
        "weight none": (with_update(weight=None), WEIGHT + "None"),
        "weight tensor": (with_update(weight=torch.tensor(3.0)), WEIGHT + "a Tensor"),
        "weight complex": (with_update(weight=3 + 0j), WEIGHT + "a complex"),
        # metrics, ids, kinds
        "metrics nan": (with_update(metrics={"a": float("nan")}), r"ClientUpdate\.metrics\['a'\]=nan: must be"),
        "metrics text": (with_update(metrics={"a": "1"}), r"ClientUpdate\.metrics\['a'\]='1'"),
        "metrics tensor": (with_update(metrics={"a": ONES}), r"ClientUpdate\.metrics\['a'\]=a Tensor"),
        "metrics by number": (with_update(metrics={1: 1.0}), r"ClientUpdate\.metrics=\{1: \.\.\.\}"),
        "metrics none": (with_update(metrics=None), r"ClientUpdate\.metrics=None"),
        "another client": (with_update(client=99), r"ClientUpdate\.client=99: must be \d+, the client's own id"),
        "client text": (with_update(client="1"), r"ClientUpdate\.client='1'"),
        "only an update": (lambda right: right[0], "client_update returns=a ClientUpdate: must be a ClientUpdate and"),
        "none at all": (lambda right: None, "client_update returns=None"),
        "a dict": (lambda right: (right[0].tree, right[1]), "client_update returns=a tuple"),
        # private state
        "state nan": (with_state({"seen": torch.tensor(np.nan)}), r"private state\['seen'\]=NaN in 1 of 1"),
        "state inf": (with_state({"a": {"b": ONES / 0}}), r"private state\['a::b'\]=inf in 6 of 6"),
        "state list": (with_state([1]), "private state=a list"),
        "state none": (with_state(None), "private state=None"),
        "state number": (with_state({"seen": 3}), r"private state\['seen'\]=a int"),
        "state sparse": (with_state({"seen": ONES.to_sparse()}), r"private state\['seen'\]=a Tensor .*sparse"),
        "state meta": (with_state({"seen": ONES.to("meta")}), r"private state\['seen'\]=a Tensor .* on meta"),
        # what is raised or asked for
        "exits": (exits, r"a method of participant \d+ raised SystemExit\(3\)"),
        "keyboard": (raising(KeyboardInterrupt()), r"raised KeyboardInterrupt\(\)"),
        "unprintable": (raising(Unprintable()), "Unprintable: <exception str.. failed>"),
        "its own cause": (its_own_cause, "ValueError: a circle"),
        "asks": (asks_for_nothing_known, "a client's method yields 'a training': must be a Training"),
        "no outcome": (never_returns_an_outcome, "client_update returns=None"),
        "long": (raising(ValueError("x" * 10**8)), r"ValueError: x+ \[[\d,]+ more characters\] x+$"),
        "escapes": (raising(ValueError("\x1b[31mred\r\u202e\udc80")), r"ValueError: \\x1b\[31mred\\r\\u202e\\udc80$"),
    }
)


@dataclasses.dataclass(frozen=True)
class Wrong(Algorithm):
    """Averages a model to which clients add their id; each counts its rounds in private state.

    - `kinds`: of `WRONG`, or "" or a write, by client: what it does in round `ROUND`.
    - `away`: those who are wrong raise at once instead.
    - `seen`: a file for the calls of those who are wrong; empty: they are not noted.
    """

    kinds: tuple[str, ...] = ()
    away: bool = False
    seen: str = ""

    @property
    def name(self) -> str:
        return "wrong"

    def server_init(self, ctx: ServerContext) -> State:
        return {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return weighted_mean(updates, state)

    def client_init(self, ctx: ClientContext) -> State:
        return {"seen": torch.zeros(())}

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Any:
        tree = mapped(lambda tensor: tensor + 0.1 * (ctx.info.id + 1), payload)
        right = ClientUpdate(ctx.info.id, tree, 1 + ctx.info.id), {"seen": state["seen"] + 1}
        kind = self.kinds[ctx.info.id] if ctx.info.id < len(self.kinds) else ""
        if ctx.round != ROUND or not kind or not len(ctx.train.labels):
            return right
        if self.seen:
            with open(Path(self.seen), "a") as file:
                file.write(f"{ctx.info.id}\n")
        if self.away:
            raise RuntimeError("away")
        return WRONG[kind][0](right) if kind in WRONG else WRITES[kind](payload, state, right)

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return Constant(ctx.task.inputs.num_classes)


def experiment(*kinds: str, clients: int = 4, **fields: Any) -> Experiment:
    """So many participants in chunks of two, three rounds; fields of `Wrong` and of the experiment."""
    ours = {name: fields.pop(name) for name in ("away", "seen") if name in fields}
    settings: dict[str, Any] = {"participants": clients, "rounds": 3, "chunk": 2, "eval_every": 1000} | fields
    return dataclasses.replace(without_model(), algorithm=Wrong(kinds, **ours), **settings)


# writes ---------------------------------------------------------------------------------------------------------------

KEPT: dict[str, Tensor] = {}  # what a method keeps of its own, from call to call


def in_place(payload: Any, state: State, right: Outcome) -> Outcome:
    payload["model"]["w"].mul_(float("nan"))
    state["seen"].add_(1000)
    return right


def past_autograd(payload: Any, state: State, right: Outcome) -> Outcome:
    payload["model"]["w"].data.zero_()
    state["seen"].data.fill_(1000)
    return right


def through_numpy(payload: Any, state: State, right: Outcome) -> Outcome:
    payload["model"]["w"].numpy()[:] = 77
    state["seen"].numpy()[...] = 1000
    return right


def other_entries(payload: Any, state: State, right: Outcome) -> Outcome:
    payload["model"]["w"] = ONES
    payload["more"] = ONES
    state["seen"] = torch.tensor(1000.0)
    return right


def later(payload: Any, state: State, right: Outcome) -> Outcome:
    """Writes into what earlier clients were given and sent, and keeps its own for the next to be written into."""
    for tensor in KEPT.values():
        tensor.data.fill_(-5)
    KEPT.clear()
    KEPT.update(payload=payload["model"]["w"], state=state["seen"], sent=right[0].tree["model"]["w"])
    return right


def one_buffer(payload: Any, state: State, right: Outcome) -> Outcome:
    """Sends the same tensor as every other client, written anew."""
    buffer = KEPT.setdefault("buffer", torch.empty(2, 3))
    return with_tensor(torch.add(right[0].tree["model"]["w"], 0, out=buffer))(right)


def one_array(payload: Any, state: State, right: Outcome) -> Outcome:
    """The same of an array that is no tensor's own."""
    buffer = KEPT.setdefault("array", torch.from_numpy(np.empty((2, 3), np.float32)))
    return with_tensor(buffer.copy_(right[0].tree["model"]["w"]))(right)


WRITES: Mapping[str, Callable[[Any, State, Outcome], Outcome]] = MappingProxyType(
    {
        "in place": in_place,
        "past autograd": past_autograd,
        "through numpy": through_numpy,
        "other entries": other_entries,
        "later": later,
        "one buffer": one_buffer,
        "one array": one_array,
    }
)
