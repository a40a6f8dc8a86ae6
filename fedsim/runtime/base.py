"""The seam between deciding and placing: how the aggregator reaches participants, whatever process they are in.

Nothing under `fedsim/runtime` knows an algorithm, an aggregator or a participant: it is handed factories and names of
methods. A participant is any object; method `m` of participant `i` is called as `object.m(round, payload)`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedsim.core.numerics import NATIVE


Fold = Callable[[Sequence[tuple[int, Any]]], Any]  # replies of one chunk -> what is left of them
Together = Callable[[Sequence[Callable[[], Any]]], list[Any]]  # calls of one chunk -> replies, or what they raised
Watch = Callable[[str, int, int], None]  # method, participants done, participants in all
# Where a host's time goes: payloads arrive, participants compute, updates are added up, what is left is written.
PHASES = ("broadcast", "compute", "sum", "write")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one participant asks of the machine.

    - `custom`: further resources by name, as nodes of a cluster were started with.
    - `kind`, `size`: calls of participants of one kind are expected to take time by a straight line over the size.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_mb: float | None = None
    custom: tuple[tuple[str, float], ...] = ()
    kind: str = dataclasses.field(default="", compare=False)
    size: float = dataclasses.field(default=1.0, compare=False)

    def covers(self, other: "Resources") -> bool:
        """Whether a host that asked for this may compute a participant that asks for the other."""
        custom = dict(self.custom)
        return (
            self.num_cpus >= other.num_cpus
            and self.num_gpus >= other.num_gpus
            and (other.memory_mb is None or (self.memory_mb or 0.0) >= other.memory_mb)
            and all(custom.get(name, 0.0) >= amount for name, amount in other.custom)
        )


@dataclasses.dataclass(frozen=True)
class Failure:
    """What takes the place of a reply when a participant raised: its traceback as text.

    - `out_of_memory`: the device had too little.
    """

    text: str
    out_of_memory: bool = False


def too_slow(method: str, round: int, seconds: float) -> str:
    """What is said of a participant that had not answered in the time that the policy gives it."""
    return f"no answer to {method!r} of round {round} within call_seconds={seconds:g}"


def as_it_is(returned: Any) -> Any:
    return returned


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a call treats participants.

    - `again`: whether one that raises is asked once more; after running out of memory, when nobody else computes.
    - `finish`: makes the reply of what a participant's method returned.
    - `together`: makes the replies of all members of a chunk at once from their calls; None: one after another.
    - `told`: what participants are told before (`object.tell(told)`); None: nothing.
    - `seconds`: in which a call must be done (together: times the members of the chunk); None: any time will do.
    """

    again: bool = False
    finish: Callable[[Any], Any] = as_it_is
    together: Together | None = None
    told: Any = None
    seconds: float | None = None


PLAIN = Policy()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that participants received and sent, as seen by the runtime."""

    down: int = 0
    up: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """A host's answer for some participants: the folded (or plain) replies, and what passed the seam.

    - `seconds`: what each participant's call took, `sum_seconds` the fold.
    - `repeated`: those who were asked twice. - `out_of_memory`: the whole is to be asked again, by itself.
    """

    content: Any
    traffic: Traffic
    moved: int
    seconds: Mapping[int, float]
    sum_seconds: float
    repeated: tuple[int, ...] = ()
    out_of_memory: bool = False


class Call(abc.ABC):
    """How the aggregator calls participants; one object a run, with its own count of what passed through it.

    `progress`: method, participants done, participants in all. `lost`: times that the aggregator was lost in the round
    under way, with what it had counted.
    """

    def __init__(self) -> None:
        self.lost = 0
        self.reset()

    @abc.abstractmethod
    def __call__(
        self,
        method: str,
        round: int,
        payloads: Mapping[int, Any],
        fold: Fold | None = None,
        policy: Policy = PLAIN,
    ) -> Iterator[Any]:
        """Call `method` of every participant in `payloads`.

        The participants are cut, in the order of `payloads`, into fixed chunks. **Yields**, in order, for each chunk
        `fold([(id, reply), ...])`, computed where the replies are if they are in one place; without `fold` the list
        itself. The reply of a participant that raised is a `Failure`.
        """

    def reset(self) -> None:
        """Start counting anew (a round begins)."""
        self._traffic: dict[str, Traffic] = {}
        self._moved = self._retries = 0
        self._places: dict[int, dict[str, Any]] = {}
        self._spent: dict[str, dict[str, float]] = {}
        self._folded = 0.0
        self.progress: tuple[str, int, int] = ("", 0, 0)

    def note(self, method: str, answer: Answer, moved: int, ids: Sequence[int], host: int, node: str) -> None:
        """An answer for some participants has come from a host."""
        before = self.traffic(method)
        self._traffic[method] = Traffic(before.down + answer.traffic.down, before.up + answer.traffic.up)
        self._moved += moved
        for id_ in ids:
            place = self._places.setdefault(id_, {"retries": 0})
            place |= {"host": host, "node": node}
        self.repeated(answer.repeated)
        self.spend(host, compute=sum(answer.seconds.values()), sum=answer.sum_seconds)

    def count_moved(self, moved: int) -> None:
        """Bytes went from one process to another."""
        self._moved += moved

    def repeated(self, ids: Sequence[int]) -> None:
        """Calls of these participants are repeated."""
        self._retries += len(ids)
        for id_ in ids:
            self._places.setdefault(id_, {"host": None, "node": None, "retries": 0})["retries"] += 1

    def spend(self, host: int, **seconds: float) -> None:
        """A host spent so many seconds on some of the `PHASES`."""
        spent = self._spent.setdefault(str(host), dict.fromkeys(PHASES, 0.0))
        for phase, more in seconds.items():
            spent[phase] += more

    def traffic(self, *methods: str) -> Traffic:
        """What participants received and sent in calls of these methods since the last reset."""
        found = [self._traffic.get(method, Traffic()) for method in methods]
        return Traffic(sum(each.down for each in found), sum(each.up for each in found))

    def moved(self) -> int:
        """Bytes that physically went from one process to another since the last reset."""
        return self._moved

    def retries(self) -> int:
        """Calls that had to be repeated since the last reset: their host was lost, or the policy says so; and one for
        each time that the aggregator was lost, which calls everybody again."""
        return self._retries + self.lost

    def places(self) -> Mapping[int, Mapping[str, Any]]:
        """Participant -> `host`, `node` and `retries` of its last call."""
        return self._places

    def spent(self) -> Mapping[str, Mapping[str, float]]:
        """Host -> seconds since the last reset: `PHASES`, by name."""
        return self._spent

    def folded(self) -> float:
        """Seconds since the last reset in which chunks were folded in the aggregator's own process."""
        return self._folded


class Runtime(abc.ABC):
    """Where the aggregator and the participants of a run live. Several runs may follow one another.

    - `numerics`: what they compute with: `portable` or `native` (`fedsim.core.numerics`).
    """

    numerics = NATIVE

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
    def probe(self, call: Callable[[], Any]) -> Any:
        """What a picklable call returns, made where it has a whole GPU to itself; None if there is no GPU."""

    @property
    def joined(self) -> bool:
        """Whether it is a cluster that was there before, whose nodes may differ."""
        return False

    def everywhere(self, call: Callable[[], Any]) -> Mapping[str, Any]:
        """What a picklable call returns on every machine there is, by address; text where it cannot be called."""
        return {"localhost": call()}

    def capacities(self) -> Mapping[str, Mapping[str, float]]:
        """What Ray counts of every machine (`CPU`, `GPU`, bytes of `object_store_memory`), by address."""
        return {}

    def job_server(self) -> str | None:
        """HOST:PORT of what takes jobs for a cluster that this object has joined, or joins now; None: there is none."""
        return None

    @abc.abstractmethod
    def ask(self, method: str, *args: Any, watch: Watch | None = None) -> Any:
        """Call a method of the aggregator; `watch` is told of the participants that are done meanwhile."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything this object started. Safe to call twice."""


def chunks(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Fixed chunks of consecutive participants: they decide the order of sums, never where a sum is computed."""
    return [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]


def pin_threads() -> int:
    """One thread of computation in this process, so that sums do not depend on the machine. Returns what was set.

    On a GPU: kernels that give the same bits again, where torch has them; it warns where it has none.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    return before
