"""Where runs are computed. `make_runtime` is the only place that chooses, and Ray is imported only when chosen."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedsim.core.numerics import NATIVE


if TYPE_CHECKING:
    from fedsim.runtime.base import Runtime

RUNTIMES = ("ray", "inline")


def silent(text: str) -> None:
    """Says nothing."""


def make_runtime(
    name: str,
    *,
    address: str | None = None,
    hosts: int | None = None,
    gpus: int | None = None,
    share: int = 1,
    say: Callable[[str], None] = silent,
    wait: float = 0.0,
    numerics: str = NATIVE,
) -> "Runtime":
    """A runtime by name; all but `name` and `numerics` concerns Ray alone.

    - `gpus`: logical GPUs of a private Ray. - `share`: runs at once, each with an equal part of what there is.
    - `wait`: seconds for a cluster's autoscaler to bring what `hosts` ask for.
    """
    if name == "inline":
        from fedsim.runtime.inline import InlineRuntime

        return InlineRuntime(numerics)
    from fedsim.runtime.ray_runtime import RayRuntime

    return RayRuntime(address=address, hosts=hosts, num_gpus=gpus, share=share, say=say, wait=wait, numerics=numerics)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The arguments of `make_runtime`: called, it makes the runtime, and other processes can be handed it."""

    name: str
    address: str | None = None
    hosts: int | None = None
    gpus: int | None = None
    share: int = 1
    say: Callable[[str], None] = silent
    wait: float = 0.0
    numerics: str = NATIVE

    @property
    def start_method(self) -> str:
        """How other processes that make such a runtime are started: as `multiprocessing` names it.

        Forked from a server, they start at once and share what it has imported. Whether a Ray asks for a token is said
        by the environment of the process that started it, which a server that is older does not share.
        """
        return "forkserver" if self.name == "inline" else "spawn"

    def __call__(self) -> "Runtime":
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return make_runtime(**arguments)

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """If it will be a private Ray, that comes up meanwhile; it is ended with the context if nobody has taken it."""
        if self.name == "inline" or self.address is not None:
            yield
            return
        from fedsim.runtime import ray_prestart

        ray_prestart.prestart(max(os.cpu_count() or 1, self.hosts or 0), self.gpus)
        try:
            yield
        finally:
            ray_prestart.cancel()

    @contextlib.contextmanager
    def shared(self, jobs: int, demands: Sequence[tuple[int, float]]) -> Iterator["Choice"]:
        """What each of `jobs` processes is handed, picklable: all their runtimes are then on one Ray, as equals.

        Without an address that is the Ray this process is connected to, else a private one that ends with the context.

        - `demands`: of each run, the number of participants and the most logical CPUs that one of them asks for.
        """
        each = dataclasses.replace(self, share=jobs, say=silent)
        if self.name == "inline" or self.address is not None:
            yield each
            return
        from fedsim.runtime.placement import most_cpus
        from fedsim.runtime.private_ray import shared_ray

        cores = max(1, (os.cpu_count() or 1) // jobs)
        cpus = jobs * max(most_cpus(number, num_cpus, self.hosts, cores) for number, num_cpus in demands)
        with shared_ray(cpus, self.gpus) as address:
            yield dataclasses.replace(each, address=address)
