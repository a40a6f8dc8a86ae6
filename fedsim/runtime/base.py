"""The seam between deciding and placing: how the aggregator reaches participants, whatever process they are in.

Nothing under `fedsim/runtime` knows an algorithm, an aggregator or a participant: it is handed factories and names of
methods. A participant is any object; method `m` of participant `i` is called as `object.m(round, payload)`.
"""

import abc
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch


Fold = Callable[[Sequence[tuple[int, Any]]], Any]  # replies of one chunk -> what is left of them
Watch = Callable[[str, int, int], None]  # method, participants done, participants in all


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one participant asks of the machine."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """What takes the place of a reply when a participant raised: its traceback as text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that participants received and sent, as seen by the runtime."""

    down: int = 0
    up: int = 0


class Call(Protocol):
    """How the aggregator calls participants; one object a run, with its own count of what passed through it."""

    def __call__(self, method: str, round: int, payloads: Mapping[int, Any], fold: Fold | None = None) -> Iterator[Any]:
        """Call `method` of every participant in `payloads`.

        The participants are cut, in the order of `payloads`, into fixed chunks. **Yields**, in order, for each chunk
        `fold([(id, reply), ...])`, computed where the replies are if they are in one place; without `fold` the list
        itself. The reply of a participant that raised is a `Failure`.
        """
        ...

    def reset(self) -> None:
        """Start counting anew (a round begins)."""
        ...

    def traffic(self, method: str) -> Traffic:
        """What participants received and sent in calls of `method` since the last reset."""
        ...

    def moved(self) -> int:
        """Bytes that physically went from one process to another since the last reset."""
        ...

    def retries(self) -> int:
        """Calls that had to be repeated since the last reset, because their host was lost."""
        ...

    def places(self) -> Mapping[int, Mapping[str, Any]]:
        """Participant -> `host`, `node` and `retries` of its last call."""
        ...


class Runtime(abc.ABC):
    """Where the aggregator and the participants of a run live. Several runs may follow one another."""

    @abc.abstractmethod
    def start(
        self,
        make_aggregator: Callable[[Call], Any],
        make_participants: Mapping[int, Callable[[], Any]],
        resources: Mapping[int, Resources],
        chunk: int,
    ) -> None:
        """Place an aggregator and participants, made by picklable factories; those of the run before are let go.

        **Raises:** `ValueError`, before anything is started, for a request that cannot be met, with both numbers.
        """

    @abc.abstractmethod
    def ask(self, method: str, *args: Any, watch: Watch | None = None) -> Any:
        """Call a method of the aggregator; `watch` is told of the participants that are done meanwhile."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything this object started. Safe to call twice."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A host's answer for some participants: the folded (or plain) replies, and what passed the seam."""

    content: Any
    traffic: Traffic
    moved: int


def answered(
    participants: Mapping[int, Any],
    method: str,
    round: int,
    payloads: Mapping[int, Any],
    fold: Fold | None,
    done: Callable[[], None] = lambda: None,
) -> Answer:
    """Call a method of some participants, one after another, in the process that holds them."""
    replies: list[tuple[int, Any]] = []
    down = up = 0
    for id_, payload in payloads.items():
        down += tensor_bytes(payload)
        try:
            reply = getattr(participants[id_], method)(round, payload)
        except Exception:  # whatever it was: the aggregator's policy decides, and the text says it all
            reply = Failure(traceback.format_exc())
        up += tensor_bytes(reply)
        replies.append((id_, reply))
        done()
    content = replies if fold is None else fold(replies)
    return Answer(content, Traffic(down, up), tensor_bytes(content))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors inside containers and dataclasses. Knows nothing of what they mean."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if dataclasses.is_dataclass(value):
        return sum(tensor_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0


class Ledger:
    """The counts a `Call` keeps."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._traffic: dict[str, Traffic] = {}
        self._moved = self._retries = 0
        self._places: dict[int, dict[str, Any]] = {}
        self.progress = ("", 0, 0)

    def note(self, method: str, answer: Answer, moved: int) -> None:
        before = self._traffic.get(method, Traffic())
        self._traffic[method] = Traffic(before.down + answer.traffic.down, before.up + answer.traffic.up)
        self._moved += moved

    def traffic(self, method: str) -> Traffic:
        return self._traffic.get(method, Traffic())

    def moved(self) -> int:
        return self._moved

    def retries(self) -> int:
        return self._retries

    def places(self) -> Mapping[int, Mapping[str, Any]]:
        return self._places


def chunks(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Fixed chunks of consecutive participants: they decide the order of sums, never where a sum is computed."""
    return [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]


def pin_threads() -> int:
    """One thread of computation in this process, so that sums do not depend on the machine. Returns what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before
