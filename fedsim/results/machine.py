"""What a machine is, found out without importing torch: to compare the nodes of a cluster, and to write down."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from fedsim.core import environment, limits, numerics
from fedsim.core.canonical import PACKAGES, ROOT
from fedsim.storage.place import place, write_atomically


REPORTED = ("fedsim", "torch", "ray", "transformers", "datasets", "numpy", "pandas", "pyarrow", "scikit-learn")
ANSWER_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Gpu:
    """`bytes`, `free`: of its memory."""

    name: str
    bytes: int
    free: int
    driver: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one machine, seen by a process on it. Sizes in bytes.

    - `lacking`: what portable numerics need and its processor has not.
    - `code_sha256`: of the packages' sources. - `disk_free`: where temporary files go; `disk`: the name of that place.
    - `open_files`, `processes`: how many this user may have; -1: no limit.
    - `clock`: seconds since 1970. - `storage`: None, or why the results folder cannot be used from there.
    - `unasked`: what a request without a token to the cluster's job server gives: an HTTP status; None: no answer.
    """

    host: str
    versions: dict[str, str]
    code_sha256: str
    cpu: str
    lacking: tuple[str, ...]
    cores: int
    memory: int
    memory_free: int
    gpus: tuple[Gpu, ...]
    shared_memory: int
    disk: str
    disk_free: int
    open_files: int
    processes: int
    clock: float
    storage: str | None = None
    unasked: int | None = None


def facts(out: str | None = None, secret: str = "", job_server: str | None = None) -> Facts:
    """Look around.

    - `out`: a results folder in which a file `check.<secret>` lies: it is read, and one is written beside it.
    - `job_server`: HOST:PORT to ask without a token.
    """
    disk = environment.temporary_folder()
    return Facts(
        host=socket.gethostname(),
        versions=versions(),
        code_sha256=source_sha256(),
        cpu=cpu_model(),
        lacking=tuple(numerics.lacking()),
        cores=os.cpu_count() or 1,
        memory=limits.memory_bytes(),
        memory_free=limits.memory_free(),
        gpus=gpus(),
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        disk=disk,
        disk_free=shutil.disk_usage(disk).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        processes=resource.getrlimit(resource.RLIMIT_NPROC)[0],
        clock=time.time(),
        storage=None if out is None else tried(out, secret),
        unasked=None if job_server is None else status_without_token(job_server),
    )


def tried(out: str, secret: str) -> str | None:
    """Read what was put into a results folder, and write beside it. **Returns:** what went wrong; None if nothing."""
    try:
        folder = place(out)
        if not (folder / f"check.{secret}").exists():
            return "what was written there by the driver is not seen"
        write_atomically(folder / f"check.{secret}.{socket.gethostname()}", b"")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def status_without_token(server: str) -> int | None:
    """HTTP status of a list of jobs that is asked for without a token; None if nothing answers."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{server}/api/jobs/", timeout=ANSWER_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in REPORTED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def sources() -> set[Path]:
    """The files that numbers depend on."""
    return {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def sha256_of(files: set[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: os.path.relpath(path, ROOT)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def source_sha256() -> str:
    """Hash of the packages' sources, as they lie on this machine."""
    return sha256_of(sources())


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs, as their driver's own tool lists them; none where it is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    return tuple(Gpu(name, int(total) * 2**20, int(free) * 2**20, driver) for name, total, free, driver in rows)


class Different(RuntimeError):
    """This machine is not like the driver's: what it would compute could have other bits, without a word."""


@dataclasses.dataclass(frozen=True)
class SameEnvironment:
    """What the machine of a participant must have in common with the driver's; checked where participants are made.

    - `folder`: a folder of the run, that the driver makes. A machine that does not see it would lose private states.
    - `fingerprint`: of the bits that portable numerics give; None: native ones, or not known.
    - `driver`: host and process.
    """

    versions: tuple[tuple[str, str], ...]
    code_sha256: str
    folder: str
    fingerprint: str | None
    driver: tuple[str, int]

    @classmethod
    def here(cls, folder: str, fingerprint: str | None) -> "SameEnvironment":
        driver = (socket.gethostname(), os.getpid())
        return cls(tuple(versions().items()), source_sha256(), folder, fingerprint, driver)

    @functools.cache  # noqa: B019 one a run, and asked of for every participant
    def check(self) -> None:
        """**Raises:** `Different`."""
        if self.driver == (socket.gethostname(), os.getpid()):
            return
        for name, wanted in self.versions:
            if versions()[name] != wanted:
                raise Different(f"{socket.gethostname()} has {name} {versions()[name]}, the driver {wanted}")
        if source_sha256() != self.code_sha256:
            raise Different(f"{socket.gethostname()} has other sources of fedsim than the driver")
        if self.fingerprint is not None and (found := numerics.fingerprint()) != self.fingerprint:
            raise Different(
                f"{socket.gethostname()} ({cpu_model()}) gives other bits under portable numerics than the driver: "
                f"{found}, not {self.fingerprint}"
            )
        if not os.path.isdir(self.folder) and "://" not in self.folder:
            raise Different(
                f"{socket.gethostname()} does not see {self.folder}: --out must be on storage that all nodes share"
            )
