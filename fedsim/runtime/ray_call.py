"""The seam on Ray: the aggregator's calls, pushed to hosts once a call and read back as they are answered.

A host that dies is given up for the moment: what it had still to do goes to hosts that live, at once, and it takes
part again when Ray has restarted it. Which host computes what never changes a result: chunks are fixed, and a
participant finds its private state wherever it is called.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from fedsim.runtime.actors import WorkItem
from fedsim.runtime.answering import tensor_bytes
from fedsim.runtime.base import PLAIN, Answer, Call, Fold, Policy, Resources, chunks
from fedsim.runtime.liveness import Liveness, Slow
from fedsim.runtime.schedule import Durations, Unit, assigned, cut_where_it_pays, merged


ATTEMPTS = 3  # times a host may die at the same participants before the run gives up
START_SECONDS = 300  # in which hosts must come up
MEET_SECONDS = 10.0  # in which a host answers that is up and idle
BUSY_SECONDS = 3600  # in which one answers that may still be at what an aggregator asked for that was lost


class RayCall(Call):
    """Made by the driver, used by the aggregator in its own process.

    - `hosts`: actors; `requests`: what each asked for. - `resources`: of every participant.
    - `factories`: reference to those of participants. - `fixed`: participant -> its own host, where all have one.
    - `patience`: seconds in which a host that died must be back, if no other can do its work.
    - `liveness`: seconds in which a host that is at work must answer a ping, or it is lost.
    """

    def __init__(
        self,
        token: str,
        hosts: Sequence[Any],
        requests: Sequence[Resources],
        resources: Mapping[int, Resources],
        factories: Any,
        chunk: int,
        fixed: Mapping[int, int],
        patience: float = START_SECONDS,
        liveness: float = 60.0,
    ) -> None:
        super().__init__()
        self.token, self.hosts, self.factories, self.chunk, self.fixed = token, hosts, factories, chunk, fixed
        self.patience, self.liveness = patience, liveness
        self.resources, self.durations = resources, Durations()
        self.guessing = True  # what calls will take, for want of any that were made
        self.last: dict[int, int] = {}  # participant -> host that holds its newest state
        able = {
            asked: frozenset(h for h, request in enumerate(requests) if request.covers(asked))
            for asked in set(resources.values())
        }
        self.able = {id_: able[asked] for id_, asked in resources.items()}
        self.returning: dict[Any, int] = {}  # references that are answered when a host is back -> that host
        self.unmet: set[int] | None = None  # hosts that have never answered this process; None: none was asked yet
        self.sent: dict[int, _Sent] = {}  # by the payload's `id`: what the last call put, which this one may send again

    def __call__(
        self,
        method: str,
        round: int,
        payloads: Mapping[int, Any],
        fold: Fold | None = None,
        policy: Policy = PLAIN,
    ) -> Iterator[Any]:
        if self.unmet is None:
            self._meet()
        self.progress = (method, 0, len(payloads))
        cut = chunks(list(payloads), self.chunk)
        asking = _Asking(self, method, round, payloads, fold, policy, cut)
        numbers: list[list[int]] = [[] for _ in cut]
        for number, unit in enumerate(asking.units):
            numbers[unit.chunk].append(number)
        for place, ids in enumerate(cut):
            answers = [asking.wait_for(number) for number in numbers[place]]
            if len(answers) == 1:
                yield answers[0].content
                continue
            replies = {id_: reply for answer in answers for id_, reply in answer.content}
            ordered = [(id_, replies[id_]) for id_ in ids]
            del answers, replies
            started = time.perf_counter()
            content = ordered if fold is None else fold(ordered)  # the same sum in the same order, only here
            self._folded += time.perf_counter() - started
            yield content

    def _meet(self) -> None:
        """Give nothing to a host that may be gone: an aggregator that takes a lost one's place does not know."""
        asked = {host.ready.remote(): number for number, host in enumerate(self.hosts)}
        _, late = ray.wait([*asked], num_returns=len(asked), timeout=MEET_SECONDS)
        self.returning = {reference: asked[reference] for reference in late}
        self.unmet = set(self.returning.values())

    def units(self, method: str, cut: Sequence[Sequence[int]], policy: Policy) -> list[Unit]:
        """What is pushed as one piece each, with what it is expected to take.

        Those who compute together do so in one place, whoever has a host of its own: who is with whom changes bits.
        """
        kinds = {(one.kind, one.size) for ids in cut for one in (self.resources[id_] for id_ in ids)}
        known = {each: self.durations.expected(method, *each) for each in kinds}
        sure = [(size, seconds) for (_, size), seconds in known.items() if seconds is not None]
        self.guessing = len(sure) < len(known)
        sizes = sum(size for size, _ in sure)
        rate = sum(seconds for _, seconds in sure) / sizes if sizes else 1.0  # of kinds that nobody has met yet

        fixed = self.fixed if policy.together is None else {}

        def single(chunk: int, id_: int) -> Unit:
            one = self.resources[id_]
            seconds = known[one.kind, one.size]
            home = fixed.get(id_, self.last.get(id_))
            hosts = frozenset([fixed[id_]]) if id_ in fixed else self.able[id_]
            return Unit(chunk, (id_,), rate * one.size if seconds is None else seconds, hosts, home)

        members = [[single(place, id_) for id_ in ids] for place, ids in enumerate(cut)]
        if policy.together is not None:
            whole = [merged(chunk) for chunk in members]
            return [each for chunk, one in zip(members, whole, strict=True) for each in ([one] if one else chunk)]
        return cut_where_it_pays(members, range(len(self.hosts)), self.slowness())

    def slowness(self) -> dict[int, float]:
        return {host: self.durations.slowness(host) for host in range(len(self.hosts))}


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A payload in the object store: its reference inside a list, its bytes, and the hosts it has reached."""

    payload: Any  # held, for the `id` of an object that is gone may be another's
    box: list
    bytes: int
    reached: set[int]


@dataclasses.dataclass
class _Push:
    """Units that a host was given in one message, those first that are computed first; and what they should take."""

    host: int
    numbers: list[int]
    expected: float
    started: float


class _Asking:
    """One call under way."""

    def __init__(
        self,
        call: RayCall,
        method: str,
        round: int,
        payloads: Mapping[int, Any],
        fold: Fold | None,
        policy: Policy,
        cut: Sequence[Sequence[int]],
    ) -> None:
        self.call, self.method, self.round, self.fold, self.policy = call, method, round, fold, policy
        self.units = call.units(method, cut, policy)
        whole = {place: len(ids) for place, ids in enumerate(cut)}
        self.whole = [len(unit.ids) == whole[unit.chunk] for unit in self.units]
        first = {id(payload): payload for payload in payloads.values()}
        call.sent = {
            key: call.sent[key]
            if key in call.sent
            else _Sent(payload, [ray.put(payload)], tensor_bytes(payload), set())
            for key, payload in first.items()
        }
        self.key = {id_: id(payload) for id_, payload in payloads.items()}
        self.pushes: dict[Any, _Push] = {}
        self.answers: dict[int, Answer] = {}
        self.deaths = [0] * len(self.units)
        self.waiting: list[int] = []  # units that no living host may compute
        self.later: list[int] = []  # units whose device had too little memory: one at a time, when the others are done
        self.liveness = Liveness(call.liveness, every=policy.seconds and policy.seconds / 4)
        self.ending: set[int] = set()  # hosts that are being ended, for they do not answer
        self.slow = Slow(method, round, policy)
        self._push(range(len(self.units)))

    def wait_for(self, number: int) -> Answer:
        """A unit's answer; it is let go here."""
        while number not in self.answers:
            self._step()
        return self.answers.pop(number)

    # parts ----------------------------------------------------------------------------------------------------------

    def _push(self, numbers: Sequence[int], at_once: bool = False, alone: bool = False) -> None:
        """Give units to hosts that live: one message each."""
        alive = set(range(len(self.call.hosts))) - set(self.call.returning.values())
        units = []
        for number in numbers:
            unit = self.units[number]
            if self.deaths[number] or not unit.hosts & alive:  # others than its own may do it, to be done with it
                unit = dataclasses.replace(unit, hosts=self.call.able[unit.ids[0]] | unit.hosts)
            units.append(unit)
        loads = {host: 0.0 for host in alive}
        for push in self.pushes.values():
            if push.host in loads:
                loads[push.host] += sum(self.units[number].seconds for number in push.numbers)
        given = assigned(units, alive, self.call.slowness(), loads)
        for host, places in given.items():
            if places:
                self._give(host, [numbers[place] for place in places], at_once, alone)
        placed = {place for places in given.values() for place in places}
        self.waiting += [number for place, number in enumerate(numbers) if place not in placed]

    def _give(self, host: int, numbers: list[int], at_once: bool, alone: bool) -> None:
        call = self.call
        shares, which, boxes = list[WorkItem](), dict[int, int](), dict[int, int]()
        for number in numbers:
            ids = self.units[number].ids
            shares.append((number, ids, [id_ for id_ in ids if call.last.get(id_) != host], self.whole[number]))
            for id_ in ids:
                which[id_] = boxes.setdefault(self.key[id_], len(boxes))
                call.last[id_] = host
        for key in boxes:
            sent = call.sent[key]
            if host not in sent.reached:
                sent.reached.add(host)
                call.count_moved(sent.bytes)
        stream = (
            call.hosts[host]
            .answer.options(num_returns="streaming")
            .remote(
                call.token,
                [call.factories],
                self.method,
                self.round,
                shares,
                (which, [call.sent[key].box for key in boxes]),
                self.fold,
                self.policy,
                alone or len(call.hosts) == 1,
                at_once,
                {id_: self.slow.refused[id_] for id_ in which if id_ in self.slow.refused},
            )
        )
        expected = sum(self.units[number].seconds for number in numbers)
        self.pushes[stream] = _Push(host, numbers, expected, time.perf_counter())

    def _step(self) -> None:
        """Wait until something has happened, and see to it."""
        if not self.pushes and self.later:
            self._push([self.later.pop(0)], alone=True)
        waited_for = [*self.pushes, *self.call.returning]
        if not waited_for:
            ids = ", ".join(str(id_) for number in self.waiting for id_ in self.units[number].ids)
            raise RuntimeError(f"no host asked for what participants {ids} ask for")
        patience = max(self.call.patience, BUSY_SECONDS) if self.call.unmet else self.call.patience
        if self.pushes and self.liveness.due():
            self._look()
        ready, _ = ray.wait(waited_for, num_returns=1, timeout=self.liveness.every if self.pushes else patience)
        if not ready and not self.pushes:
            ids = ", ".join(str(id_) for number in self.waiting for id_ in self.units[number].ids)
            raise RuntimeError(
                f"no host that may compute participants {ids} has come back within {patience:g} s after it "
                f"died; free in the cluster: {ray.available_resources()}"
            )
        for reference in ready:
            if reference in self.call.returning:
                self._host_restarted(reference)
            else:
                self._read(reference)

    def _look(self) -> None:
        """End hosts that do not answer, or whose participant does not. What they had to do is then theirs who live."""
        hosts = self.call.hosts
        busy = {push.host for push in self.pushes.values()} - self.ending
        answers, lost = self.liveness.look({host: hosts[host] for host in busy})
        lost += [host for host, (ids, seconds) in answers.items() if self.slow.note(ids, seconds)]
        for host in lost:
            self.ending.add(host)
            ray.kill(hosts[host], no_restart=False)

    def _read(self, stream: Any) -> None:
        """Take the next answers of a host, which may have died instead."""
        push = self.pushes[stream]
        try:
            batch, node, broadcast, write = ray.get(next(stream))
        except StopIteration:
            del self.pushes[stream]
            return
        except RayTaskError:  # also says what it was raised by: not every lost object is a lost host
            raise
        except (RayActorError, ObjectLostError) as error:
            self._lost(stream, error)
            return
        call = self.call
        call.spend(push.host, broadcast=broadcast, write=write)
        for number, answer in batch:
            push.numbers.remove(number)
            unit = self.units[number]
            if answer.out_of_memory:
                call.repeated(unit.ids)
                self.later.append(number)
                continue
            call.note(self.method, answer, answer.moved, unit.ids, push.host, node)
            for id_, seconds in answer.seconds.items():
                asked = call.resources[id_]
                call.durations.note(self.method, asked.kind, asked.size, seconds)
            self.answers[number] = answer
            method, done, total = call.progress
            call.progress = (method, done + len(unit.ids), total)
        if not push.numbers and not call.guessing:
            call.durations.note_host(push.host, push.expected, time.perf_counter() - push.started)

    def _lost(self, stream: Any, error: Exception) -> None:
        """A host died. The unit it was at, as far as can be told, must not be its end too often."""
        push, call = self.pushes.pop(stream), self.call
        self.ending.discard(push.host)
        if push.host not in call.returning.values():
            call.returning[call.hosts[push.host].ready.remote()] = push.host
        if not push.numbers:
            return
        suspect = push.numbers[0]
        if not any(id_ in self.slow.times for id_ in self.units[suspect].ids):  # whose host was ended for that
            self.deaths[suspect] += 1
        for number in push.numbers:
            call.repeated(self.units[number].ids)
        if self.deaths[suspect] >= ATTEMPTS:
            ids = ", ".join(map(str, self.units[suspect].ids))
            raise RuntimeError(
                f"a host died {ATTEMPTS} times while its participants {ids} were at {self.method!r} of round "
                f"{self.round}: {error}"
            ) from error
        self._push(push.numbers, at_once=True)

    def _host_restarted(self, reference: Any) -> None:
        """A host that had died is back, and holds nothing."""
        host = self.call.returning.pop(reference)
        if self.call.unmet:
            self.call.unmet.discard(host)
        try:
            ray.get(reference)
        except RayActorError as error:
            raise RuntimeError(f"host {host} died and cannot be started again: {error}") from error
        waiting, self.waiting = self.waiting, []
        if waiting:
            self._push(waiting, at_once=True)
