"""Ctrl-C, told apart from a `KeyboardInterrupt` that code raises."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from fedsim.runtime.base import Interrupt


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
