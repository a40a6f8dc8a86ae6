"""A private Ray on this machine, for this process alone or for several."""

import contextlib
from collections.abc import Iterator

import ray

from fedsim.runtime.ray_prestart import claim, connect_private, end_in_order, is_prestarted


def start_private(cpus: float, gpus: int | None) -> None:
    """Start a Ray, or take the one that was begun (`ray_prestart`), and connect this process; `ray.shutdown()` ends it.

    - `cpus`: logical CPUs, at least. - `gpus`: logical GPUs; None: those there are.
    """
    begun = claim()
    there = begun is not None and begun.up()
    does = begun is not None and begun.cpus >= cpus and begun.gpus == gpus
    if there and not does:
        ray.shutdown()
    if not (there and does):
        connect_private(cpus, gpus)
    end_in_order()


@contextlib.contextmanager
def shared_ray(cpus: float, gpus: int | None) -> Iterator[str]:
    """The address of a Ray that processes of this user can join: the one this process is connected to, if it is, else
    a private Ray (`start_private`) that ends with the context."""
    own = is_prestarted() or not ray.is_initialized()
    if own:
        start_private(cpus, gpus)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if own:
            ray.shutdown()
