"""Ends what a process started, when that process ends, however it does. Run as a script: it imports nothing of fedsim.

Ray ties its own processes to the driver, but not their children: agents notice after a minute that they are alone, and
one that is frozen never does. What was started carries a mark in its environment, which children inherit.
"""

import contextlib
import os
import sys
import time

import psutil


MARK = "FEDSIM_MARK"  # the variable
SECONDS = 20.0  # in which a killed process is gone, unless the system holds it


def marked(mark: str) -> list[psutil.Process]:
    """Processes that were started with a mark, and their children."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is another user's
            variables = process.as_dict(["environ"])["environ"] or {}
            if process.pid != os.getpid() and variables.get(MARK) == mark:
                found.append(process)
    return found


def end(mark: str) -> None:
    """Kill them. One that is just being started shows its mark a moment later: none may be found twice in a row."""
    last, none = time.monotonic() + SECONDS, 0
    while none < 2 and time.monotonic() < last:
        processes = marked(mark)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        none = 0 if processes else none + 1
        time.sleep(0.05)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # until whoever holds the other end has closed it, or has ended
    end(sys.argv[1])
