"""A private Ray on this machine, for this process alone or for several.

It can come up while its process is still importing: of the seconds to the first round, a fourth. Ray itself is
imported where it is used, beside what the others import.
"""

import atexit
import contextlib
import functools
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import psutil

from fedsim.core import environment, interrupts
from fedsim.core.limits import address_space, limits, memory_bytes
from fedsim.runtime import forks, keeper
from fedsim.runtime.ray_token import keep_token


def silent(text: str) -> None:
    """Says nothing."""


TIGHT_SECONDS = 50.0  # in which a Ray, and its hosts, come up where a limit may keep them from it
START_SECONDS = 300.0  # and elsewhere
END_SECONDS = 5.0  # in which a Ray ends


RAISE = "raise the limit, or use runtime='inline'"


def not_started(what: str, tight: Sequence[str]) -> str:
    """What is said of what did not come up, with the limits that this process found."""
    if not tight:
        return f"runtime='ray': {what} has not started within {START_SECONDS:g} s"
    return (
        f"runtime='ray': {what} has not started within {TIGHT_SECONDS:g} s, and this process is limited: "
        f"{'; '.join(tight)}: {RAISE}"
    )


class Prestart:
    """A private Ray that is begun in a thread of its own, for whoever claims it first.

    The thread lives as long as the process: Ray ties what it starts to the life of the thread that started it.

    - `cpus`, `gpus`: logical CPUs and GPUs; None: those there are. - `say`: of `keep_token`.

    **Raises:** `ValueError` where a limit on this process leaves no room for one, or its token is another user's.
    """

    def __init__(self, cpus: float, gpus: int | None, say: Callable[[str], None] = silent) -> None:
        self.cpus, self.gpus, self.claimed = cpus, gpus, False
        self.error: BaseException | None = None
        if hard := limits()[0]:
            raise ValueError(f"runtime='ray': cannot start here, for {'; '.join(hard)}: {RAISE}")
        keep_token(say)
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
        """Take it over, once it is up. **Returns:** whether there is one, that nobody else has claimed.

        **Raises:** `ValueError` if it does not come up.
        """
        if self.claimed:
            return False
        self.claimed = True
        _, tight = limits()
        if not self.settled.wait(TIGHT_SECONDS if tight else START_SECONDS):
            raise ValueError(not_started("Ray", tight))
        return self.error is None

    def cancel(self) -> None:
        """End it, unless somebody has claimed it."""
        if self.claim():
            end_private()


KEPT = {"SPT_NOENV": "1"}  # or Ray's agents write their name over their environment, and the mark in it
_keepers: list[subprocess.Popen[bytes]] = []  # of the private Ray that this process is connected to, if it is
_raylets: list[psutil.Process] = []  # likewise


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started here listens on 127.0.0.1 alone, so that nobody elsewhere may join; one that is joined here
    is looked for there. By itself Ray takes this machine's address in the network for 127.0.0.1."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A Ray that is started here is for one machine and nobody looks at it: it starts no dashboard, and nothing that
    scales, exports metrics or gathers logs; and its workers are forked (`forks`)."""
    from ray._private import node, parameter, utils

    def no_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    settings: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False, "setup_worker_path": forks.__file__}
    changes: list[tuple[Any, str, Any]] = [
        (parameter, "RayParams", functools.partial(parameter.RayParams, **settings)),
        (node.Node, "start_api_server", no_server),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("is not asked for")),
    ]
    changes = [(where, name, value) for where, name, value in changes if hasattr(where, name)]  # of this version
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def connect_private(cpus: float, gpus: int | None) -> None:
    """Start a Ray, for this machine alone, and connect this process to it."""
    import ray
    from ray._private import ray_constants, worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    mark, limit, room = uuid.uuid4().hex, environment.liveness_seconds(), address_space()
    command = [sys.executable, "-P", keeper.__file__, mark]
    _keepers.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    before = environment.variables([keeper.MARK, forks.NAME, *KEPT])
    environment.set_variables({keeper.MARK: mark, forks.NAME: mark, **KEPT})
    _keepers.insert(0, forks.start(mark))  # so that its end is waited for when the keeper has seen to it
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True  # of this process: SIGTERM ends it in order
    worker.print_to_stdstream = lambda *_, **__: None  # what its processes complain of, each for itself
    try:
        with on_loopback(), alone():
            ray.init(
                address="local",
                num_cpus=max(1, math.ceil(cpus)),
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=room and max(room // 8, 80 * 2**20),  # every process maps it as a whole
                _memory=memory_bytes(),  # as placement counts it; by itself Ray takes a part of what is free
                _temp_dir=os.path.join(environment.temporary_folder(), "ray"),
                _system_config={  # a raylet that does not answer is dead after as long as any other process
                    "health_check_period_ms": round(limit / 12 * 1000),
                    "health_check_timeout_ms": round(limit / 6 * 1000),
                    "health_check_failure_threshold": 4,
                    "prestart_worker_first_driver": False,
                },
            )
        _raylets.extend(child for child in psutil.Process().children() if child.name() == "raylet")
    except BaseException:
        _end_all()
        raise
    finally:
        environment.set_variables(before)


def end_private() -> None:
    """Disconnect this process from its private Ray, and end that, to the last process."""
    import ray

    timer = threading.Timer(END_SECONDS, _end_all)  # one may be frozen, and Ray waits for all of them
    timer.daemon = True
    timer.start()
    ray.shutdown()
    timer.cancel()
    _end_all()


def abandon() -> None:
    """Ask nothing more of the Ray that this process is connected to, not even to let go: its raylet is lost, and Ray
    would wait for it, or end this process. What is left of it ends with this process."""
    import ray

    atexit.unregister(ray.shutdown)
    interrupts.abandon()


def raylet_died() -> bool:
    """Whether the raylet of this process's private Ray has ended. That it is frozen, Ray finds out (`lost_here`)."""
    return any(not raylet.is_running() or raylet.status() == "zombie" for raylet in _raylets)


def _end_all() -> None:
    """Have the keeper end what is left, and wait until it has."""
    _raylets.clear()
    forks.forget()
    while _keepers:
        _keepers.pop().communicate()


def is_for_us(begun: Prestart | None) -> bool:
    """Whether a private Ray is what a process without an address gets: it is connected to none, or to its own."""
    import ray

    return (begun is not None and not begun.claimed) or not ray.is_initialized()


def start_private(
    cpus: float, gpus: int | None, begun: Prestart | None = None, say: Callable[[str], None] = silent
) -> None:
    """Start a Ray, or take the one that was begun, and connect this process; `end_private` ends it.

    - `cpus`: logical CPUs, at least. - `gpus`: logical GPUs; None: those there are.
    - `say`: told what was done about Ray's token (`keep_token`).
    """
    fits = begun is not None and begun.cpus >= cpus and begun.gpus == gpus
    if begun is None or not begun.claim():
        begun, fits = Prestart(cpus, gpus, say), True
        if not begun.claim():
            assert begun.error is not None
            raise begun.error
    if not fits:
        end_private()
        return start_private(cpus, gpus, None, say)
    end_in_order()  # Ray has taken the signal


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
            end_private()


def end_in_order() -> None:
    """Have SIGTERM end this process by way of its `finally` clauses, Ray included; connected, Ray would abort it."""
    if threading.current_thread() is not threading.main_thread():  # nobody else may
        return
    if interrupts.installed():
        interrupts.renew()
    else:
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(number)
