"""Pairs around a method: what a client does to its update, and what the server does to what arrives.

    client   update <- pair_1.client(update), ..., pair_n.client(update)       the last thing before it is sent
    server   updates <- pair_n.server(updates), ..., pair_1.server(updates)    before the method sees them

A pair is written once and works for every method that averages; methods know of none. What comes out,
`Around(FedAvg(...), (pair,))`, is a method like any other.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    Partial,
    Payload,
    ServerContext,
    State,
    Steps,
    Training,
    Tree,
)
from fedsim.core.fields import check_types, refuse


if TYPE_CHECKING:
    from torch import nn

    from fedsim.learning.task import Task
    from fedsim.models import Form

Arriving = Iterable[ClientUpdate | Partial]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A client's side and the server's. Concrete pairs are frozen dataclasses; what is not given does nothing."""

    @property
    def each(self) -> bool:
        """Whether the server's side has to see every update by itself: then nothing is added up before it."""
        return False

    def check(self, algorithm: Algorithm, participants: int) -> None:
        """Refuse, with a `ValueError`, a method or a number of participants that this pair cannot work with."""
        return None

    # at the aggregator ----------------------------------------------------------------------------------------------

    def start(self) -> State:
        """What the server's side remembers, before round 1."""
        return {}

    def sent(self, state: State, ctx: ServerContext) -> State:
        """What clients receive of it, beside the method's payload."""
        return {}

    def server(
        self, updates: Arriving, state: State, payload: Callable[[], Payload], ctx: ServerContext
    ) -> tuple[Arriving, State]:
        """What the method gets to see instead of what has arrived, and what is remembered.

        `payload()` is what clients had received of the method.
        """
        return updates, state

    # at a participant -----------------------------------------------------------------------------------------------

    def prepare(self, ctx: ClientContext) -> ClientContext:
        """What a client works with: its data, for those who change them."""
        return ctx

    def training(self, asked: Training, ctx: ClientContext) -> Training:
        """What is trained instead of what the method asks for."""
        return asked

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        """What is sent instead of a method's update. The client had received its `payload`, and `sent` of this pair."""
        return update


@dataclasses.dataclass(frozen=True)
class Around(Algorithm):
    """A method and the pairs around it, the first one nearest to it. Its name, and all else, are the method's.

    - `method`: any that averages: every client of a round receives the same. - `pairs`: at least one.
    """

    method: Algorithm
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        check_types(self, "algorithm")
        if not self.pairs:
            refuse("algorithm.pairs", self.pairs, "at least one pair")

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def preset_name(self) -> str:
        return self.method.preset_name

    @property
    def leaves(self) -> Leaves:
        return self.method.leaves

    @property
    def updates_vary(self) -> bool:
        return self.method.updates_vary

    def check(self, task: "Task", forms: "Sequence[Form]", intermediate: "Form | None", target: "Form") -> None:
        self.method.check(task, forms, intermediate, target)

    def stage(self, round: int) -> str:
        return self.method.stage(round)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        own = {str(place): start for place, pair in enumerate(self.pairs) if (start := pair.start())}
        return _joined(self.method.server_init(ctx), own)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        state, own = _split(state)
        payloads = self.method.server_broadcast(state, cohort, ctx)
        sent = {name: found for name, kept in own.items() if (found := self.pairs[int(name)].sent(kept, ctx))}
        joined = {
            id(payload): _joined(payload, sent) if sent else payload for payload in payloads.values()
        }  # one for those alike
        return {client: joined[id(payload)] for client, payload in payloads.items()}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return None if any(pair.each for pair in self.pairs) else self.method.combine(updates)

    def server_aggregate(self, state: State, updates: Arriving, ctx: ServerContext) -> State:
        state, own = _split(state)
        first = ctx.clients[:1]
        payload = functools.cache(lambda: self.method.server_broadcast(state, first, ctx)[first[0].id])
        for place, pair in reversed([*enumerate(self.pairs)]):
            updates, kept = pair.server(updates, own.get(str(place), {}), payload, ctx)
            own |= {str(place): kept} if kept else {}
        return _joined(self.method.server_aggregate(state, iter(updates), ctx), own)

    def server_model(self, state: State, ctx: ServerContext) -> "nn.Module | None":
        return self.method.server_model(_split(state)[0], ctx)

    def server_covered(self, state: State) -> Tree | None:
        return self.method.server_covered(_split(state)[0])

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        ctx = self._prepared(ctx)
        return (yield from self._trained(self.method.client_init(ctx), ctx))

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        ctx, (payload, sent) = self._prepared(ctx), _split(payload)
        update, kept = yield from self._trained(self.method.client_update(payload, state, ctx), ctx)
        for place, pair in enumerate(self.pairs):
            update = pair.client(update, payload, sent.get(str(place), {}), ctx)
        return update, kept

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> "nn.Module":
        return self.method.client_model(_split(payload)[0], state, ctx)

    def _prepared(self, ctx: ClientContext) -> ClientContext:
        for pair in self.pairs:
            ctx = pair.prepare(ctx)
        return ctx

    def _trained(self, asking: Any, ctx: ClientContext) -> Steps[Any]:
        """The result of a client's method, whose requests go through the pairs."""
        if not isinstance(asking, Generator):
            return asking
        try:
            asked = next(asking)
            while True:
                for pair in self.pairs:
                    asked = pair.training(asked, ctx)
                try:
                    answer = yield asked
                except Exception as error:  # of any kind: it belongs to the method
                    asked = asking.throw(error)
                else:
                    asked = asking.send(answer)
        except StopIteration as end:
            return end.value


def bare(method: Algorithm, payload: Payload) -> tuple[Algorithm, Payload]:
    """A method, and what a client of it has received, without the pairs around them."""
    while isinstance(method, Around):
        method, payload = method.method, _split(payload)[0]
    return method, payload


_METHOD, _PAIRS = "around.method", "around.pairs"  # names that no method's own state has


def _joined(state: Mapping[str, Any], own: dict[str, State]) -> State:
    """A method's state as it is where no pair has one of its own, else both."""
    return {_METHOD: state, _PAIRS: own} if own else dict(state)


def _split(state: Mapping[str, Any]) -> tuple[State, dict[str, State]]:
    return (state[_METHOD], dict(state[_PAIRS])) if _METHOD in state else (dict(state), {})
