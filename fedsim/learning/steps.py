"""Who answers what a client's method asks for.

A method of a client is a generator: it yields each `Training` it wants, is sent a `Trained`, and returns its result. Or
it asks for nothing and returns at once. Here its requests are answered one after another (`run_alone`), or those of
several clients as they meet, compatible ones as one computation (`run_batched`).

A generator must not yield inside a `with` block that changes torch's state (`torch.no_grad()`, a seeded stream): other
clients' code runs meanwhile.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import torch

from fedsim.learning.batched import Request, Tally, train_batched
from fedsim.learning.context import LocalContext
from fedsim.learning.training import Trained, Training, train


T = TypeVar("T")
# A generator that yields `Training` requests, is sent `Trained` answers, and returns the method's result. What wraps a
# method may yield them in a context of its own, as where a client's data are changed.
Steps = Generator[Training | Request, Trained, T]
Asking = Generator[Request, Trained, T]  # the same, once it is known whose requests they are


def asking(ctx: LocalContext, result: Steps[T] | T) -> Asking[T]:
    """What a client's method returned, as a generator of requests in its context.

    **Raises:** `TypeError` if it asks for something else than a `Training`, or returns a generator.
    """
    if not isinstance(result, Generator):
        return result
    call = _Call(lambda: result)
    while not call.ended:
        try:
            local, asked = call.asked if isinstance(call.asked, tuple) and len(call.asked) == 2 else (ctx, call.asked)
            if not isinstance(asked, Training):
                raise TypeError(f"a client's method yields {asked!r}: must be a Training")
            answer = yield local, asked
        except Exception as error:  # of any kind: it belongs to the method
            answer = error
        call.go_on(answer)
    if isinstance(call.result(), Generator):
        raise TypeError("a client's method returns a generator: must be `return (yield from ...)`")
    return call.result()


def run_alone(result: Asking[T] | T) -> T:
    """The result of a call whose trainings are computed one after another. **Raises:** what it raises."""
    call = _Call(lambda: result)
    while not call.ended:
        try:
            answer = train(*call.asked)
        except Exception as error:  # of any kind: it belongs to the call
            answer = error
        call.go_on(answer)
    return call.result()


def run_client(ctx: LocalContext, result: Steps[T] | T) -> T:
    """The result of a client's method, by itself: `run_client(ctx, algorithm.client_init(ctx))`."""
    return run_alone(asking(ctx, result))


def run_batched(starts: Sequence[Callable[[], Asking[T] | T]], tally: Tally | None = None) -> list[T | Exception]:
    """The results of some calls, in their order, with compatible trainings computed as one (`fedsim.learning.batched`).

    A call that raises ends alone, and its exception stands in its place.

    **Raises:** what is no `Exception` (`KeyboardInterrupt`), from wherever it comes.
    """
    calls, tally = [_Call(start, streams=True) for start in starts], tally or Tally()
    while waiting := [call for call in calls if not call.ended]:
        answers = train_batched([call.asked for call in waiting], tally)
        for call, answer in zip(waiting, answers, strict=True):
            call.go_on(answer)
    return [call.ended[0] for call in calls]


class _Call(Generic[T]):
    """A generator and where it stands: what it asks for (`asked`), or how it ended (`ended`, of one element).

    - `streams`: others run meanwhile: torch's global stream of random numbers goes on as the call left it.
    """

    def __init__(self, start: Callable[[], Generator[Any, Trained, T] | T], streams: bool = False) -> None:
        self.start, self.stream = start, torch.get_rng_state() if streams else None
        self.generator: Generator[Any, Any, T] | None = None
        self.asked: Any = None
        self.ended: list[T | Exception] = []
        self.go_on(None)

    def go_on(self, answer: Trained | Exception | None) -> None:
        """Let it run, from its start or with an answer, until it asks for more or ends."""
        others, gradients = torch.get_rng_state() if self.stream is not None else None, torch.is_grad_enabled()
        if self.stream is not None:
            torch.set_rng_state(self.stream)
        try:
            self.asked = self._next(answer)
            if torch.is_grad_enabled() != gradients:
                raise RuntimeError("a client's method yields inside torch.no_grad() or the like: leave the block first")
        except _Ended as end:
            self.ended = [end.value]
        except Exception as error:  # of any kind: it is the call's
            self.ended = [error]
        finally:
            if torch.is_grad_enabled() != gradients:
                torch.set_grad_enabled(gradients)
            if others is not None:
                self.stream = torch.get_rng_state()
                torch.set_rng_state(others)

    def _next(self, answer: Trained | Exception | None) -> Any:
        """What it asks for. **Raises:** `_Ended` with its result; what it raises."""
        if self.generator is None:
            result = self.start()
            if not isinstance(result, Generator):
                raise _Ended(result)
            self.generator = result
        try:
            return self.generator.throw(answer) if isinstance(answer, Exception) else self.generator.send(answer)
        except StopIteration as end:
            raise _Ended(end.value) from None

    def result(self) -> T:
        """What it returned. **Raises:** what it raised."""
        (ended,) = self.ended
        if isinstance(ended, Exception):
            raise ended
        return ended


class _Ended(Exception):
    """A call came to its end with a value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
