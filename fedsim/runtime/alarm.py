"""A limit on what is computed in this process."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


AGAIN_SECONDS = 1.0  # what is computed may have swallowed the first one


@contextlib.contextmanager
def alarm(seconds: float | None, text: str) -> Iterator[None]:
    """Raise a `TimeoutError` of this text in what is done here, once it has taken so long.

    Python lets signals raise in the main thread alone: another thread has no limit of its own.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(text)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
