"""Many participants in one batched computation.

`together` runs several calls, each in a thread of its own, but one at a time and in the order given: a call holds the
baton until it ends or asks for a training (`fedsim.learning.training.minimise`). When all have ended or wait, the
trainings that they wait for meet: those that are one function on different tensors (`fedsim.learning.alike`) are
computed as one (`fedsim.learning.stacked`), the others one by one, and the calls go on. Algorithms know nothing of it.

Nothing depends on the timing of threads. A training by itself gives the same bits as outside of `together`; trainings
that are stacked agree with that to rounding.
"""

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from typing import Generic, TypeVar

import torch

from fedsim.core.tree import Tree
from fedsim.learning.alike import Unlike, alike
from fedsim.learning.stacked import OWN, Stack
from fedsim.learning.training import MEETING, Training, alone


T = TypeVar("T")


@dataclasses.dataclass
class Tally:
    """What became of the trainings of one `together`.

    - `stacked`, `alone`: trainings computed with others, and by themselves. - `passes`: forward and backward passes of
      stacked trainings; a pass may be one participant's. - `reasons`: why trainings were not stacked, in words.
    """

    stacked: int = 0
    alone: int = 0
    passes: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)


def together(calls: Sequence[Callable[[], T]], tally: Tally | None = None) -> list[T | Exception]:
    """The results of some calls, in their order, with trainings computed together where they are alike.

    A call that raises ends alone, and its exception stands in its place. What is local to a thread (whether gradients
    are recorded, autocast) begins anew in each call. torch's global stream of random numbers goes on, after a training,
    as the call left it before.

    **Raises:** what is no `Exception` (`KeyboardInterrupt`), from wherever it comes; the other calls are then ended.
    """
    tally = Tally() if tally is None else tally
    runners = [_Runner(call) for call in calls]
    try:
        for runner in runners:
            runner.go()
        while waiting := [(runner, runner.asked) for runner in runners if runner.asked is not None]:
            answers = _met([asked for _, asked in waiting], tally)
            for (runner, _), answer in zip(waiting, answers, strict=True):
                runner.go(answer)
        return [runner.result() for runner in runners]
    finally:
        for runner in runners:  # one after another: each still unwinds with the baton in its hand
            runner.abandon()


# the baton ------------------------------------------------------------------------------------------------------------


class _Abandoned(BaseException):
    """Ends a call whose result nobody waits for; no `Exception`, so that no algorithm mistakes it for one."""


class _Runner(Generic[T]):
    """One call in a thread of its own, which runs only while somebody is inside `go`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.asked: Training | None = None
        self.answer: Tree | Exception | None = None
        self.outcome: list[T] = []
        self.error: BaseException | None = None
        self.stream = torch.get_rng_state()  # torch's global stream as `together` found it
        self.abandoned = False
        self.turn, self.idle = threading.Event(), threading.Event()
        # A daemon: if a second interruption keeps it from being joined, the process can still end.
        self.thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)

    def go(self, answer: Tree | Exception | None = None) -> None:
        """Let the call run, from its start or with an answer, until it asks for a training or ends.

        **Raises:** what the call raised, if it is no `Exception`.
        """
        self.asked, self.answer = None, answer
        self.idle.clear()
        try:
            if self.thread.ident is None:
                self.thread.start()
            self.turn.set()
            self.idle.wait()
        except BaseException:  # interrupted, while the call may be anywhere: it must not go on beside its caller
            self.abandon()
            raise
        if self.error is not None and not isinstance(self.error, Exception):
            raise self.error

    def abandon(self) -> None:
        """End the call where it is, or at the next training it asks for."""
        self.abandoned = True
        self.turn.set()
        if self.thread.ident is not None:
            self.thread.join()

    def result(self) -> T | Exception:
        """What the call returned or raised."""
        if self.error is None:
            return self.outcome[0]
        assert isinstance(self.error, Exception)
        return self.error

    def _run(self) -> None:
        MEETING.set(self._ask)
        try:
            self._await_turn()
            self.outcome.append(self.call())
        except BaseException as error:  # of any kind: it is the scheduler's to pass on
            self.error = error
        finally:
            self.idle.set()

    def _ask(self, asked: Training) -> Tree:
        """Wait for a training; what `minimise` does inside the call."""
        stream = torch.get_rng_state()
        torch.set_rng_state(self.stream)  # in case it is seeded here: others must not draw from it, nor put it back
        self.asked = asked
        self.idle.set()
        self._await_turn()
        torch.set_rng_state(stream)
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def _await_turn(self) -> None:
        self.turn.wait()
        self.turn.clear()
        if self.abandoned:
            raise _Abandoned


# a meeting ------------------------------------------------------------------------------------------------------------


def _met(trainings: Sequence[Training], tally: Tally) -> list[Tree | Exception]:
    """What each training returns or raises."""
    answers: dict[int, Tree | Exception] = {}
    for members in _groups(trainings):
        group = [trainings[member] for member in members]
        found: Sequence[Tree | Exception] = _stacked(group, tally) if len(group) > 1 else ()
        if not found:
            tally.alone += len(group)
            found = [_alone(training) for training in group]
        answers |= zip(members, found, strict=True)
    return [answers[member] for member in range(len(trainings))]


def _alone(training: Training) -> Tree | Exception:
    try:
        return alone(training)
    except Exception as error:  # of any kind: it belongs to the call
        return error


def _stacked(group: Sequence[Training], tally: Tally) -> Sequence[Tree | Exception]:
    """What each training of a group returns or raises; nothing if they cannot be stacked."""
    try:
        stack = Stack(group)
        found = stack.trained()
    except Exception as error:  # of any kind: if it belongs to one of them, that one raises it again when it is alone
        tally.reasons.append(f"{type(error).__name__}: {error}")
        return ()
    tally.stacked += len(group)
    tally.passes += stack.passes
    return found


def _groups(trainings: Sequence[Training]) -> list[list[int]]:
    """Positions of trainings that look alike, in order; of those that can only be trained alone, one by one."""
    groups: list[tuple[Hashable, list[int]]] = []
    for position, training in enumerate(trainings):
        signature = _signature(training)
        for other, members in groups:
            if other == signature is not None and _alike(trainings[members[0]], training):
                members.append(position)
                break
        else:
            groups.append((signature, [position]))
    return [members for _, members in groups]


def _signature(training: Training) -> Hashable:
    """What trainings that are stacked have in common; None for one that is trained alone."""
    ctx, tensors = training.ctx, training.parameters
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    steps = training.epochs * len(ctx.train.labels)
    if len(training.objectives) != 1 or len(kinds) != 1 or not steps or ctx.meter.timing:
        return None
    shapes = tuple((name, tuple(tensors[name].shape), training.rate(name)) for name in sorted(tensors))
    settings = (training.batch_size, training.weight_decay, training.clip, ctx.device, ctx.precision)
    return (shapes, *kinds, *settings)


def _alike(one: Training, other: Training) -> bool:
    try:
        alike([one.objectives[0], other.objectives[0]], OWN)
    except Unlike:
        return False
    return True
