"""One process at a time writes to a results folder.

On a disk the system sees to it. An object store cannot be asked to, so there the holder says that it is alive: an
object that it writes anew every few seconds. Who wants to write watches it for longer, and takes over what is silent.
"""

import contextlib
import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from fedsim.storage.place import Place, Remote


BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # without a beat, and the holder is taken for dead
SETTLE_SECONDS = 1.0  # between writing a claim and believing it: of two who write at once, the later one holds


Lock = tuple[int, int] | None  # which file is the lock of a folder on disk; None: it has none, or is no such folder


class LockLost(OSError):
    """A results folder is not this process's any more: somebody has taken it over, or moved or deleted it."""


@contextlib.contextmanager
def locked(directory: Place, say: Callable[[str], None] = lambda text: None) -> Iterator[Place]:
    """Hold a results folder: one process at a time writes to it.

    - `say`: told if it takes time to find out whether somebody else holds it.

    **Yields:** the folder, of which `check_held` can tell whether this process holds it still.

    **Raises:** `ValueError` if another process holds it, or it cannot be written to.
    """
    if isinstance(directory, Remote):
        with _beating(directory, say) as heart:
            yield dataclasses.replace(directory, holder=heart)
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
        yield directory
    finally:
        lock.release()


def lock_of(directory: Place) -> Lock:
    """What `check_held` compares with. - `directory`: as `locked` yields it."""
    if isinstance(directory, Remote):
        return None
    try:
        found = os.stat(directory / ".lock")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino  # no other file's as long as whoever holds the lock keeps it open


def check_held(directory: Place, lock: Lock = None) -> None:
    """- `directory`: as `locked` yields it. - `lock`: of a folder on disk, as it was when this process began to write.

    **Raises:** `LockLost` if somebody has taken the folder over from this process, moved it or deleted it.
    """
    heart = directory.holder if isinstance(directory, Remote) else None
    if heart is not None and not heart.still_ours():
        raise LockLost(f"{directory}: another process has taken this folder over; this one was silent for too long")
    if lock_of(directory) != lock:
        raise LockLost(f"{directory}: was moved or deleted while this process wrote to it: nothing more is written")


class LockHeartbeat:
    """Writes the object that says that this process holds a folder, again and again."""

    def __init__(self, lock: Remote) -> None:
        self.lock, self.own = lock, f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
        self.beats, self.last = 0, _now()
        self.lost, self.stopped = threading.Event(), threading.Event()

    def __reduce__(self) -> tuple:
        return type(None), ()  # a process that is handed the folder holds nothing: whoever handed it looks after it

    def beat(self) -> None:
        self.beats += 1
        self.lock.write_bytes(f"{self.own} {self.beats}".encode())
        self.last = _now()

    def still_ours(self) -> bool:
        """Looks only if this process, or the store, has been silent for so long that somebody may have taken over."""
        if not self.lost.is_set() and _now() - self.last > SILENT_SECONDS / 2 and not self.is_ours():
            self.lost.set()
        return not self.lost.is_set()

    def is_ours(self) -> bool:
        return (_content(self.lock) or "").startswith(self.own)

    def run(self) -> None:
        """Until stopped. A store that cannot be reached is tried again."""
        while not self.stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if not self.is_ours():
                    self.lost.set()
                    return
                self.beat()


@contextlib.contextmanager
def _beating(directory: Remote, say: Callable[[str], None]) -> Iterator[LockHeartbeat]:
    heart = LockHeartbeat(directory / ".lock")
    try:
        _wait_for_silence(heart.lock, directory, say)
        heart.beat()
        time.sleep(SETTLE_SECONDS)
        ours = heart.is_ours()
    except OSError as error:
        raise ValueError(f"--out={str(directory)!r}: not a folder that can be written to ({error})") from error
    if not ours:
        raise _refused(directory)
    thread = threading.Thread(target=heart.run, daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        heart.stopped.set()
        thread.join()
        with contextlib.suppress(OSError):  # it falls silent by itself
            if not heart.lost.is_set() and heart.is_ours():
                heart.lock.unlink(missing_ok=True)


def _wait_for_silence(lock: Remote, directory: Remote, say: Callable[[str], None]) -> None:
    """**Raises:** `ValueError` if whoever wrote the object writes it again."""
    before, end = _content(lock), time.monotonic() + SILENT_SECONDS
    if before is not None:
        holder = " ".join(before.split()[:3])
        say(f"{directory} is held by {holder}; waiting {SILENT_SECONDS:g} s to see whether that has ended")
    while before is not None and time.monotonic() < end:
        time.sleep(0.25)
        now = _content(lock)
        if now is None:
            return
        if now != before:
            raise _refused(directory)


def _now() -> float:
    """Seconds, those in which the machine slept included where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _refused(directory: Remote) -> ValueError:
    return ValueError(f"--out={str(directory)!r}: another process is writing to this folder")


def _content(lock: Remote) -> str | None:
    try:
        return lock.read_text()
    except FileNotFoundError:
        return None
