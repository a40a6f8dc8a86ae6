"""How a request is answered, and what is wrong with that."""

import contextlib
import io
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import psutil
import pytest

from fedsim.cli import main
from fedsim.core.text import printable
from fedsim.learning.meter import StepCost
from fedsim.runtime import Choice
from tests.fuzz.requests import Request


SECONDS = 10.0  # of computing: other processes may use this machine
SHOWN = 100  # characters of a name that a message has at least
LONGEST = 4000  # characters of a message
MEMORY = 6 * 2**30  # what a request may take more than there is


@dataclass(frozen=True)
class Answer:
    """`status`: None where the request took too long. `started`: it was accepted, and stopped before it computed."""

    status: int | None
    said: str
    seconds: float
    started: bool = False


class Started(BaseException):
    """A request is accepted: what follows would compute."""


class TooLong(BaseException):
    """A request takes too long."""


def _start(*_: Any, **__: Any) -> NoReturn:
    raise Started


@contextlib.contextmanager
def before_anything_starts() -> Iterator[None]:
    """Requests that are accepted end where they would begin to compute, to start Ray or to reach a cluster."""
    with pytest.MonkeyPatch.context() as patched:
        for seam in ("commands.run_all", "sweep.run_all", "sweep.print_plan"):
            patched.setattr(f"fedsim.cli.{seam}", _start)
        patched.setattr("fedsim.cluster.submit.submission.send", _start)
        patched.setattr(Choice, "__call__", _start)
        patched.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (0, 0))))
        yield


def answer(request: Request) -> Answer:
    """The answer of this process."""
    heard, began, started = io.StringIO(), time.process_time(), False
    status: int | None = None

    def late(*_: Any) -> NoReturn:
        raise TooLong

    before = signal.signal(signal.SIGPROF, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        try:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, limits[1]))
            status = main(list(request.words))
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except Started:
            status, started = 0, True
        except TooLong:
            traceback.print_exc(limit=-4)
        except BaseException:
            status = 1
            traceback.print_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return Answer(status, heard.getvalue(), time.process_time() - began, started)


def answer_of_process(request: Request) -> Answer:
    """The answer of a process of its own, as a shell starts it; one that is accepted is stopped after a while."""
    began = time.monotonic()
    words = [word.encode("utf-8", "surrogateescape") for word in request.words]
    command: list[str | bytes] = [sys.executable, "-m", "fedsim", *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=12 * SECONDS)
    except subprocess.TimeoutExpired as slow:
        return Answer(None, (slow.stdout or b"").decode(errors="replace"), time.monotonic() - began)
    said = (done.stdout + done.stderr).decode(errors="replace")
    return Answer(done.returncode, said, time.monotonic() - began)


def fault(request: Request, given: Answer) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if given.status is None:
        return "too long"
    if "Traceback" in given.said:
        return "traceback"
    if given.status not in (0, 1, 2):
        return f"exit status {given.status}"
    if given.status and not given.said.strip():
        return "no reason"
    if len(given.said) > LONGEST and given.status:
        return "a long message"
    if given.status == 2 and not any(printable(name)[:SHOWN] in given.said for name in request.names):
        return "the field is not named"
    return None
