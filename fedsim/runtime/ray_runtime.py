"""The Ray runtime: hosts and the aggregator are actors, updates travel as object references.

The aggregator calls hosts itself (`ray_call`); the driver sees numbers only. Actors outlive a run: the next run of a
sweep reuses them.

What is lost with a process is made again: Ray restarts the actor, the call that was lost is repeated (a bounded number
of times, counted), and the objects it needs are built from the factories that come with every call.
"""

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.core import environment
from fedsim.core.limits import limits, memory_bytes
from fedsim.core.numerics import NATIVE, use
from fedsim.runtime.actors import Host, Server, remote, use_tensor_views
from fedsim.runtime.base import Call, Resources, Runtime, Watch
from fedsim.runtime.joining import expect_connected, join
from fedsim.runtime.liveness import Liveness
from fedsim.runtime.nodes import capacities, lost_here, on_every_node
from fedsim.runtime.placement import Capacity, Plan, grouped, part_of, plan
from fedsim.runtime.private_ray import (
    TIGHT_SECONDS,
    Prestart,
    abandon,
    end_private,
    is_for_us,
    not_started,
    raylet_died,
    start_private,
)
from fedsim.runtime.ray_call import ATTEMPTS, START_SECONDS, RayCall


SOON_SECONDS, TELL_SECONDS = 60.0, 60.0  # when it is first said that hosts are waited for, and then again
TOLD_SECONDS = 0.25  # between two looks at how far the aggregator is
RELEASE_SECONDS = 10.0  # in which Ray lets go of what actors held that were killed


class RayRuntime(Runtime):
    """Participants and aggregator on Ray.

    - `address`: a cluster to join ("auto" or HOST:PORT); None: the Ray this process is connected to already, if it is,
      else a private Ray on this machine.
    - `hosts`: number of host actors; None: one a participant while they fit.
    - `num_gpus`: logical GPUs of a private Ray; None: the ones there are.
    - `share`: runs at once on the same Ray; this one plans with an equal part of what there is.
    - `say`: told, in words, how participants were placed.
    - `numerics`: of the processes that Ray starts; this one may have computed with others before.
    - `begun`: a private Ray that is coming up.
    - `wait`: seconds in which the autoscaler of a cluster that is joined may bring what is missing for `hosts`: these
      are then asked for without looking at what is there.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        hosts: int | None = None,
        num_gpus: int | None = None,
        share: int = 1,
        say: Callable[[str], None] = lambda text: None,
        wait: float = 0.0,
        numerics: str = NATIVE,
        begun: Prestart | None = None,
    ) -> None:
        use(numerics)
        self.address, self.hosts, self.num_gpus, self.share, self.say = address, hosts, num_gpus, share, say
        self.wait, self.patience = wait, max(wait, START_SECONDS)
        self.liveness = environment.liveness_seconds()
        self.numerics = numerics
        self.actors: list[Any] = []
        self.starting: list[Any] = []  # answers of hosts that are coming up
        self.server: Any = None
        self.plan: Plan | None = None
        self.connected = False  # by this object, which then also disconnects
        self.dashboard: str | None = None  # of a cluster that this object joined: HOST:PORT
        self.cut_off = False  # from a private Ray, whose raylet is lost
        self.private, self.begun = address is None and is_for_us(begun), begun

    def start(
        self,
        make_aggregator: Callable[[Call], Any],
        make_participants: Mapping[int, Callable[[], Any]],
        resources: Mapping[int, Resources],
        chunk: int,
    ) -> None:
        if self.cut_off:
            self._cut_off()
        wanted = self._planned(resources)
        self._connect(wanted)
        if self.plan is None or self.plan.requests != wanted.requests:
            self._place(wanted)
        self.plan, self.token = wanted, uuid.uuid4().hex
        self.made_of = []
        self.to_make = (make_aggregator, make_participants, resources, chunk)

    def probe(self, call: Callable[[], Any]) -> Any:
        if self.wait:
            self._join()
        elif not self._capacity().gpus:
            return None
        self._connect(Plan(((),), (Resources(num_cpus=0.0, num_gpus=1.0),)))
        probing = ray.remote(_probed).options(num_cpus=0, num_gpus=1, max_calls=1, max_retries=0)
        reference = probing.remote(call)
        if not ray.wait([reference], timeout=self.patience)[0]:
            raise RuntimeError(f"no whole GPU has become free within {self.patience:g} s")
        return ray.get(reference)

    @property
    def joined(self) -> bool:
        return not self.private

    def everywhere(self, call: Callable[[], Any]) -> Mapping[str, Any]:
        if self.private:
            self._connect(Plan(((),), (Resources(num_cpus=0.0),)))
        else:
            self._join()
        return on_every_node(call)

    def capacities(self) -> Mapping[str, Mapping[str, float]]:
        return capacities()

    def job_server(self) -> str | None:
        if not self.private:
            self._join()
        return self.dashboard

    def ask(self, method: str, *args: Any, watch: Watch | None = None) -> Any:
        if self.starting:
            self._wait_for_hosts()
        if not self.made_of:
            self.made_of = [self._put()]
        for attempt in range(1, ATTEMPTS + 1):
            reference = self.server.invoke.remote(self.token, self.made_of, method, args, attempt - 1)
            liveness = Liveness(self.liveness, every=TOLD_SECONDS)
            try:
                while not ray.wait([reference], timeout=TOLD_SECONDS)[0]:
                    self._expect_raylet()
                    answers, lost = liveness.look({"server": self.server})
                    if watch is not None and answers:
                        watch(*answers["server"])
                    if lost:
                        ray.kill(self.server, no_restart=False)
                return ray.get(reference)
            except RayTaskError as error:
                raise error.cause from None  # what the aggregator raised, as it raised it
            except RayActorError as error:
                if attempt == ATTEMPTS:
                    raise RuntimeError(f"the aggregator died {ATTEMPTS} times at {method!r}: {error}") from error
                self._wait_for_server(error)
        raise AssertionError("unreachable")

    def _wait_for_server(self, error: RayActorError) -> None:
        """Wait until the aggregator's process, which died, has been started again."""
        back, end = self.server.ready.remote(), time.monotonic() + self.patience
        while not ray.wait([back], timeout=1.0)[0]:
            self._expect_node()
            if time.monotonic() > end:
                raise RuntimeError(f"the aggregator died and did not come back within {self.patience:g} s: {error}")
        try:
            ray.get(back)
        except RayError:
            self._expect_node()
            raise

    def _expect_node(self) -> None:
        """**Raises:** `RuntimeError` if this process is cut off from its Ray."""
        self._expect_raylet()
        if lost_here():
            self._cut_off()

    def _expect_raylet(self) -> None:
        """The same, where it is plain to see: before Ray itself finds out, and may end this process."""
        if self.private and raylet_died():
            self._cut_off()

    def _cut_off(self) -> NoReturn:
        if self.private:
            self.cut_off = True
            abandon()
        raise RuntimeError(
            f"Ray's own process on this machine (raylet) died, or has not answered for {self.liveness:g} s: no "
            "participant is to blame, and every finished round is on disk"
        )

    def close(self) -> None:
        if self.cut_off:
            return
        own = self.private and self.connected  # then they end with their Ray
        for actor in [] if own else [*self.actors, *([self.server] if self.server is not None else [])]:
            with contextlib.suppress(Exception):  # it may be dead already, or the cluster gone
                ray.kill(actor)
        self.actors, self.server, self.plan = [], None, None
        if self.connected:
            self.connected = False
            end_private() if self.private else ray.shutdown()

    # parts ----------------------------------------------------------------------------------------------------------

    def _put(self) -> Any:
        """Reference to what makes the aggregator, and its call.

        Put when first needed, not at the start: what was counted while hosts came up, factories then carry along.
        """
        assert self.plan is not None
        make_aggregator, make_participants, resources, chunk = self.to_make
        alone = {group[0]: host for host, group in enumerate(self.plan.groups) if len(group) == 1}
        fixed = alone if len(alone) == len(resources) else {}
        factories = ray.put(dict(make_participants))
        call = RayCall(
            self.token,
            self.actors,
            self.plan.requests,
            dict(resources),
            factories,
            chunk,
            fixed,
            self.patience,
            self.liveness,
        )
        return ray.put((make_aggregator, call))

    def _planned(self, resources: Mapping[int, Resources]) -> Plan:
        if self.wait and self.hosts is not None:
            self._join()
            return grouped(resources, sorted(resources), self.hosts)
        cores = max(1, (os.cpu_count() or 1) // self.share)
        whole = part_of(self._capacity(free=False), self.share)
        result = plan(resources, self.hosts, whole, cores)  # what does not fit at all is refused at once
        end = time.monotonic() + RELEASE_SECONDS
        while True:  # what runs before this one held may not have been let go of yet
            try:
                result = plan(resources, self.hosts, part_of(self._capacity(), self.share), cores)
                break
            except ValueError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        largest_host = max(len(group) for group in result.groups)
        if largest_host > 1 and result != self.plan:
            self.say(f"{len(resources)} participants share {len(result.groups)} hosts, up to {largest_host} on each")
        return result

    def _capacity(self, free: bool = True) -> Capacity:
        """What there is; of CPUs those that are `free`, or all of them."""
        if not self.private:
            self._join()
            total = ray.cluster_resources()
            cpus = total.get("CPU", 0.0)
            if free and self.share == 1:  # with others beside it, what is free says nothing of what is this run's part
                own = self.plan.requests if self.plan is not None else ()
                cpus = ray.available_resources().get("CPU", 0.0) + sum(request.num_cpus for request in own)
            return Capacity(cpus, [1.0] * int(total.get("GPU", 0.0)), total.get("memory", 0.0) / 2**20, total)
        gpus = torch.cuda.device_count() if self.num_gpus is None else self.num_gpus
        return Capacity(None, [1.0] * gpus, memory_bytes() / 2**20)

    def _join(self) -> None:
        if not ray.is_initialized():
            self.dashboard = join(self.address)
            self.connected = True
        elif not self.connected:
            expect_connected(self.address)
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
        start_private(cpus, self.num_gpus, self.begun, self.say)
        self.connected = True
        use_tensor_views()

    def _place(self, wanted: Plan) -> None:
        """Start the host actors and the server together; `_wait_for_hosts` waits for them."""
        for actor in self.actors:
            ray.kill(actor)
        host, server = remote(Host), remote(Server)
        self.actors = [host.options(**options(request)).remote(self.numerics) for request in wanted.requests]
        if self.server is None:
            # Beside the driver: a worker of a cluster may be taken away, and nothing goes on without the driver's node.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            self.server = server.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(self.numerics)
        self.starting = [actor.ready.remote() for actor in self.actors]

    def _wait_for_hosts(self) -> None:
        count, begun, told = len(self.starting), time.monotonic(), SOON_SECONDS
        tight = limits()[1] if self.private else []
        ready, late = ray.wait(self.starting, num_returns=count, timeout=1.0)
        while late and (waited := time.monotonic() - begun) < self.patience:
            self._expect_node()
            if tight and waited > TIGHT_SECONDS:
                raise ValueError(not_started(f"{len(late)} of {count} hosts", tight))
            if waited > told:
                told += TELL_SECONDS
                whom = "the others" if self.private else "the cluster to bring the others"
                self.say(f"{len(ready)} of {count} hosts are up; waiting for {whom}")
            ready, late = ray.wait(self.starting, num_returns=count, timeout=1.0)
        if late:
            waited, self.patience = self.patience, TELL_SECONDS  # the next run does not wait as long once more
            raise RuntimeError(
                f"{len(ready)} of {count} hosts started within {waited:g} s; the cluster has "
                f"{ray.available_resources()} free"
            )
        ray.get(ready)
        self.starting = []


def _probed(call: Callable[[], Any]) -> Any:
    return call()


def options(request: Resources) -> dict[str, Any]:
    """What a host actor asks of Ray."""
    memory = {} if request.memory_mb is None else {"memory": int(request.memory_mb * 2**20)}
    # cuBLAS gives the same bits again only with a workspace of fixed size, which it is told as a process begins.
    repeatable = {"runtime_env": {"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}} if request.num_gpus else {}
    return {
        "num_cpus": request.num_cpus,
        "num_gpus": request.num_gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        "resources": dict(request.custom),
        **memory,
        **repeatable,
    }
