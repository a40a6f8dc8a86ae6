"""What tests run in any process of a Ray runtime: small experiments, and an algorithm that is disturbed once."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

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

    - `event`: "raise" (always) or "raise_once", "oom_once" (too little memory on the device), "die" or "die_always"
      (the process is killed), "exit" (the process ends), "freeze" (it is stopped), "stall" or "stall_always" (the
      client waits), "busy" (it computes for some seconds), "fill" (the disk that holds `folder`); "die_server" is "die"
      once the server has aggregated.
    - `at`: the method in which it happens. - `client`, `round`: where; client -1 is any. The server's methods have no
      client. Sums of chunks ("combine") have neither: the first host that makes one is met.
    - `folder`: a file in it says which process has met the event, so that it happens `times` times; another, for
      "oom_once", in which order clients began.
    """

    inner: Algorithm
    event: str
    folder: str
    client: int = 1
    round: int = 2
    at: str = "client_update"
    times: int = 1

    @property
    def name(self):
        return self.inner.name

    def once(self) -> bool:
        """Whether it is to happen, as it has not yet; if so, it has."""
        for mark in marks(self.folder, self.times):
            try:
                with open(mark, "x") as file:
                    file.write(f"{os.getpid()} {process_name()}")
                return True
            except FileExistsError:
                continue
        return False

    def happen(self, at: str, round: int, client: int = -1) -> None:
        """The event, if this is where it happens."""
        if at != self.at or round != self.round or self.client not in (-1, client):
            return
        if self.event == "raise" or (self.event == "raise_once" and self.once()):
            raise ZeroDivisionError("a disturbance")
        if self.event == "oom_once" and self.once():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.event == "die_always" or (self.event == "die" and self.once()):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.event == "exit" and self.once():
            os._exit(1)
        if self.event == "freeze" and self.once():
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.event == "stall_always" or (self.event == "stall" and self.once()):
            time.sleep(3600)
        if self.event == "busy" and self.once():
            end = time.monotonic() + 5
            while time.monotonic() < end:
                sum(range(10**5))
        if self.event == "fill" and self.once():
            fill(Path(self.folder) / "ballast")

    def server_init(self, ctx):
        if self.at == "server_init" and "Server" in process_name():  # the driver counts what a run will cost
            self.happen("server_init", ctx.round, self.client)
        return self.inner.server_init(ctx)

    def server_begin(self, state, cohort, ctx):
        return self.inner.server_begin(state, cohort, ctx)

    def server_broadcast(self, state, cohort, ctx):
        self.happen("server_broadcast", ctx.round, self.client)
        return self.inner.server_broadcast(state, cohort, ctx)

    def combine(self, updates):
        if self.at == "combine" and "Host" in process_name():  # the server sums chunks that were cut up
            self.happen("combine", self.round, self.client)
        return self.inner.combine(updates)

    def server_aggregate(self, state, updates, ctx):
        state = self.inner.server_aggregate(state, updates, ctx)
        if self.event == "die_server" and ctx.round == self.round and self.once():
            os.kill(os.getpid(), signal.SIGKILL)
        return state

    def client_init(self, ctx):
        if len(ctx.train.labels):  # else the run is only being counted
            self.happen("client_init", ctx.round, ctx.info.id)
        return self.inner.client_init(ctx)

    def client_update(self, payload, state, ctx):
        if self.event == "oom_once" and ctx.round == self.round:
            with open(Path(self.folder) / "order", "a") as file:
                file.write(f"{ctx.info.id}\n")
        self.happen("client_update", ctx.round, ctx.info.id)
        return self.inner.client_update(payload, state, ctx)

    def client_answer(self, question, state, ctx):
        self.happen("client_answer", ctx.round, ctx.info.id)
        return self.inner.client_answer(question, state, ctx)

    def client_model(self, payload, state, ctx):
        self.happen("client_model", ctx.round, ctx.info.id)
        return self.inner.client_model(payload, state, ctx)


def marks(folder: str | Path, times: int = 1) -> list[Path]:
    """Files that are there once an event has happened for the first, second ... time."""
    return [Path(folder) / ("happened" if number == 0 else f"happened.{number}") for number in range(times)]


def process_name() -> str:
    """What this process is called: Ray gives an actor's the name of its class."""
    return psutil.Process().cmdline()[0]


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        for size in (2**20, 2**9):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


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


def small(family: str = "tests.support.light_family") -> Experiment:
    """The tiny experiment for three rounds and six participants: chunks of two meet one, two and four hosts unlike.

    Its family is one that hosts, of which many are killed, need not import Hugging Face for.
    """
    settings = [*TINY_SETTINGS, f"task.family={family}"]
    return replace(with_settings(tiny(), settings), participants=6, rounds=3)


def without_federation() -> Experiment:
    """The same with private state that changes in every round."""
    experiment = small()
    assert isinstance(experiment.algorithm, FedGrow)
    return replace(experiment, algorithm=replace(experiment.algorithm, federate=False))


def stalling() -> Experiment:
    """`small`, which stalls in round 2 unless `--set algorithm.event=none`; set `algorithm.folder`."""
    experiment = small()
    return replace(experiment, algorithm=Disturbed(experiment.algorithm, "stall", "."))
