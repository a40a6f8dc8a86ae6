"""Where runs are computed. A `Choice` is the only place that chooses, and Ray is imported only when chosen."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedsim.core.modules import check_shadowed
from fedsim.core.numerics import NATIVE


if TYPE_CHECKING:
    from fedsim.runtime.base import Runtime
    from fedsim.runtime.private_ray import Prestart

RUNTIMES = ("ray", "inline")
MOST = 10_000  # host processes, or logical GPUs


def silent(text: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Called, it makes the runtime; other processes can be handed what `shared` yields. All but `name` and `numerics`
    concerns Ray alone.

    - `gpus`: logical GPUs of a private Ray. - `share`: runs at once, each with an equal part of what there is.
    - `wait`: seconds for a cluster's autoscaler to bring what `hosts` ask for. - `begun`: a Ray that is coming up.
    """

    name: str
    address: str | None = None
    hosts: int | None = None
    gpus: int | None = None
    share: int = 1
    say: Callable[[str], None] = silent
    wait: float = 0.0
    numerics: str = NATIVE
    begun: "Prestart | None" = None

    def __post_init__(self) -> None:
        """**Raises:** `ValueError` for what no runtime can be asked for."""
        if self.name not in RUNTIMES:
            raise ValueError(f"runtime={self.name!r}: must be one of {', '.join(RUNTIMES)}")
        for option, number, least in (("hosts", self.hosts, 1), ("gpus", self.gpus, 0)):
            if number is not None and not least <= number <= MOST:
                raise ValueError(f"--{option}={number}: must be at least {least} and at most {MOST}")
        if not 0 <= self.wait < math.inf or (self.wait and (self.hosts is None or self.address is None)):
            raise ValueError(f"--wait={self.wait / 60:g}: needs --hosts, and a cluster to join (--address)")

    @property
    def start_method(self) -> str:
        """How other processes that make such a runtime are started: as `multiprocessing` names it.

        Forked from a server, they start at once and share what it has imported. Whether a Ray asks for a token is said
        by the environment of the process that started it, which a server that is older does not share.
        """
        return "forkserver" if self.name == "inline" else "spawn"

    @property
    def private(self) -> bool:
        """Whether it is a Ray that nobody has started yet."""
        return self.name != "inline" and self.address is None

    def __call__(self) -> "Runtime":
        if self.name == "inline":
            from fedsim.runtime.inline import InlineRuntime

            return InlineRuntime(self.numerics)
        check_shadowed()
        from fedsim.runtime.ray_runtime import RayRuntime

        return RayRuntime(
            address=self.address,
            hosts=self.hosts,
            num_gpus=self.gpus,
            share=self.share,
            say=self.say,
            wait=self.wait,
            numerics=self.numerics,
            begun=self.begun,
        )

    @contextlib.contextmanager
    def ahead(self) -> Iterator["Choice"]:
        """The same; a private Ray comes up meanwhile, and ends with the context if nobody has claimed it."""
        if not self.private:
            yield self
            return
        from fedsim.runtime.private_ray import Prestart

        begun = Prestart(max(os.cpu_count() or 1, self.hosts or 0), self.gpus, self.say)
        try:
            yield dataclasses.replace(self, begun=begun)
        finally:
            begun.cancel()

    @contextlib.contextmanager
    def shared(self, jobs: int, demands: Sequence[tuple[int, float]]) -> Iterator["Choice"]:
        """What each of `jobs` processes is handed, picklable: all their runtimes are then on one Ray, as equals.

        Without an address that is the Ray this process is connected to, else a private one that ends with the context.

        - `demands`: of each run, the number of participants and the most logical CPUs that one of them asks for.
        """
        each = dataclasses.replace(self, share=jobs, say=silent, begun=None)
        if not self.private:
            yield each
            return
        from fedsim.runtime.placement import most_cpus
        from fedsim.runtime.private_ray import shared_ray

        cores = max(1, (os.cpu_count() or 1) // jobs)
        cpus = jobs * max(most_cpus(number, num_cpus, self.hosts, cores) for number, num_cpus in demands)
        with shared_ray(cpus, self.gpus, self.begun) as address:
            yield dataclasses.replace(each, address=address)
