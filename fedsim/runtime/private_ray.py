"""A private Ray on this machine, for this process alone or for several.

It can come up while its process is still importing: of the seconds to the first round, a fourth. Ray itself is
imported where it is used, beside what the others import.
"""

import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Prestart:
    """A private Ray that is begun in a thread of its own, for whoever claims it first.

    The thread lives as long as the process: Ray ties what it starts to the life of the thread that started it.

    - `cpus`, `gpus`: logical CPUs and GPUs; None: those there are.
    """

    def __init__(self, cpus: float, gpus: int | None) -> None:
        self.cpus, self.gpus, self.claimed = cpus, gpus, False
        self.error: BaseException | None = None
        self.settled = threading.Event()
        end_in_order()
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        try:
            connect_private(self.cpus, self.gpus)
        except BaseException as error:
            self.error = error  # whoever needs a Ray tries again, and is told
        self.settled.set()
        threading.Event().wait()

    def claim(self) -> bool:
        """Take it over, once it is up. **Returns:** whether there is one, that nobody else has claimed."""
        if self.claimed:
            return False
        self.claimed = True
        self.settled.wait()
        return self.error is None

    def cancel(self) -> None:
        """End it, unless somebody has claimed it."""
        if self.claim():
            import ray

            ray.shutdown()


def connect_private(cpus: float, gpus: int | None) -> None:
    """Start a Ray and connect this process to it."""
    import psutil
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=max(1, math.ceil(cpus)),
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _memory=psutil.virtual_memory().total,  # as placement counts it; by itself Ray takes a part of what is free
    )


def is_for_us(begun: Prestart | None) -> bool:
    """Whether a private Ray is what a process without an address gets: it is connected to none, or to its own."""
    import ray

    return (begun is not None and not begun.claimed) or not ray.is_initialized()


def start_private(cpus: float, gpus: int | None, begun: Prestart | None = None) -> None:
    """Start a Ray, or take the one that was begun, and connect this process; `ray.shutdown()` ends it.

    - `cpus`: logical CPUs, at least. - `gpus`: logical GPUs; None: those there are.
    """
    import ray

    if begun is not None and begun.claim():
        if begun.cpus >= cpus and begun.gpus == gpus:
            return
        ray.shutdown()
    connect_private(cpus, gpus)
    end_in_order()


@contextlib.contextmanager
def shared_ray(cpus: float, gpus: int | None, begun: Prestart | None = None) -> Iterator[str]:
    """The address of a Ray that processes of this user can join: the one this process is connected to, if it is, else
    a private Ray (`start_private`) that ends with the context."""
    import ray

    own = is_for_us(begun)
    if own:
        start_private(cpus, gpus, begun)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if own:
            ray.shutdown()


def end_in_order() -> None:
    """Have SIGTERM end this process by way of its `finally` clauses, Ray included; connected, Ray would abort it."""
    if threading.current_thread() is threading.main_thread():  # nobody else may
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(number)
