"""One participant: its shard, its private state, and the calls the aggregator makes of it."""

import copy
import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedsim.algorithm import ClientContext, ClientUpdate, Payload
from fedsim.core import tree as trees
from fedsim.core.environment import use_large_pages
from fedsim.core.interrupts import Interrupt
from fedsim.core.tree import State
from fedsim.data.config import PER_TOKEN
from fedsim.data.dataset import Split
from fedsim.data.examples import Examples
from fedsim.engine import boundary
from fedsim.engine.cohort import Member
from fedsim.engine.inbox import Inbox
from fedsim.engine.report import ClientReport
from fedsim.experiment import Experiment
from fedsim.learning.meter import Meter, StepCost
from fedsim.learning.steps import Asking, asking
from fedsim.learning.task import Task, load_task
from fedsim.storage.checkpoint import RECEIVED, SENT, exchanges_of, private_of


SMALL_SHARD = 2**18  # bytes


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a participant sends: an update (or None) and a report of its work, without tensors."""

    update: ClientUpdate | None
    report: ClientReport
    state_sha256: str


class DeviceMemoryError(RuntimeError):
    """A participant's device has too little memory left. Says whose, and the sizes; its cause is torch's error."""


Done = tuple[ClientUpdate | None, dict[str, Any]]  # an update, and more fields of the report
Work = Callable[[State, Meter], Asking[Done]]  # with the payload that was received


class Participant:
    """A plain class: it runs wherever a runtime puts it.

    Its private state is written to `folder` before a reply leaves, and read by nobody else. A call for round r always
    starts from the newest state older than r, so a repeated call gives the same answer.

    Calls ask for their trainings (`fedsim.learning.steps`): `run_alone` or `run_batched` gives their replies.

    - `counted`: costs of training steps that are known already. - `inbox`: shared by participants of one process.
    - `keep_updates`: write down, for audits, what it receives and sends in every round it trains in,
      and keep its earlier private states.
    """

    def __init__(
        self,
        experiment: Experiment,
        member: Member,
        data_dir: str | None,
        folder: str,
        counted: dict[tuple, StepCost],
        inbox: Inbox,
        keep_updates: bool = False,
    ) -> None:
        use_large_pages()
        self.experiment, self.member, self.data_dir = experiment, member, data_dir
        self.counted, self.inbox = counted, inbox
        self.versions = private_of(folder, member.info.id, all_kept=keep_updates)
        self.exchanges = exchanges_of(folder, member.info.id) if keep_updates else None
        gpu = member.tier.num_gpus > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        self.version: int | None = None
        self.state: State = {}
        self.sha256 = ""
        self.shard: Split | None = None  # held where it is small: cutting it out anew takes longer than a small model
        self.shard_bytes = 0
        self.sent: boundary.Sent | None = None
        self.init_flops = 0  # of making the private state, within the current call
        self.downloads = 0  # bytes of public models that it began with, within the same call

    @property
    def nbytes(self) -> int:
        """Of what this object holds between calls."""
        return self.shard_bytes + trees.nbytes(self.state)

    # calls ----------------------------------------------------------------------------------------------------------

    def begin(self, round: int, payload: Payload) -> Asking[Reply]:
        """Make the private state (Fed-Grow's local stage)."""

        def work(received: State, meter: Meter) -> Asking[Done]:
            yield from self._enter(round, round, meter)
            return None, {}

        return self._measured(("begin", round), payload, work)

    def tell(self, sent: Mapping[str, boundary.Sent]) -> None:
        """How updates look, by tier: no call, but known from then on."""
        self.sent = sent.get(self.member.info.tier)

    def train(self, round: int, payload: Payload) -> Asking[Reply]:
        """One round of local work; the update is what is sent."""

        def work(received: State, meter: Meter) -> Asking[Done]:
            yield from self._enter(round, round, meter)
            context = self._context(round, meter)
            lent = trees.lent(self.state)
            returned = yield from asking(context, self.experiment.algorithm.client_update(received, lent, context))
            try:
                update, state = boundary.checked(returned, context.info.id, self.sent, payload)
                stays = (state is lent and not lent) or _stays(state, lent, self.state)
                if not stays:
                    boundary.check_finite(trees.flat(state), "private state")
            except ValueError as error:
                raise self._refused(round, error) from None
            del returned
            if not stays:
                self._keep(round, state)
            tree = trees.mapped(trees.given_away, update.tree)
            if self.exchanges is not None:
                self.exchanges.save(round, {RECEIVED: payload, SENT: tree})
            noted = {"outcome": "in_time", "bytes_down": trees.nbytes(payload), "bytes_up": trees.nbytes(tree)}
            noted |= {"upload_params": trees.numel(tree), "metrics": update.metrics or None}
            return ClientUpdate(update.client, tree, update.weight), noted | {"weight": update.weight}

        return self._measured(("train", round), payload, work)

    def answer(self, round: int, question: Payload) -> Asking[Reply]:
        """A further exchange within a round, before or after its training; the update holds the answer."""

        def work(received: State, meter: Meter) -> Asking[Done]:
            yield from self._enter(round + 1, round, meter)
            context, lent = self._context(round, meter), trees.lent(self.state)
            found = self.experiment.algorithm.client_answer(received, lent, context)
            try:
                boundary.check_state(found, "client_answer's answer")
            except ValueError as error:
                raise self._refused(round, error) from None
            tree = trees.clone(found)
            noted = {"bytes_down": trees.nbytes(question), "bytes_up": trees.nbytes(tree)}
            return ClientUpdate(context.info.id, tree, 0), noted

        return self._measured(("answer", round), question, work)

    def score(self, round: int, payload: Payload) -> Asking[Reply]:
        """Accuracy and loss of the model this participant would deploy, after a round."""

        def work(received: State, meter: Meter) -> Asking[Done]:
            yield from self._enter(round + 1, round, meter)
            context = self._context(round, meter)
            lent = trees.lent(self.state)
            algorithm, dataset = self.experiment.algorithm, self.task.dataset
            model = algorithm.client_model(received, lent, context)
            scores = self._scores(model)
            assert dataset is not None
            more = boundary.check_metrics(algorithm.client_scores(model, dataset.test, context))
            return None, {"train_seconds": 0.0, "metrics": more or None} | scores  # scoring is not training

        return self._measured(("score", round), payload, work)

    # state ----------------------------------------------------------------------------------------------------------

    def _enter(self, before: int, round: int, meter: Meter) -> Asking[None]:
        """Hold the newest state older than round `before`; make one, in this round, if there never was any."""
        if self.version is not None and self.version < before:
            return
        found = self.versions.load(before)
        if found is not None:
            self.version, state, _, self.sha256 = found
            self.state = trees.to(state, self.device)
            return
        before, context = meter.flops, self._context(0, meter)
        state = yield from asking(context, self.experiment.algorithm.client_init(context))
        self.init_flops, self.downloads = meter.flops - before, sum(meter.downloads.values())
        # Nothing that took nothing to make can be made again: thousands of empty files would cost more than all else.
        try:
            boundary.check_finite(boundary.check_state(state, "client_init's state"), "client_init's state")
        except ValueError as error:
            raise self._refused(round, error) from None
        self._keep(round, state, on_disk=bool(state or self.init_flops))

    def _refused(self, round: int, error: ValueError) -> ValueError:
        """What a method returned is refused: whose, and when."""
        return ValueError(f"participant {self.member.info.id}, round {round}: {error}")

    def _keep(self, version: int, state: State, on_disk: bool = True) -> None:
        """Save before use: what a reply reports is already on disk."""
        kept = trees.clone(trees.to(state, self.device))
        self.sha256 = self.versions.save(version, kept) if on_disk else trees.sha256(kept)
        self.version, self.state = version, kept

    # parts ----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def task(self) -> Task:
        """The task with its data, loaded once a process."""
        return load_task(self.experiment.task, self.data_dir)

    @functools.cached_property
    def bare_task(self) -> Task:
        """The task without the others' data and the test set, which are not this participant's to read or to write."""
        bare = copy.copy(self.task)
        bare.dataset = None
        return bare

    def _context(self, round: int, meter: Meter) -> ClientContext:
        task = self.task
        assert task.dataset is not None
        return ClientContext(
            seed=self.experiment.seed,
            round=round,
            task=self.bare_task,
            intermediate=self.experiment.middle,
            target=self.experiment.target,
            info=self.member.info,
            train=self._shard(task.dataset.train),
            device=self.device,
            meter=meter,
            precision=self.experiment.precision,
            forms=self.experiment.forms,
            start=self.experiment.start,
            data_dir=self.data_dir,
        )

    def _shard(self, everybodys: Split) -> Split:
        """This participant's part of the training data, lent: what is written into it is seen by nobody later."""
        if self.shard is None:
            shard = everybodys.select(self.member.train)
            size = shard.labels.nbytes
            if not isinstance(shard.inputs, Examples):
                size += sum(tensor.nbytes for tensor in shard.inputs.values())
                if size > SMALL_SHARD:
                    return shard
            self.shard, self.shard_bytes = shard, size
        held, lend = self.shard, trees.lent_tensor
        inputs = held.inputs  # of prepared data, everyone who asks gets copies
        if not isinstance(inputs, Examples):
            inputs = {name: lend(tensor) for name, tensor in inputs.items()}
        return Split(inputs, lend(held.labels), None if held.groups is None else lend(held.groups))

    def _scores(self, model: torch.nn.Module) -> dict[str, Any]:
        dataset = self.task.dataset
        assert dataset is not None
        test = self.inbox.once(model, lambda: self.task.score(model, dataset.test))
        validation = self.task.score(model, dataset.train.select(self.member.validation))
        if dataset.kind in PER_TOKEN:
            local = validation.accuracy  # examples carry no label to weight by: the participant's own held-out part
        else:
            labels = dataset.train.labels.numpy()[self.member.train]
            local = test.accuracy_under(np.bincount(labels, minlength=dataset.num_classes))
        return {
            "accuracy": nullable(test.accuracy),
            "accuracy_local": nullable(local),
            "accuracy_val": nullable(validation.accuracy),
            "accuracy_val_even": nullable(validation.accuracy_under(np.ones(len(validation.count)))),
            "loss": nullable(test.loss),
            "num_test_examples": len(dataset.test.labels),
            "precision": nullable(test.precision),
            "recall": nullable(test.recall),
            "f1": nullable(test.f1),
        }

    def _measured(self, call: tuple[str, int], payload: Payload, work: Work) -> Asking[Reply]:
        """Run some work and note what it took."""
        meter = Meter(self.counted)
        reset_peak_memory(self.device)
        self.init_flops = self.downloads = 0
        started = time.perf_counter()
        try:
            received = self.inbox.copy_of(payload, self.device, call)
            update, noted = yield from work(received, meter)
        except torch.OutOfMemoryError as error:
            info, tier = self.member.info, self.member.tier
            raise DeviceMemoryError(
                f"participant {info.id} of tier {tier.name!r} ({info.form}, num_gpus={tier.num_gpus:g}) found too "
                f"little memory on {self.device}: {error}"
            ) from error
        except BaseException as error:
            if isinstance(error, Exception | GeneratorExit | Interrupt):  # the last is the user's, who ends the run
                raise
            raise RuntimeError(f"a method of participant {self.member.info.id} raised {error!r}") from error
        measured: dict[str, Any] = {
            "train_seconds": time.perf_counter() - started,
            "train_loss": meter.loss,
            "flops": meter.flops,
            "init_flops": self.init_flops,
            "bytes_once": self.downloads,
            "trainable_params": meter.trainable,
            "peak_memory_bytes": peak_memory(self.device),
            "small_sha256": meter.small_sha256,
        }
        return Reply(update, ClientReport(**measured | noted), self.sha256)


def _stays(state: State, lent: State, held: State) -> bool:
    """Whether a state is made of the very tensors that were lent, by the same names, and nobody wrote into them."""
    one, two = trees.flat(state), trees.flat(lent)
    return one.keys() == two.keys() and all(one[n] is two[n] for n in one) and trees.untouched(lent, held)


def nullable(number: float) -> float | None:
    """NaN (nothing to score) as None."""
    return None if np.isnan(number) else number


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (marks := _marks(os.getpid())) is not None:
        os.pwrite(marks, b"5", 0)


def peak_memory(device: torch.device) -> int | None:
    """High-water mark in bytes: of the device's allocations on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    # Of a thread, Linux gives the same mark and need not add up the times of all others, of which Ray starts dozens.
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_maxrss * unit


@functools.cache
def _marks(process: int) -> int | None:
    """What this process writes to for a new high-water mark, opened once; None where there is no such file."""
    try:
        return os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return None  # not Linux, or not allowed: the mark is then the process's own
