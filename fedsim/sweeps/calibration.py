"""What a run consists of, counted without data, and how long its parts take on one core of this machine.

Nothing is learned: participants without data, one a tier, go through the rounds that differ
(`fedsim.engine.cost.DryRun`). Where seconds are asked for, steps on batches that hold no data are timed, each kind
of them once. Not foreseen: what a participant is sent that depends on who else took part (FLoRA's stack of adapters is
that of one participant a tier).
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedsim.core.fields import MANY
from fedsim.core.tree import nbytes
from fedsim.data.config import PER_TOKEN
from fedsim.data.dataset import Split
from fedsim.data.partition import Partition
from fedsim.engine.cost import Call, DryRun, DryRunState
from fedsim.experiment import Experiment
from fedsim.learning.meter import StepCost, Work
from fedsim.learning.task import Task
from fedsim.runtime.base import pin_threads
from fedsim.sweeps.outline import SCORED, Line, Model, Outline, Part, Phase, Span, Stage


SMALL = 2  # examples: a step is taken to be a straight line in the batch size, and this is one of two points on it
LONG = 0.25  # seconds: batches that are expected to take longer are not timed


@dataclasses.dataclass(frozen=True)
class Act:
    """One piece of a dry_run: everyone begins (round 0), or a round is done; then `held` is held.

    - `averaging`: seconds the server took to get there from the updates.
    """

    round: int
    calls: list[Call]
    held: DryRunState
    averaging: float = 0.0


class Calibration:
    """Makes outlines, and remembers what they have in common."""

    def __init__(self) -> None:
        self.counted: dict[tuple, StepCost] = {}
        self.outlines: dict[tuple[str, bool], Outline] = {}
        self.training: dict[tuple, Line] = {}
        self.calls: dict[tuple, tuple[float, Model | None]] = {}  # seconds beside training, and of what is deployed
        self.servers: dict[tuple, tuple[float, Model | None]] = {}  # seconds of averaging an update, and of its model

    def outline(self, experiment: Experiment, timing: bool) -> Outline:
        """What a run consists of: nothing that depends on the seed, the data, or how many participants there are.

        - `timing`: whether to take times. Without, there are no seconds in it.
        """
        alike = _alike(experiment)
        key = (alike.run_id, timing)
        if key not in self.outlines:
            with _one_thread():
                self.outlines[key] = self._outline(alike, timing)
        return self.outlines[key]

    # parts ----------------------------------------------------------------------------------------------------------

    def _outline(self, experiment: Experiment, timing: bool) -> Outline:
        spans, full = phases(experiment, self.counted)
        untimed = self._untimed(experiment, full) if timing else [set()] * len(full)
        small = acts(_in_batches_of(SMALL, experiment), self.counted, spans, untimed)
        if any(untimed):
            self._time_training(experiment, spans, full, small, untimed)
        if timing:
            self._time_the_rest(experiment, spans, full)
        parts = [
            tuple(self._part(experiment, *calls) for calls in zip(act.calls, less.calls, strict=True))
            for act, less in zip(full, small, strict=True)
        ]
        servers = [self.servers.get(_call_keys(experiment, act), (0.0, None)) for act in full[1:]]
        rounds = zip(spans, parts[1:], servers, strict=True)
        return Outline(parts[0], tuple(Phase(span, of_tiers, *server) for span, of_tiers, server in rounds))

    def _part(self, experiment: Experiment, call: Call, less: Call) -> Part:
        stages = [
            Stage(
                work.epochs,
                work.batch_size,
                Line.through(*((each.batch_size, each.flops_per_step / each.accumulate) for each in (work, fewer))),
                self.training.get(_work_key(experiment, work)),
                work.drop_last,
            )
            for work, fewer in zip(call.work, less.work, strict=True)
        ]
        return Part(tuple(stages), _sent(call), *self.calls.get(_call_key(experiment, call), (0.0, None)))

    def _untimed(self, experiment: Experiment, full: Sequence[Act]) -> list[set[str]]:
        """For every act the tiers, as few as will do, whose participants train what has not been timed."""
        seen, found = {*self.training}, []
        for act in full:
            names = set()
            for tier, call in zip(experiment.tiers, act.calls, strict=True):
                keys = {_work_key(experiment, work) for work in call.work}
                names |= {tier.name} if keys - seen else set()
                seen |= keys
            found.append(names)
        return found

    def _time_training(
        self,
        experiment: Experiment,
        spans: Sequence[Span],
        full: Sequence[Act],
        small: Sequence[Act],
        untimed: Sequence[Collection[str]],
    ) -> None:
        """Steps of small batches have been timed; time larger ones, as far as they are not too long."""
        works = [work for act in small for call in act.calls for work in call.work]
        longest = max(work.seconds_per_step or 0.0 for work in works)
        asked = max(work.batch_size for act in full for call in act.calls for work in call.work)
        size = asked if longest * asked <= SMALL * LONG else int(SMALL * LONG / longest)
        large = acts(_in_batches_of(size, experiment), self.counted, spans, untimed) if size > SMALL else small
        for names, *same in zip(untimed, full, small, large, strict=True):
            for tier, *calls in zip(experiment.tiers, *(act.calls for act in same), strict=True):
                for work, *timed in zip(*(call.work for call in calls), strict=True) if tier.name in names else ():
                    points = [(each.batch_size, each.seconds_per_step or 0.0) for each in timed]
                    self.training[_work_key(experiment, work)] = Line.through(*points)

    def _time_the_rest(self, experiment: Experiment, spans: Sequence[Span], full: Sequence[Act]) -> None:
        """Time what calls take beside training, averaging, and scoring: where anything of it has not been timed."""
        known = all(_call_key(experiment, call) in self.calls for act in full for call in act.calls)
        if known and all(_call_keys(experiment, act) in self.servers for act in full[1:]):
            return
        dry_run = DryRun(experiment, self.counted)
        algorithm, task = experiment.algorithm, dry_run.task
        for act in acts(experiment, self.counted, spans, [()] * len(full)):
            server = dry_run.server(act.round)
            payloads = algorithm.server_broadcast(act.held.server, dry_run.infos, server)
            for info, call, state in zip(dry_run.infos, act.calls, act.held.private, strict=True):
                context, key = dry_run.client(info, act.round), _call_key(experiment, call)
                if key not in self.calls:
                    make = functools.partial(algorithm.client_model, payloads[info.id], state, context)
                    self.calls[key] = (call.seconds, _timed(make, task) if act.round else None)
            key = _call_keys(experiment, act)
            if key not in self.servers and act.round:
                model = _timed(functools.partial(algorithm.server_model, act.held.server, server), task)
                self.servers[key] = (act.averaging / len(act.calls), model)


def phases(experiment: Experiment, counted: dict[tuple, StepCost]) -> tuple[list[Span], list[Act]]:
    """Spans of rounds in which participants do the same: how they begin, and the first round of each.

    Who does the same in two rounds is taken to do so in all between them.
    """
    dry_run = DryRun(experiment, counted)
    held, calls = dry_run.begin()
    spans, found = [], [Act(0, calls, held)]
    while not spans or spans[-1][1] < experiment.rounds:
        first = spans[-1][1] + 1 if spans else 1
        calls = dry_run.train(held, first)
        held = dry_run.aggregate(held, first, calls)
        last, beyond, asked = first, experiment.rounds + 1, experiment.rounds
        while last + 1 < beyond:  # the same up to `last`, something else from `beyond` on
            if _doing(dry_run.train(held, asked)) == _doing(calls):
                last = asked
            else:
                beyond = asked
            asked = (last + beyond) // 2
        spans.append((first, last))
        found.append(Act(first, calls, held))
    return spans, found


def acts(
    experiment: Experiment, counted: dict[tuple, StepCost], spans: Sequence[Span], timed: Sequence[Collection[str]]
) -> list[Act]:
    """How participants begin, and the first round of every phase, once more.

    - `timed`: for each of these, the tiers whose participants take the time of a step.
    """
    dry_run, (at_first, *in_rounds) = DryRun(experiment, counted), timed
    held, calls = dry_run.begin(at_first)
    found = [Act(0, calls, held)]
    for (round, _), names in zip(spans, in_rounds, strict=True):
        calls = dry_run.train(held, round, names)
        started = time.perf_counter()
        held = dry_run.aggregate(held, round, calls)
        found.append(Act(round, calls, held, time.perf_counter() - started))
    return found


# what decides how long something takes --------------------------------------------------------------------------------


def _method_key(experiment: Experiment) -> tuple:
    inputs = dataclasses.replace(experiment.task.inputs, num_classes=1)
    algorithm = experiment.algorithm
    method = (type(algorithm).__qualname__, algorithm.preset_name, experiment.precision, experiment.task.family)
    return (*method, inputs, experiment.middle, experiment.target)


def _work_key(experiment: Experiment, work: Work) -> tuple:
    # Amounts to two digits: data that differ in their number of classes alone are timed once.
    amounts = (f"{work.trainable:.1e}", f"{work.flops_per_step:.1e}")
    return (*_method_key(experiment), work.purpose, work.objective, work.batch_size, *amounts)


def _call_key(experiment: Experiment, call: Call) -> tuple:
    works = tuple(_work_key(experiment, work) for work in call.work)
    amounts = (f"{nbytes(call.state):.1e}", f"{_sent(call):.1e}")
    return (experiment.algorithm.name, *_method_key(experiment), works, *amounts)


def _call_keys(experiment: Experiment, act: Act) -> tuple:
    return tuple(_call_key(experiment, call) for call in act.calls)


# parts ----------------------------------------------------------------------------------------------------------------


def _doing(calls: Sequence[Call]) -> list[tuple]:
    """What tells two rounds apart."""
    return [(_sent(call), [(w.purpose, w.trainable, w.epochs, w.flops_per_step) for w in call.work]) for call in calls]


def _sent(call: Call) -> int:
    return nbytes(call.payload) + (nbytes(call.update.tree) if call.update else 0)


def _alike(experiment: Experiment) -> Experiment:
    """The same for all experiments that have an outline in common: learning rates cost nothing either."""
    algorithm: Any = experiment.algorithm
    names = [field.name for field in dataclasses.fields(algorithm)]
    rates = {name: 1e-3 for name in names if name == "lr" or name.endswith("_lr")}
    return dataclasses.replace(
        experiment,
        algorithm=dataclasses.replace(algorithm, **rates),
        partition=Partition(),
        participants=MANY,  # a dry run has one of each tier, and methods refuse too few
        cohort=None,
        seed=0,
        validation_share=0.0,
        eval_every=1,
        scored="auto",
        chunk=1,
    )


def _in_batches_of(size: int, experiment: Experiment) -> Experiment:
    """As it is where the method has no field for it."""
    algorithm: Any = experiment.algorithm
    has = any(field.name == "batch_size" for field in dataclasses.fields(algorithm))
    changed = dataclasses.replace(algorithm, batch_size=size) if has else algorithm
    return dataclasses.replace(experiment, algorithm=changed)


def _timed(make: Callable[[], nn.Module | None], task: Task) -> Model | None:
    making = _seconds(make)
    model = make()
    if model is None:
        return None
    low = _seconds(lambda: task.score(model, _examples(task, SMALL)))
    size = max(SMALL, min(SCORED, int(SMALL * LONG / low)))
    high = _seconds(lambda: task.score(model, _examples(task, size)))
    return Model(making, Line.through((SMALL, low), (size, high)))


def _examples(task: Task, size: int) -> Split:
    """A split of the right shapes that holds no data."""
    inputs = task.example(size)
    labels = inputs["labels"] if task.inputs.kind in PER_TOKEN else inputs.pop("labels")
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.uint8)
    return Split(inputs, labels)


def _seconds(action: Callable[[], Any]) -> float:
    """The better of two times."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = pin_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
