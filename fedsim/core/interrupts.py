"""Ctrl-C, and a request to end (SIGTERM): once is enough, more change nothing, and the end is near.

For a process that is a command from its first line on. It is imported before all else, and imports nothing slow.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # a display that is under way has hidden it
SECONDS = 2.5  # in which what is under way lets go of what it holds; then the process ends as it is

_received: list[int] = []  # the first signal; more are not looked at
_installed: list[bool] = []
_abandoned: list[bool] = []
_in_order: list[bool] = []  # whether something is under way that lets go of what it holds
_saying = threading.Lock()


class Interrupt(KeyboardInterrupt):
    """The user's Ctrl-C, and not something that a participant's method raised."""


def install() -> None:
    """From now on the first signal ends this process, with one line."""
    _installed.append(True)
    renew()


def installed() -> bool:
    return bool(_installed)


def renew() -> None:
    """Take the signals again, which a library has taken."""
    sys.unraisablehook = _unraisable
    for number in SIGNALS:
        signal.signal(number, _note)


def give_back() -> None:
    """Leave signals to what is done next: it has an end of its own."""
    if _installed:
        _installed.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """What is done here is interrupted by an `Interrupt`, and ends within `SECONDS`; elsewhere nothing is held
    that would have to be let go of."""
    _in_order.append(True)
    try:
        yield
    except BaseException:  # whatever a library made of the interrupt
        if _received:
            leave()
        raise
    finally:
        _in_order.pop()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A `KeyboardInterrupt` that a signal raises here is an `Interrupt`: participants' code may raise others."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # no signal raises anything in this thread
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except KeyboardInterrupt:
            raise Interrupt from None

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def abandon() -> None:
    """What this process holds cannot be let go of any more, as it does not answer: `finish` is the end."""
    _abandoned.append(True)


def finish(status: int) -> int:
    """The end of a command, at once if something was abandoned."""
    if _abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        return
    _received.append(number)
    if not _in_order:
        leave()
    threading.Thread(target=_cut, daemon=True).start()
    if not _within_torch(frame):
        raise Interrupt


def _within_torch(frame: FrameType | None) -> bool:
    """Whether torch is under way, which may be calling back from where an error would abort the process."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


def _cut() -> NoReturn:
    time.sleep(SECONDS)
    leave()


def leave() -> NoReturn:
    """End this process, and say so."""
    with _saying:  # never let go of: one line
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(1, f"{SHOW_CURSOR if os.isatty(1) else ''}{said()}\n".encode())
        os._exit(128 + _received[0])


def said() -> str:
    """The line: what was interrupted, and with what it goes on."""
    words = sys.argv[1:]
    name = os.path.basename(sys.argv[0])
    command = ["fedsim"] if name in ("fedsim", "__main__.py") else ["python", sys.argv[0]]
    if command == ["fedsim"] and words[:1] not in (["run"], ["sweep"]):
        return "interrupted"
    more = ["--resume"] if words[:1] == ["run"] and "--resume" not in words else []
    return f"interrupted: every finished round is on disk; go on with: {shlex.join([*command, *words, *more])}"


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
    """Where Python cannot raise, in a destructor, it would drop the interrupt and go on."""
    if _received and isinstance(what.exc_value, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(what)
