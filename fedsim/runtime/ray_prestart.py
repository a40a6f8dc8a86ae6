"""A private Ray that comes up while its process is still importing: of the seconds to the first round, a fourth."""

import logging
import math
import signal
import sys
import threading
from types import FrameType


class RayPrestart:
    """A private Ray, started in a thread of its own.

    The thread lives as long as the process: Ray ties what it starts to the life of the thread that started it.
    """

    def __init__(self, cpus: float, gpus: int | None) -> None:
        self.cpus, self.gpus = cpus, gpus
        self.error: BaseException | None = None
        self.settled = threading.Event()
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        try:
            connect_private(self.cpus, self.gpus)
        except BaseException as error:
            self.error = error  # whoever needs a Ray tries again, and is told
        self.settled.set()
        threading.Event().wait()

    def up(self) -> bool:
        """Wait for it. **Returns:** whether it is there."""
        self.settled.wait()
        return self.error is None


def connect_private(cpus: float, gpus: int | None) -> None:
    """Start a Ray and connect this process to it."""
    import psutil
    import ray  # takes a second or two: here, it is imported beside what the others import

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


_prestarted: RayPrestart | None = None  # until somebody takes it


def prestart(cpus: float, gpus: int | None) -> None:
    """Begin to start a private Ray with these logical CPUs and GPUs (None: those there are)."""
    global _prestarted
    end_in_order()
    _prestarted = RayPrestart(cpus, gpus)


def end_in_order() -> None:
    """Have SIGTERM end this process by way of its `finally` clauses, Ray included; connected, Ray would abort it."""
    if threading.current_thread() is threading.main_thread():  # nobody else may
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(number)


def is_prestarted() -> bool:
    """Whether one was begun that nobody has taken."""
    return _prestarted is not None


def claim() -> RayPrestart | None:
    """The one that was begun; the caller ends it, once it is up."""
    global _prestarted
    taken, _prestarted = _prestarted, None
    return taken


def cancel() -> None:
    """End what was begun, unless somebody took it."""
    left = claim()
    if left is not None and left.up():
        import ray

        ray.shutdown()
