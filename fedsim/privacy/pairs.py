"""Pairs around a method: what a client does to its update, and what the server does to what arrives.

    client   update <- pair_1.client(update), ..., pair_n.client(update)       the last thing before it is sent
    server   updates <- pair_n.server(updates), ..., pair_1.server(updates)    before the method sees them

A pair is written once and works for every method that averages; methods know of none. What comes out,
`Around(FedAvg(...), (pair,))`, is a method like any other.
"""

import dataclasses
import functools
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

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
    Trainings,
    Tree,
)
from fedsim.core import tree as trees
from fedsim.core.fields import check_types, refuse
from fedsim.privacy.pair import CUT, Arriving, Pair
from fedsim.privacy.vectors import check_alike


if TYPE_CHECKING:
    from torch import nn

    from fedsim.data.source import Split
    from fedsim.experiment import Experiment
    from fedsim.learning.task import Task
    from fedsim.models import Form


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
        if isinstance(self.method, Around):
            refuse("algorithm.method", self.method.name, "a method itself: all its pairs stand in one tuple")
        *others, last = self.pairs
        if any(pair.hides or (last.hides and pair.each) for pair in others):
            accepted = "with the one that hides updates as the last, and none that looks at each of them"
            refuse("algorithm.pairs", self._kinds, accepted)
        for place, pair in enumerate(self.pairs):
            if pair.sums and any(inner.each for inner in self.pairs[:place]):
                accepted = f"with pairs that look at each update after {type(pair).__name__}, which adds them up"
                refuse("algorithm.pairs", self._kinds, accepted)

    @property
    def _kinds(self) -> list[str]:
        return [type(pair).__name__ for pair in self.pairs]

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

    @property
    def sends_statistics(self) -> bool:
        return self.method.sends_statistics

    def check(self, task: "Task", forms: "Sequence[Form]", intermediate: "Form | None", target: "Form") -> None:
        self.method.check(task, forms, intermediate, target)
        for pair in self.pairs:
            pair.check_task(task)

    def check_cohort(self, participants: int, updates: Sequence[ClientUpdate] = ()) -> None:
        adds_up = type(self.method).combine is not Algorithm.combine and self.method.leaves != "nothing"
        if self._each and not adds_up:
            accepted = "a method that averages what its clients send, for a pair that compares their updates"
            refuse("algorithm.method", self.method.name, accepted)
        for pair in self.pairs:
            pair.check(self.method, participants)
        if self._each:
            check_alike([update for update in updates if update.tree])

    def check_experiment(self, experiment: "Experiment") -> None:
        for pair in self.pairs:
            pair.check_experiment(experiment)

    def spent(self, experiment: "Experiment", round: int, trained: Collection[Trainings] = ()) -> Mapping[str, float]:
        return next((found for pair in self.pairs if (found := pair.spent(experiment, round, trained))), {})

    def stage(self, round: int) -> str:
        return self.method.stage(round)

    def _shared(self, round: int) -> bool:
        """Whether anything leaves a participant in this round: else there is nothing to protect, nor to attack."""
        return self.stage(round) == "federated"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        own = {str(place): start for place, pair in enumerate(self.pairs) if (start := pair.start())}
        return _joined(self.method.server_init(ctx), own)

    def server_begin(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> State:
        state, own = _split(state)
        state = self.method.server_begin(state, cohort, ctx)
        for place, pair in enumerate(self.pairs) if self._shared(ctx.round) else ():
            kept = pair.begin(own.get(str(place), {}), cohort, _asking(ctx, place))
            own |= {str(place): kept} if kept else {}
        return _joined(state, own)

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        state, own = _split(state)
        payloads = self.method.server_broadcast(state, cohort, ctx)
        if self._shared(ctx.round) and any(pair.common for pair in self.pairs):
            self._check_common([*payloads.values()])
        sent = {name: found for name, kept in own.items() if (found := self.pairs[int(name)].sent(kept, ctx))}
        # Clients who receive the same object of the method receive the same one of the pairs.
        joined = {id(payload): _joined(payload, sent) if sent else payload for payload in payloads.values()}
        return {client: joined[id(payload)] for client, payload in payloads.items()}

    def _check_common(self, payloads: Sequence[Payload]) -> None:
        one = trees.flat(payloads[0]) if payloads else {}
        for payload in {id(payload): payload for payload in payloads[1:] if payload is not payloads[0]}.values():
            other = trees.flat(payload)
            if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
                refuse("algorithm.method", self.name, "a method whose clients all receive the same")

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return None if self._each else self.method.combine(updates)

    def server_aggregate(self, state: State, updates: Arriving, ctx: ServerContext) -> State:
        state, own = _split(state)
        first = ctx.clients[:1]
        payload = functools.cache(lambda: self.method.server_broadcast(state, first, ctx)[first[0].id])
        for place, pair in reversed([*enumerate(self.pairs)] if self._shared(ctx.round) else []):
            updates, kept = pair.server(updates, own.pop(str(place), {}), payload, _asking(ctx, place))
            own |= {str(place): kept} if kept else {}
        return _joined(self.method.server_aggregate(state, iter(updates), ctx), own)

    def server_model(self, state: State, ctx: ServerContext) -> "nn.Module | None":
        return self.method.server_model(_split(state)[0], ctx)

    def server_covered(self, state: State) -> Tree | None:
        return self.method.server_covered(_split(state)[0])

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State]:
        ctx = self._prepared(ctx)
        own = {str(place): kept for place, pair in enumerate(self.pairs) if (kept := pair.keeps(ctx))}
        return _joined((yield from self._trained(self.method.client_init(ctx), ctx)), own)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        ctx, (payload, sent), (state, own) = self._prepared(ctx), _split(payload), _split(state)
        update, kept = yield from self._trained(self.method.client_update(payload, state, ctx), ctx)
        for place, pair in enumerate(self.pairs if self._shared(ctx.round) else ()):
            of_it = sent.get(str(place), {}) | own.get(str(place), {})
            update = pair.client(update, payload, of_it, ctx)
        if update.metrics.get(CUT) and any(pair.noises for pair in self.pairs):
            refuse("numbers.clip", getattr(self.pairs[-1], "numbers", None), "of all numbers that are sent with noise")
        return update, _joined(kept, own) if own else kept

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> "nn.Module":
        return self.method.client_model(_split(payload)[0], _split(state)[0], ctx)

    def client_answer(self, question: Payload, state: State, ctx: ClientContext) -> State:
        (question, asked), (state, own) = _split(question), _split(state)
        for name, of_pair in asked.items():
            return self.pairs[int(name)].answer(of_pair, own.get(name, {}), ctx)
        return self.method.client_answer(question, state, ctx)

    def client_scores(self, model: "nn.Module", test: "Split", ctx: ClientContext) -> Mapping[str, float]:
        found = dict(self.method.client_scores(model, test, ctx))
        for pair in self.pairs:
            found |= pair.scores(model, test, ctx)
        return found

    @property
    def _each(self) -> bool:
        return any(pair.each for pair in self.pairs)

    def _prepared(self, ctx: ClientContext) -> ClientContext:
        for pair in self.pairs:
            ctx = pair.prepare(ctx)
        return ctx

    def _trained(self, asking: Any, ctx: ClientContext) -> Steps[Any]:
        """The result of a client's method, whose requests go through the pairs, on the data that they prepared."""
        if not isinstance(asking, Generator):
            return asking
        try:
            asked = next(asking)
            while True:
                for pair in self.pairs:
                    asked = pair.training(asked, ctx)
                try:
                    answer = yield ctx, asked
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


def hidden(method: Algorithm) -> bool:
    """Whether nobody can read what its clients send."""
    return isinstance(method, Around) and method.pairs[-1].hides


_METHOD, _PAIRS = "around.method", "around.pairs"  # names that no method's own state has


def _joined(state: Mapping[str, Any], own: dict[str, State]) -> State:
    """A method's state as it is where no pair has one of its own, else both."""
    return {_METHOD: state, _PAIRS: own} if own else dict(state)


def _asking(ctx: ServerContext, place: int) -> ServerContext:
    """The same, whose questions are those of the pair in one place."""
    ask = ctx.ask
    if ask is None:
        return ctx
    return dataclasses.replace(
        ctx, ask=lambda questions: ask({id_: _joined({}, {str(place): each}) for id_, each in questions.items()})
    )


def _split(state: Mapping[str, Any]) -> tuple[State, dict[str, State]]:
    """The inverse; what is sent or kept loses parts that are empty."""
    return (state.get(_METHOD, {}), dict(state[_PAIRS])) if _PAIRS in state else (dict(state), {})
