"""What tests run in any process of a Ray runtime: small experiments, and an algorithm that is disturbed once."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.suites import tiny
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import Algorithm
from fedsim.experiment import Experiment, with_settings
from fedsim.runtime.base import Runtime


# What makes `benchmarks.suites:tiny` tinier still, as words for `--set`.
TINY_SETTINGS = (
    "rounds=2",
    "task.data.limit=120",
    "task.patch_size=4",
    "partition.min_size=10",
    "algorithm.small_epochs=1",
    "algorithm.local_epochs=1",
    "tiers.0.form.width=8",
    "tiers.1.form.width=8",
    "tiers.2.form.width=12",
    "tiers.2.form.depth=2",
    "intermediate.width=16",
    "intermediate.depth=2",
    "target.width=20",
    "target.depth=3",
)


@dataclass(frozen=True)
class Disturbed(Algorithm):
    """Behaves as `inner`, except for one event at one place.

    - `event`: "raise" (always), "die" (the client's process), "die_always", "die_server", "stall" (the client waits).
    - `client`, `round`: where. - `folder`: a file in it marks that the event has happened, so that it happens once.
    """

    inner: Algorithm
    event: str
    folder: str
    client: int = 1
    round: int = 2

    @property
    def name(self):
        return self.inner.name

    def once(self) -> bool:
        mark = Path(self.folder) / "happened"
        if mark.exists():
            return False
        mark.touch()
        return True

    def server_init(self, ctx):
        return self.inner.server_init(ctx)

    def server_broadcast(self, state, cohort, ctx):
        return self.inner.server_broadcast(state, cohort, ctx)

    def combine(self, updates):
        return self.inner.combine(updates)

    def server_aggregate(self, state, updates, ctx):
        state = self.inner.server_aggregate(state, updates, ctx)
        if self.event == "die_server" and ctx.round == self.round and self.once():
            os.kill(os.getpid(), signal.SIGKILL)
        return state

    def client_init(self, ctx):
        return self.inner.client_init(ctx)

    def client_update(self, payload, state, ctx):
        if ctx.info.id == self.client and ctx.round == self.round:
            if self.event == "raise":
                raise ZeroDivisionError("a disturbance")
            if self.event == "die_always" or (self.event == "die" and self.once()):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.event == "stall" and self.once():
                time.sleep(3600)
        return self.inner.client_update(payload, state, ctx)

    def client_model(self, payload, state, ctx):
        return self.inner.client_model(payload, state, ctx)


class Lent(Runtime):
    """A runtime lent to `run_all`, which closes what it is given: this one stays as it is."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def start(self, *args) -> None:
        self.runtime.start(*args)

    def probe(self, call):
        return self.runtime.probe(call)

    def ask(self, method, *args, watch=None):
        return self.runtime.ask(method, *args, watch=watch)

    def close(self) -> None:
        """Its owner closes it."""


def small() -> Experiment:
    """The tiny experiment for three rounds and six participants: chunks of two meet one, two and four hosts unlike."""
    return replace(with_settings(tiny(), TINY_SETTINGS), participants=6, rounds=3)


def without_federation() -> Experiment:
    """The same with private state that changes in every round."""
    experiment = small()
    assert isinstance(experiment.algorithm, FedGrow)
    return replace(experiment, algorithm=replace(experiment.algorithm, federate=False))


def stalling() -> Experiment:
    """`small`, which stalls in round 2 unless `--set algorithm.event=none`; set `algorithm.folder`."""
    experiment = small()
    return replace(experiment, algorithm=Disturbed(experiment.algorithm, "stall", "."))
