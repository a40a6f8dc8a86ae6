"""The two actors: `Host` holds participants, `Server` holds the aggregator. Plain classes, placed by `ray_runtime`."""

import functools
import socket
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from fedsim.core.numerics import NATIVE, check, use
from fedsim.runtime.answering import answered
from fedsim.runtime.base import Answer, Call, Fold, Policy, pin_threads
from fedsim.runtime.metrics import Metrics


HELD_BYTES = 512 * 2**20  # private states that a host keeps in memory; others are read from disk when they are needed
FLUSH_BYTES = 4 * 2**20  # answers are sent when so much has gathered
FLUSH_SECONDS = 0.25  # or so much time has passed
NOBODY: tuple[tuple[int, ...], float] = ((), 0.0)

# Number of a unit, its participants, those of them who were elsewhere before, and whether they are a whole chunk.
WorkItem = tuple[int, Sequence[int], Sequence[int], bool]
Batch = tuple[list[tuple[int, Answer]], str, float, float]  # by unit; node, seconds of broadcast, and of writing


def remote(kind: type) -> Any:
    """`ray.remote` of a host or a server, with a second thread, which answers pings while the first computes."""
    make: Any = ray.remote
    return make(concurrency_groups={"watch": 1})(kind)


class Refused:
    """Takes a participant's place in a call that it did not answer in time: whatever it is asked, it raises."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def tell(self, told: Any) -> None:
        """Nobody listens."""

    def __getattr__(self, method: str) -> Any:
        def call(*_: Any) -> None:
            raise TimeoutError(self.reason)

        return call


class Host:
    """A process that holds participants of one run at a time and answers for them, one push of work after another."""

    def __init__(self, numerics: str = NATIVE) -> None:
        use(numerics)
        check(numerics)
        use_tensor_views()
        pin_threads()
        self.token, self.participants = "", OrderedDict[int, Any]()
        self.held: dict[int, int] = {}  # bytes of each participant that is kept
        self.held_bytes = 0
        self.at = NOBODY  # participants that are being computed, and since when

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Answers once the process is up, also when it has to be started again."""

    @ray.method(concurrency_group="watch")
    def ping(self) -> tuple[tuple[int, ...], float]:
        """Participants that are being computed, and for how many seconds."""
        ids, since = self.at
        return ids, time.perf_counter() - since

    def answer(
        self,
        token: str,
        factories: list,
        method: str,
        round: int,
        shares: Sequence[WorkItem],
        payloads: tuple[dict[int, int], list[list]],
        fold: Fold | None,
        policy: Policy,
        alone: bool,
        at_once: bool,
        refused: Mapping[int, str],
    ) -> Iterator[Batch]:
        """Call `method` of some participants, unit by unit. **Yields** answers, as many at a time as are worth sending.

        - `factories`: a reference inside a list. - `payloads`: participant -> place in the list of such references.
        - `alone`: nobody else computes meanwhile. - `at_once`: send every answer by itself.
        - `refused`: participants that are not called, for they did not answer in time, and what is said of them.
        """
        pin_threads()
        started = time.perf_counter()
        if token != self.token:
            self._let_go(list(self.participants))
            self.factories = ray.get(factories[0])
            self.token = token
        which, boxes = payloads
        received = ray.get([box[0] for box in boxes])
        broadcast, write = time.perf_counter() - started, 0.0
        node, flushed = socket.gethostname(), time.perf_counter()
        batch: list[tuple[int, Answer]] = []
        for number, ids, stale_ids, whole in shares:
            self._let_go(stale_ids)  # what is held of them, if anything, is not their newest state
            chosen = {id_: received[which[id_]] for id_ in ids}
            held = {id_: Refused(refused[id_]) if id_ in refused else self._participant(id_) for id_ in ids}
            self.at = (tuple(ids), time.perf_counter())
            turn = functools.partial(self._turn, [*ids] if policy.together is None else [])
            turn()
            answer = answered(held, method, round, chosen, fold if whole else None, policy, alone, turn)
            self.at = NOBODY
            batch.append((number, answer))
            self._keep([id_ for id_ in ids if id_ not in refused])
            now = time.perf_counter()
            gathered = sum(answer.moved for _, answer in batch)
            if at_once or now - flushed > FLUSH_SECONDS or gathered > FLUSH_BYTES:
                yield batch, node, broadcast, write
                flushed, batch = time.perf_counter(), []
                broadcast, write = 0.0, flushed - now
        yield batch, node, broadcast, write

    def _turn(self, waiting: list[int]) -> None:
        """The turn of the next participant begins."""
        if waiting:
            self.at = ((waiting.pop(0),), time.perf_counter())

    def _participant(self, id_: int) -> Any:
        if id_ not in self.participants:
            self.participants[id_] = self.factories[id_]()
        self.participants.move_to_end(id_)
        return self.participants[id_]

    def _keep(self, ids: Sequence[int]) -> None:
        """Keep these participants, and of the others those used last, as far as their states fit."""
        for id_ in ids:
            size = self.participants[id_].nbytes
            self.held_bytes += size - self.held.get(id_, 0)
            self.held[id_] = size
        while self.held_bytes > HELD_BYTES and len(self.participants) > 1:
            self._let_go([next(iter(self.participants))])

    def _let_go(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            self.participants.pop(id_, None)
            self.held_bytes -= self.held.pop(id_, 0)


class Server:
    """The process that holds the aggregator of one run at a time."""

    def __init__(self, numerics: str = NATIVE) -> None:
        use(numerics)
        check(numerics)
        use_tensor_views()
        self.token, self.aggregator = "", None
        self.call: Any = None
        self.metrics = Metrics()

    def invoke(self, token: str, made_of: list, method: str, args: tuple, lost: int) -> Any:
        """Call a method of the aggregator, made first if this process does not hold it.

        - `made_of`: a reference, inside a list, to what makes the aggregator and to the call it is given.
        - `lost`: times that this was asked of an aggregator that was then lost.
        """
        pin_threads()
        if token != self.token:
            make: Callable[[Call], Any]
            make, self.call = ray.get(made_of[0])
            self.aggregator, self.token = make(self.call), token
        self.call.lost = lost
        started = time.perf_counter()
        answer = getattr(self.aggregator, method)(*args)
        self.metrics.note(self.call, time.perf_counter() - started)
        return answer

    @ray.method(concurrency_group="watch")
    def ping(self) -> tuple[str, int, int]:
        """Method, participants done, participants in all."""
        return self.call.progress if self.call is not None else ("", 0, 0)

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Answers once the process is up, also when it has to be started again."""


# tensors in the object store ---------------------------------------------------------------------------------------


def use_tensor_views() -> None:
    """Let this process write CPU tensors as raw buffers and read them as views of shared memory (no copy)."""
    ray.util.register_serializer(torch.Tensor, serializer=_raw, deserializer=_view)


def _raw(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype, tuple[int, ...]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _view(raw: tuple[np.ndarray, torch.dtype, tuple[int, ...]]) -> torch.Tensor:
    data, dtype, shape = raw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": payloads are copied before anybody could write
        return torch.from_numpy(data).view(dtype).reshape(shape)
