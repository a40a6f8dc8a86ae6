"""What this process may have of the machine: memory, and the limits that are set on it."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from fedsim.core.fields import refuse


CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# What is limited: how that is set, in what unit it is said, with how much a Ray cannot start, and with how much it can.
SET_ON_PROCESSES = {
    "RLIMIT_AS": ("memory that a process may address (ulimit -v)", 2**20, " MB", 2900 * 2**20, 64 * 2**30),
    "RLIMIT_NPROC": ("processes and threads (ulimit -u)", 1, "", 256, 4096),
    "RLIMIT_NOFILE": ("open files (ulimit -n)", 1, "", 96, 1024),
}
CONTAINER = ("memory of this container (cgroup)", 2**20, " MB", 2**30, 4 * 2**30)


def memory_bytes(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes of memory there are for this process: the machine's, or what its container may have of them."""
    return min([psutil.virtual_memory().total, *_container(cgroups, own)])


def memory_free(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Of these, what nobody uses."""
    container = _container(cgroups, own, used=True)
    return min([psutil.virtual_memory().available, *container])


def check_memory(field: str, value: object, size: int) -> None:
    """**Raises:** `ValueError` naming a field if what its value asks for takes more bytes than there are."""
    if size > (memory := memory_bytes()):
        refuse(field, value, f"smaller: this takes {size / 1e9:.1f} GB of memory, and there are {memory / 1e9:.1f}")


def address_space() -> int | None:
    """Bytes that a process may address; None: as many as it likes."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def limits(cgroups: Path = CGROUPS, own: Path = OWN) -> tuple[list[str], list[str]]:
    """The limits, in words, with which a Ray cannot start, and those with which it may not."""
    hard, tight = list[str](), list[str]()
    for (what, unit, word, least, ample), found in _found(cgroups, own):
        if found < ample:
            (hard if found < least else tight).append(f"{what}: {found / unit:,.0f}{word}")
    return hard, tight


def _found(cgroups: Path, own: Path) -> Iterator[tuple[tuple[str, int, str, int, int], int]]:
    for name, words in SET_ON_PROCESSES.items():
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            yield words, soft
    for memory in _container(cgroups, own):
        yield CONTAINER, memory


def _container(cgroups: Path, own: Path, used: bool = False) -> list[int]:
    """What the control groups around this process may have of memory, one number for each that has a limit.

    - `used`: less what they use already.
    """
    found = []
    for names, folder in _groups(cgroups, own):
        limit, usage = (_number(folder / name) for name in names)
        if limit is not None and limit < psutil.virtual_memory().total:  # "no limit" is a large number in version 1
            found.append(max(0, limit - (usage or 0)) if used else limit)
    return found


def _groups(cgroups: Path, own: Path) -> list[tuple[tuple[str, str], Path]]:
    """Names of a limit and of what is used, and the folder, for each control group that this process is in."""
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        below = [part for part in path.split("/") if part not in ("", "..")]  # in a container it is seen as the root
        found += [(names, root.joinpath(*below[:depth])) for depth in range(len(below) + 1)]
    return found


def _number(file: Path) -> int | None:
    """What a file of the kernel's says; None: there is none, or no limit (`max`)."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
