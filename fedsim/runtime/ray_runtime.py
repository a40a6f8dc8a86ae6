"""The Ray runtime: hosts and the aggregator are actors, updates travel as object references.

Two plain classes become actors here, at one place each: `Host` holds participants, `Server` holds the aggregator. The
aggregator calls hosts itself; the driver sees numbers only. Actors outlive a run: the next run of a sweep reuses them.

What is lost with a process is made again: Ray restarts the actor, the call that was lost is repeated (a bounded number
of times, counted), and the objects it needs are built from the factories that come with every call.
"""

import contextlib
import logging
import math
import os
import socket
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from fedsim.runtime.base import (
    Answer,
    Call,
    Fold,
    Ledger,
    Resources,
    Runtime,
    Watch,
    answered,
    chunks,
    pin_threads,
    tensor_bytes,
)
from fedsim.runtime.placement import Capacity, Plan, part_of, plan
from fedsim.runtime.private_ray import start_private


ATTEMPTS = 3  # times a call is tried before the run gives up: the host, or the aggregator, keeps dying
START_SECONDS = 300


class Host:
    """A process that holds participants of one run at a time and answers for them, one call after another."""

    def __init__(self) -> None:
        use_tensor_views()
        pin_threads()
        self.token, self.participants = "", {}

    def ready(self) -> None:
        """Answers once the process is up."""

    def answer(
        self, token: str, makers: list, method: str, round: int, payloads: dict[int, list], fold: Fold | None
    ) -> tuple[Answer, str]:
        """Call `method` of some participants. `makers` and each payload are object references inside a list."""
        pin_threads()
        if token != self.token:
            self.participants, self.makers = {}, ray.get(makers[0])
            self.token = token
        for id_ in payloads:
            if id_ not in self.participants:
                self.participants[id_] = self.makers[id_]()
        received = {ref: ray.get(ref) for ref in {boxed[0] for boxed in payloads.values()}}
        chosen = {id_: received[boxed[0]] for id_, boxed in payloads.items()}
        return answered(self.participants, method, round, chosen, fold), socket.gethostname()


class Server:
    """The process that holds the aggregator of one run at a time."""

    def __init__(self) -> None:
        use_tensor_views()
        self.token, self.aggregator, self.call = "", None, None

    def invoke(self, token: str, make: Callable[[Call], Any], call: "RayCall", method: str, args: tuple) -> Any:
        """Call a method of the aggregator, made first if this process does not hold it."""
        pin_threads()
        if token != self.token:
            self.call = call
            self.aggregator, self.token = make(call), token
        return getattr(self.aggregator, method)(*args)

    def progress(self) -> tuple[str, int, int]:
        """Method, participants done, participants in all. Answered while `invoke` is at work."""
        return self.call.progress if self.call is not None else ("", 0, 0)


class RayCall(Ledger):
    """The seam on Ray. Made by the driver, used by the aggregator in its own process."""

    def __init__(self, token: str, hosts: Sequence[Any], groups: Sequence[Sequence[int]], makers: Any, chunk: int):
        super().__init__()
        self.token, self.hosts, self.makers, self.chunk = token, hosts, makers, chunk
        self.host_of = {id_: h for h, group in enumerate(groups) for id_ in group}

    def __call__(self, method: str, round: int, payloads: Mapping[int, Any], fold: Fold | None = None) -> Iterator[Any]:
        self.progress = (method, 0, len(payloads))
        refs = {key: ray.put(payload) for key, payload in {id(p): p for p in payloads.values()}.items()}
        reached: set[tuple[int, int]] = set()
        cut = chunks(list(payloads), self.chunk)
        submitted: list[deque[_Piece]] = []
        for ids in cut:  # everything is submitted before anything is waited for
            pieces: deque[_Piece] = deque()
            for host, members in self._by_host(ids):
                boxed = {id_: [refs[id(payloads[id_])]] for id_ in members}
                alone = len(members) == len(ids)
                pieces.append(_Piece(self, host, method, round, boxed, fold if alone else None))
                reached |= {(host, id(payloads[id_])) for id_ in members}
            submitted.append(pieces)
        first = {id(payload): payload for payload in payloads.values()}
        self._moved += sum(tensor_bytes(first[key]) for _, key in reached)
        for ids, pieces in zip(cut, submitted, strict=True):
            if len(pieces) == 1:
                yield self._arrived(pieces.popleft(), method).content
                continue
            replies: dict[int, Any] = {}
            while pieces:  # dropped as they arrive: the object store need not hold what has been read
                replies.update(self._arrived(pieces.popleft(), method).content)
            ordered = [(id_, replies[id_]) for id_ in ids]
            yield ordered if fold is None else fold(ordered)  # the same sum in the same order, only here

    def _by_host(self, ids: Sequence[int]) -> list[tuple[int, list[int]]]:
        members: dict[int, list[int]] = {}
        for id_ in ids:
            members.setdefault(self.host_of[id_], []).append(id_)
        return list(members.items())

    def _arrived(self, piece: "_Piece", method: str) -> Answer:
        """Wait for one piece of work; repeat it if its host was lost."""
        answer, node = piece.wait()
        self.note(method, answer, answer.moved)
        self._retries += piece.attempts - 1
        for id_ in piece.payloads:
            before = self._places.get(id_, {}).get("retries", 0)
            self._places[id_] = {"host": piece.host, "node": node, "retries": before + piece.attempts - 1}
        method, done, total = self.progress
        self.progress = (method, done + len(piece.payloads), total)
        return answer


class _Piece:
    """One call to one host, which can be lost with it and is then repeated."""

    def __init__(self, call: RayCall, host: int, method: str, round: int, payloads: dict[int, list], fold) -> None:
        self.call, self.host, self.method, self.round = call, host, method, round
        self.payloads, self.fold, self.attempts = payloads, fold, 0
        self.submit()

    def submit(self) -> None:
        self.attempts += 1
        actor, call = self.call.hosts[self.host], self.call
        self.reference = actor.answer.remote(
            call.token, [call.makers], self.method, self.round, self.payloads, self.fold
        )

    def wait(self) -> tuple[Answer, str]:
        while True:
            try:
                return ray.get(self.reference)
            except RayActorError as error:
                if self.attempts >= ATTEMPTS:
                    ids = ", ".join(map(str, self.payloads))
                    raise RuntimeError(
                        f"host {self.host} died {ATTEMPTS} times while its participants {ids} were at "
                        f"{self.method!r} of round {self.round}: {error}"
                    ) from error
                wait_until_back(self.call.hosts[self.host].ready, f"host {self.host}")
                self.submit()


def wait_until_back(question: Any, who: str) -> None:
    """Wait until a lost actor answers again: while it restarts, Ray refuses every call at once.

    - `question`: one of the actor's methods.

    **Raises:** `RuntimeError` if it has not come back after `START_SECONDS`.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            ray.get(question.remote(), timeout=max(1.0, end - time.monotonic()))
            return
        except (RayActorError, GetTimeoutError) as error:
            if time.monotonic() > end:
                raise RuntimeError(f"{who} died and did not come back within {START_SECONDS} s: {error}") from error
            time.sleep(0.2)


class RayRuntime(Runtime):
    """Participants and aggregator on Ray.

    - `address`: a cluster to join ("auto" or HOST:PORT); None: the Ray this process is connected to already, if it is,
      else a private Ray on this machine.
    - `hosts`: number of host actors; None: one a participant while they fit.
    - `num_gpus`: logical GPUs of a private Ray; None: the ones there are.
    - `share`: runs at once on the same Ray; this one plans with an equal part of what there is.
    - `say`: told, in words, how participants were placed.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        hosts: int | None = None,
        num_gpus: int | None = None,
        share: int = 1,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if hosts is not None and hosts < 1:
            raise ValueError(f"--hosts={hosts}: must be at least 1")
        self.address, self.hosts, self.num_gpus, self.share, self.say = address, hosts, num_gpus, share, say
        self.actors: list[Any] = []
        self.starting: list[Any] = []  # answers of hosts that are coming up
        self.server: Any = None
        self.plan: Plan | None = None
        self.connected = False  # by this object, which then also disconnects
        self.private = address is None and not ray.is_initialized()

    def start(
        self,
        make_aggregator: Callable[[Call], Any],
        make_participants: Mapping[int, Callable[[], Any]],
        resources: Mapping[int, Resources],
        chunk: int,
    ) -> None:
        wanted = self._planned(resources)
        self._connect(wanted)
        if self.plan is None or self.plan.requests != wanted.requests:
            self._place(wanted)
        self.plan = wanted
        self.token = uuid.uuid4().hex
        self.make = make_aggregator
        makers = ray.put(dict(make_participants))
        self.call = RayCall(self.token, self.actors, wanted.groups, makers, chunk)

    def ask(self, method: str, *args: Any, watch: Watch | None = None) -> Any:
        if self.starting:
            self._wait_for_hosts()
        for attempt in range(1, ATTEMPTS + 1):
            reference = self.server.invoke.remote(self.token, self.make, self.call, method, args)
            try:
                while not ray.wait([reference], timeout=0.25)[0]:
                    if watch is not None:
                        watch(*self._progress())
                return ray.get(reference)
            except RayTaskError as error:
                raise error.cause from None  # what the aggregator raised, as it raised it
            except RayActorError as error:
                if attempt == ATTEMPTS:
                    raise RuntimeError(f"the aggregator died {ATTEMPTS} times at {method!r}: {error}") from error
                wait_until_back(self.server.progress, "the aggregator")
        raise AssertionError("unreachable")

    def close(self) -> None:
        for actor in [*self.actors, *([self.server] if self.server is not None else [])]:
            with contextlib.suppress(Exception):  # it may be dead already, or the cluster gone
                ray.kill(actor)
        self.actors, self.server, self.plan = [], None, None
        if self.connected:
            self.connected = False
            ray.shutdown()

    # parts ----------------------------------------------------------------------------------------------------------

    def _progress(self) -> tuple[str, int, int]:
        with contextlib.suppress(RayActorError, GetTimeoutError):  # it is being restarted, or busy: no news
            return ray.get(self.server.progress.remote(), timeout=1.0)
        return ("", 0, 0)

    def _planned(self, resources: Mapping[int, Resources]) -> Plan:
        cores = max(1, (os.cpu_count() or 1) // self.share)
        capacity = part_of(self._capacity(), self.share)
        result = plan(resources, self.hosts, capacity, cores)
        largest_host = max(len(group) for group in result.groups)
        if largest_host > 1 and result != self.plan:
            self.say(f"{len(resources)} participants share {len(result.groups)} hosts, up to {largest_host} on each")
        return result

    def _capacity(self) -> Capacity:
        if not self.private:
            self._join()
            total = ray.cluster_resources()
            cpus = total.get("CPU", 0.0)
            if self.share == 1:  # with others beside it, what is free says nothing of what is this run's part
                own = self.plan.requests if self.plan is not None else ()
                cpus = ray.available_resources().get("CPU", 0.0) + sum(request.num_cpus for request in own)
            return Capacity(cpus, [1.0] * int(total.get("GPU", 0.0)), total.get("memory", 0.0) / 2**20)
        gpus = torch.cuda.device_count() if self.num_gpus is None else self.num_gpus
        return Capacity(None, [1.0] * gpus, psutil.virtual_memory().total / 2**20)

    def _join(self) -> None:
        if ray.is_initialized():
            use_tensor_views()
            return
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"--address={self.address!r}: no Ray cluster answers there ({error})") from error
        self.connected = True
        use_tensor_views()

    def _connect(self, wanted: Plan) -> None:
        """A private Ray with as many logical CPUs as the hosts ask for; a new one if a later run asks for more."""
        if not self.private:
            return
        cpus = math.ceil(sum(request.num_cpus for request in wanted.requests))
        if self.connected and ray.cluster_resources().get("CPU", 0) < cpus:
            self.close()
        if self.connected:
            return
        start_private(cpus, self.num_gpus)
        self.connected = True
        use_tensor_views()

    def _place(self, wanted: Plan) -> None:
        """Start the host actors and the server together; `_wait_for_hosts` waits for them."""
        for actor in self.actors:
            ray.kill(actor)
        host, server = ray.remote(Host), ray.remote(Server)
        self.actors = [host.options(**options(request)).remote() for request in wanted.requests]
        if self.server is None:
            self.server = server.options(num_cpus=0, max_restarts=ATTEMPTS, max_concurrency=2).remote()
        self.starting = [actor.ready.remote() for actor in self.actors]

    def _wait_for_hosts(self) -> None:
        ready, late = ray.wait(self.starting, num_returns=len(self.starting), timeout=START_SECONDS)
        if late:
            raise RuntimeError(
                f"{len(ready)} of {len(self.starting)} hosts started within {START_SECONDS} s; the cluster has "
                f"{ray.available_resources()} free"
            )
        ray.get(ready)
        self.starting = []


def options(request: Resources) -> dict[str, Any]:
    """What a host actor asks of Ray."""
    memory = {} if request.memory_mb is None else {"memory": int(request.memory_mb * 2**20)}
    return {
        "num_cpus": request.num_cpus,
        "num_gpus": request.num_gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        **memory,
    }


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
