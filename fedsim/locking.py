"""One process at a time writes to a results folder.

On a disk the system sees to it. An object store cannot be asked to, so there the holder says that it is alive: an
object that it writes anew every few seconds. Who wants to write watches it for longer, and takes over what is silent.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from filelock import FileLock, Timeout

from fedsim.storage import Place, Remote


BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # without a beat, and the holder is taken for dead
SETTLE_SECONDS = 1.0  # between writing a claim and believing it: of two who write at once, the later one holds


class LockLost(OSError):
    """Somebody else has taken a results folder over: this process was silent for too long."""


@contextlib.contextmanager
def locked(directory: Place) -> Iterator[None]:
    """Hold a results folder: one process at a time writes to it.

    **Raises:** `ValueError` if another process holds it, or it cannot be written to.
    """
    if isinstance(directory, Remote):
        with _beating(directory):
            yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--out={str(directory)!r}: another process is writing to this folder") from None
    except OSError as error:
        raise ValueError(f"--out={str(directory)!r}: not a folder that can be written to ({error})") from error
    try:
        yield
    finally:
        lock.release()


_held: dict[str, "Heart"] = {}  # results folders in object stores that this process holds


def check_held(directory: Place) -> None:
    """**Raises:** `LockLost` if this process held a folder in an object store and somebody has taken it over."""
    heart = _held.get(str(directory))
    if heart is not None and heart.lost.is_set():
        raise LockLost(f"{directory}: another process has taken this folder over; this one was silent for too long")


class Heart:
    """Writes the object that says that this process holds a folder, again and again."""

    def __init__(self, lock: Remote) -> None:
        self.lock, self.own = lock, f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
        self.beats = 0
        self.lost, self.stopped = threading.Event(), threading.Event()

    def beat(self) -> None:
        self.beats += 1
        self.lock.write_bytes(f"{self.own} {self.beats}".encode())

    def is_ours(self) -> bool:
        return (_content(self.lock) or "").startswith(self.own)

    def run(self) -> None:
        """Until stopped. A store that cannot be reached is tried again: nobody else can take the folder meanwhile."""
        while not self.stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if not self.is_ours():
                    self.lost.set()
                    return
                self.beat()


@contextlib.contextmanager
def _beating(directory: Remote) -> Iterator[None]:
    heart = Heart(directory / ".lock")
    try:
        _wait_for_silence(heart.lock, directory)
        heart.beat()
        time.sleep(SETTLE_SECONDS)
        ours = heart.is_ours()
    except OSError as error:
        raise ValueError(f"--out={str(directory)!r}: not a folder that can be written to ({error})") from error
    if not ours:
        raise _refused(directory)
    thread = threading.Thread(target=heart.run, daemon=True)
    thread.start()
    _held[str(directory)] = heart
    try:
        yield
    finally:
        del _held[str(directory)]
        heart.stopped.set()
        thread.join()
        with contextlib.suppress(OSError):  # it falls silent by itself
            if not heart.lost.is_set() and heart.is_ours():
                heart.lock.unlink(missing_ok=True)


def _wait_for_silence(lock: Remote, directory: Remote) -> None:
    """**Raises:** `ValueError` if whoever wrote the object writes it again."""
    before, end = _content(lock), time.monotonic() + SILENT_SECONDS
    while before is not None and time.monotonic() < end:
        time.sleep(0.25)
        now = _content(lock)
        if now is None:
            return
        if now != before:
            raise _refused(directory)


def _refused(directory: Remote) -> ValueError:
    return ValueError(f"--out={str(directory)!r}: another process is writing to this folder")


def _content(lock: Remote) -> str | None:
    try:
        return lock.read_text()
    except FileNotFoundError:
        return None
