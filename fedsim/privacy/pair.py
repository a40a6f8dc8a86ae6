"""What a pair is: a client's side, which changes what is sent, and the server's, which sees what arrives first."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    State,
    Training,
    Trainings,
)


if TYPE_CHECKING:
    from torch import nn

    from fedsim.data.source import Split
    from fedsim.experiment import Experiment
    from fedsim.learning.task import Task

CUT = "cut"  # in an update's metrics: the share of its numbers that a sum of words cut off
Arriving = Iterable[ClientUpdate | Partial]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A client's side and the server's. Concrete pairs are frozen dataclasses; what is not given does nothing."""

    @property
    def each(self) -> bool:
        """Whether the server's side has to see every update by itself: then nothing is added up before it."""
        return False

    @property
    def common(self) -> bool:
        """Whether all clients must have received the same, with which what they send is compared."""
        return False

    @property
    def hides(self) -> bool:
        """Whether nobody can read what its client's side sends: it is the last, and no other looks at each update."""
        return False

    @property
    def sums(self) -> bool:
        """Whether the server's side hands on one sum: a pair that looks at each update stands outside of it."""
        return False

    @property
    def selects(self) -> bool:
        """Whether the server's side hands on something else than the sum of updates, which is all that noise for a sum
        makes private."""
        return False

    @property
    def noises(self) -> bool:
        """Whether what the client's side sends has to arrive as it is, for noise is in it, or is measured by it."""
        return False

    def check(self, algorithm: Algorithm, participants: int) -> None:
        """Refuse, with a `ValueError`, a method or a number of participants a round that this pair cannot work with."""
        return None

    def check_task(self, task: "Task") -> None:
        """Refuse, with a `ValueError`, data that this pair cannot work with."""
        return None

    def check_experiment(self, experiment: "Experiment") -> None:
        """Refuse, with a `ValueError`, an experiment that this pair cannot work in."""
        return None

    def spent(self, experiment: "Experiment", round: int, trained: Collection[Trainings] = ()) -> Mapping[str, float]:
        """What of privacy is spent after a round, for the tables: as `Algorithm.spent` says."""
        return {}

    # at the aggregator ----------------------------------------------------------------------------------------------

    def start(self) -> State:
        """What the server's side remembers, before round 1."""
        return {}

    def begin(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> State:
        """The same as a round begins, before its cohort receives anything; `ctx.ask` reaches this pair's `answer`."""
        return state

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

    def keeps(self, ctx: ClientContext) -> State:
        """What a client keeps of this pair, for good, beside the method's private state."""
        return {}

    def prepare(self, ctx: ClientContext) -> ClientContext:
        """What a client works with: its data, for those who change them."""
        return ctx

    def training(self, asked: Training, ctx: ClientContext) -> Training:
        """What is trained instead of what the method asks for."""
        return asked

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        """What is sent instead of a method's update. The client had received its `payload`, and `sent` of this pair,
        which holds what it `keeps`, too."""
        return update

    def scores(self, model: "nn.Module", test: "Split", ctx: ClientContext) -> Mapping[str, float]:
        """More numbers about the model that a participant would deploy, for the column `metrics`."""
        return {}

    def answer(self, question: Payload, kept: State, ctx: ClientContext) -> State:
        """What a client answers to `ctx.ask` of the server's side."""
        raise NotImplementedError
