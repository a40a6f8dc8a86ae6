"""Who answers what methods ask for: alone or in a batch, errors and mistakes are each client's own."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.algorithm import ClientContext
from fedsim.core.tree import Tree
from fedsim.learning.batched import Tally
from fedsim.learning.objectives import Frozen
from fedsim.learning.steps import Asking, asking, run_alone, run_batched
from fedsim.learning.task import Batch
from fedsim.learning.training import Trained, Training
from tests.support.small_federation import Federation
from tests.support.small_trainings import STEPS, Slope, Sum, training


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_method_that_asks_for_nothing_returns_its_result(federation: Federation) -> None:
    context = federation.at_client(1, 0)
    assert run_alone(asking(context, 7)) == 7 == run_alone(7)
    assert run_batched([lambda: 7, lambda: asking(context, 8)]) == [7, 8]


def test_answers_go_to_who_asked(federation: Federation) -> None:
    """Each asks as often as it likes, and reads what it was answered before it asks again."""
    seen: list[tuple[int, float]] = []

    def steps(client: int) -> Any:
        tree: Tree = {"x": torch.tensor([float(client)])}
        for _ in range(client + 1):
            settings: dict[str, Any] = STEPS | {"epochs": client}
            trained: Trained = yield Training(Sum(), tree, **settings)
            tree = trained.parameters
            seen.append((client, trained.steps))
        return tree

    def calls() -> list[Callable[[], Asking[Tree]]]:
        return [lambda c=c: asking(federation.at_client(1, c), steps(c)) for c in range(3)]

    alone = [run_alone(call()) for call in calls()]
    one_by_one, seen = seen, []
    found = run_batched(calls())
    assert one_by_one == [(0, 0), (1, 3), (1, 3), (2, 10), (2, 10), (2, 10)]
    assert seen == [(0, 0), (1, 3), (2, 10), (1, 3), (2, 10), (2, 10)]
    for one, other in zip(alone, found, strict=True):
        assert isinstance(other, dict)
        torch.testing.assert_close(other["x"], one["x"], rtol=1e-6, atol=1e-6)


def test_a_call_that_raises_ends_alone(federation: Federation) -> None:
    start = {"x": torch.zeros(1)}

    def call(client: int) -> Asking[Tree]:
        if client == 0:
            raise ValueError("before")
        tree = yield from training(federation, client, Slope(), start)()
        if client == 1:
            raise KeyError("after")
        return tree

    tally = Tally()
    first, second, third = run_batched([functools.partial(call, client) for client in range(3)], tally)
    assert isinstance(first, ValueError) and str(first) == "before"
    assert isinstance(second, KeyError)
    assert isinstance(third, dict) and float(third["x"]) == pytest.approx(-0.5)
    assert (tally.batched, tally.alone) == (2, 0)


def test_a_method_may_catch_what_its_training_raised(federation: Federation) -> None:
    start = {"x": torch.tensor([float("nan")])}

    def steps(context: ClientContext) -> Any:
        try:
            yield Training(Sum(), start, **STEPS)
        except FloatingPointError as error:
            return str(error)

    context = federation.at_client(1, 0)
    assert "the training loss became nan" in run_alone(asking(context, steps(context)))
    (found,) = run_batched([lambda: asking(context, steps(context))])
    assert isinstance(found, str) and "the training loss became nan" in found


MISTAKES: dict[str, tuple[Callable[[ClientContext], Any], str]] = {}


def mistake(message: str) -> Callable[[Callable[[ClientContext], Any]], Callable[[ClientContext], Any]]:
    def note(steps: Callable[[ClientContext], Any]) -> Callable[[ClientContext], Any]:
        MISTAKES[steps.__name__] = steps, message
        return steps

    return note


@mistake("yields 5: must be a Training")
def yields_a_number(context: ClientContext) -> Any:
    yield 5


@mistake("yields None: must be a Training")
def yields_nothing(context: ClientContext) -> Any:
    yield


@mistake("returns a generator: must be `return \\(yield from ...\\)`")
def forgets_yield_from(context: ClientContext) -> Any:
    yield Training(Sum(), {"x": torch.ones(1)}, **STEPS)
    return yields_a_number(context)


@mistake("'Training' object has no attribute 'parameters'")
def forgets_yield(context: ClientContext) -> Any:
    yield Training(Sum(), {"x": torch.ones(1)}, **STEPS)
    trained: Any = Training(Sum(), {"x": torch.ones(1)}, **STEPS)
    return trained.parameters


@mistake(r"yields inside torch\.no_grad\(\) or the like")
def yields_without_gradients(context: ClientContext) -> Any:
    with torch.no_grad():
        yield Training(Sum(), {"x": torch.ones(1)}, **STEPS)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_is_one_clients(name: str, federation: Federation) -> None:
    steps, message = MISTAKES[name]
    with pytest.raises((TypeError, AttributeError, RuntimeError), match=message):
        run_alone(asking(federation.at_client(1, 0), steps(federation.at_client(1, 0))))
    assert torch.is_grad_enabled()
    right = training(federation, 1, Sum(), {"x": torch.ones(1)})
    wrong, fine = run_batched([lambda: asking(federation.at_client(1, 0), steps(federation.at_client(1, 0))), right])
    assert isinstance(wrong, Exception) and re.search(message, str(wrong)) and isinstance(fine, dict)
    assert torch.is_grad_enabled()


def test_the_global_stream_is_each_calls_own(federation: Federation) -> None:
    def steps(client: int) -> Any:
        torch.manual_seed(client)
        first = float(torch.rand(()))
        yield Training(Sum(), {"x": torch.ones(1)}, **STEPS)
        return [first, float(torch.rand(()))]

    def calls() -> list[Callable[[], Any]]:
        return [lambda c=c: asking(federation.at_client(1, c), steps(c)) for c in range(3)]

    expected, before = [run_alone(call()) for call in calls()], torch.get_rng_state()
    assert run_batched(calls()) == expected
    assert torch.equal(torch.get_rng_state(), before)


@dataclasses.dataclass(frozen=True)
class Interrupting:
    kind: str

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        raise {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}[self.kind]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_ends_all(kind: type[BaseException], federation: Federation) -> None:
    ended: list[int] = []

    def call(client: int) -> Asking[Tree]:
        try:
            return (yield from training(federation, client, Interrupting(kind.__name__), {"x": torch.ones(1)})())
        finally:
            ended.append(client)

    with pytest.raises(kind):
        run_batched([functools.partial(call, client) for client in range(3)])
    assert sorted(ended) == [0, 1, 2], "who has begun is unwound"
