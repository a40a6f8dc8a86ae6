"""How a process that holds participants answers for them: calls, failures, sums, and the bytes that passed."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fedsim.core.text import text_of
from fedsim.runtime.alarm import alarm
from fedsim.runtime.base import PLAIN, Answer, Failure, Fold, Policy, Together, Traffic, too_slow


def answered(
    participants: Mapping[int, Any],
    method: str,
    round: int,
    payloads: Mapping[int, Any],
    fold: Fold | None,
    policy: Policy = PLAIN,
    alone: bool = True,
    done: Callable[[], None] = lambda: None,
) -> Answer:
    """Call a method of some participants, one after another or together, in the process that holds them.

    - `alone`: nobody else computes meanwhile, so that asking again after a lack of memory is worth while now.
    """

    down = up = 0
    repeated, seconds, replies = list[int](), dict[int, float](), list[tuple[int, Any]]()
    for id_ in payloads if policy.told is not None else ():
        participants[id_].tell(policy.told)
    calls = [functools.partial(getattr(participants[id_], method), round, payloads[id_]) for id_ in payloads]
    late = "" if policy.seconds is None else too_slow(method, round, policy.seconds)
    finish = functools.partial(in_time, policy, late)
    received = {key: tensor_bytes(payload) for key, payload in {id(p): p for p in payloads.values()}.items()}
    if policy.together:
        seconds_together = None if policy.seconds is None else policy.seconds * len(calls)
        results = side_by_side(calls, policy.together, alarm(seconds_together, late))
    else:
        results = one_by_one(calls, finish)
    for id_, call, (reply, took) in zip(payloads, calls, results, strict=True):
        down += received[id(payloads[id_])]
        if isinstance(reply, Failure) and policy.again:
            if reply.out_of_memory and not alone:
                return Answer([], Traffic(), 0, {}, 0.0, out_of_memory=True)
            if reply.out_of_memory and torch.cuda.is_available():
                torch.cuda.empty_cache()
            repeated.append(id_)
            reply, more = next(one_by_one([call], finish))
            took += more
        replies.append((id_, reply))
        seconds[id_] = took
        up += tensor_bytes(reply)
        done()
    started = time.perf_counter()
    content = replies if fold is None else fold(replies)
    moved = up if fold is None else tensor_bytes(content)
    return Answer(content, Traffic(down, up), moved, seconds, time.perf_counter() - started, tuple(repeated))


def in_time(policy: Policy, late: str, call: Callable[[], Any]) -> Any:
    """The reply that a call is finished to, if it comes in time."""
    if policy.seconds is None:
        return policy.finish(call())
    with alarm(policy.seconds, late):
        return policy.finish(call())


def one_by_one(
    calls: Sequence[Callable[[], Any]], finish: Callable[[Callable[[], Any]], Any]
) -> Iterator[tuple[Any, float]]:
    """Each call's reply, or the `Failure` that stands for it, and the seconds it took; made as they are asked for."""
    for call in calls:
        started = time.perf_counter()
        try:
            reply = finish(call)
        except Exception as error:  # whatever it was: the aggregator's policy decides, and the text says what
            reply = failed(error)
        yield reply, time.perf_counter() - started


def side_by_side(
    calls: Sequence[Callable[[], Any]], together: Together, limit: AbstractContextManager[None]
) -> Iterator[tuple[Any, float]]:
    """The same of calls that are made together; each is said to have taken an equal part of the time."""
    started = time.perf_counter()
    try:
        with limit:
            replies = together(calls)
    except TimeoutError as error:
        replies = [error] * len(calls)
    each = (time.perf_counter() - started) / len(calls)
    for reply in replies:
        yield failed(reply) if isinstance(reply, Exception) else reply, each


def failed(error: Exception) -> Failure:
    """What stands for the reply of a participant that raised."""
    seen, cause = set[int](), error
    while cause is not None and id(cause) not in seen and not isinstance(cause, torch.OutOfMemoryError):
        seen.add(id(cause))  # an error may be its own cause
        cause = cause.__cause__
    return Failure(text_of(error), isinstance(cause, torch.OutOfMemoryError))


SCALARS = frozenset({str, int, float, bool, type(None)})


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors inside containers and dataclasses. Knows nothing of what they mean."""
    kind = type(value)
    if kind in SCALARS:
        return 0
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        return value.nbytes
    if kind is list or kind is tuple:
        parts = value
    elif kind is dict:  # asked first, as the faster question
        parts = value.values()
    elif hasattr(kind, "__dataclass_fields__"):
        parts = vars(value).values()
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        return 0
    total = 0
    for part in parts:
        if type(part) not in SCALARS:
            total += tensor_bytes(part)
    return total
