"""Runs the processes of `overhead.py` and watches them from outside: their memory, what they say, what they found.

From outside, because a thread of a process itself would wait whenever that process holds Python's lock, and miss the
moments that matter. It is the same watch for this project's processes and for Flower's.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from fedsim.core.fields import refuse
from fedsim.results.machine import versions


ROOT = Path(__file__).resolve().parent.parent
EVERY_SECONDS = 0.02  # between two samples of memory
LOOKED_FOR_SECONDS = 0.25  # between looks at who there is: a look costs more than a sample
ENDS_WITHIN_SECONDS = 30
LAST_LINES = 15
MEGABYTE = 1e6
AGGREGATOR = {"aggregator": "ray::Server"}  # the title that Ray gives to the aggregator's process
FLOWER = "1.41.0"

Environment = Mapping[str, str | None]  # variables to set, or, where None, to unset


class Sample(NamedTuple):
    """Bytes of one process. `at`: `time.monotonic()`, the same clock in all processes of a machine.

    - `anonymous`: what it holds for itself, no files; a page that forked processes share counts as a part in each. -
      `uss`: pages nobody else has mapped: those of libraries and of Ray's object store among them, unless another
      process uses them at that moment. - `rss`: all pages it has mapped; those of the object store count in every
      process that touched them.
    """

    at: float
    anonymous: int
    uss: int
    rss: int


MEASURES = Sample._fields[1:]


@dataclass(frozen=True)
class Bench:
    """Where measuring is done. `flower`: the Python that has Flower; None: it is left out. `say`: told what begins."""

    folder: Path
    flower: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def ours(self, about: str, *words: str, memory: bool = False) -> dict[str, Any]:
        """What a process of `overhead_ours` found; with `memory`, `samples` as well."""
        command = [sys.executable, "-m", "benchmarks.overhead_ours", *words, "--out", str(self.folder / "out")]
        return self._found(f"{about}: fedsim", command, memory, AGGREGATOR)

    def beside(self, about: str, *words: str, memory: bool = False) -> dict[str, Any] | None:
        """What a process of `overhead_flower` found; None where Flower is left out."""
        if self.flower is None:
            return None
        command = [str(self.flower), "-m", "benchmarks.overhead_flower", *words]
        return self._found(f"{about}: Flower", command, memory, {})

    def bare(self, about: str, *words: str) -> dict[str, Any]:
        """What a process of `overhead_bare` found."""
        command = [sys.executable, "-m", "benchmarks.overhead_bare", *words]
        return self._found(f"{about}: bare PyTorch", command, False, {})

    def first(self, function: str) -> list[float]:
        """Seconds from `fedsim run` to the lines that say that round 0, and round 1, are finished."""
        self.say(f"first: fedsim run {function}")
        out = self.folder / "out"
        words = [f"benchmarks.overhead_cases:{function}", "--hosts", "2", "--out", str(out)]
        try:
            command = [sys.executable, "-m", "fedsim", "run", *words]
            return heard(command, self.environment, ["round 0/", "round 1/"])
        finally:
            shutil.rmtree(out, ignore_errors=True)

    @property
    def environment(self) -> Environment:
        """Nobody's cluster is joined, nobody is told, and nothing is left in the home folder."""
        return {"RAY_ADDRESS": None, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(self.folder / "flwr")}

    def _found(self, about: str, command: list[str], memory: bool, roles: Mapping[str, str]) -> dict[str, Any]:
        self.say(about)
        answer, started = self.folder / "answer.json", time.monotonic()
        try:
            samples = finished(
                [*command, "--json", str(answer)], self.folder / "log", self.environment, roles if memory else None
            )
            return json.loads(answer.read_text()) | {"started": started, "samples": samples}
        finally:
            answer.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "out", ignore_errors=True)


def finished(
    command: Sequence[str], log: Path, environment: Environment, roles: Mapping[str, str] | None = None
) -> dict[str, list[Sample]]:
    """Run a command to its end and sample its memory, if it is asked for.

    **Arguments:**

    - `log`: where its output goes.
    - `roles`: names of descendants to sample, and what their titles begin with; the process itself is the "driver".
      None: nobody is sampled.

    **Returns:** samples of each role. **Raises:** `ChildProcessError`, with its last words, if it failed, or somebody
    with a role was not seen.
    """
    series: dict[str, list[Sample]] = {} if roles is None else {role: [] for role in ("driver", *roles)}
    with log.open("wb") as output, started(command, environment, output) as process:
        if roles is not None:
            _sample(process, roles, series)
        process.wait()
    said = log.read_text(errors="replace")
    if process.returncode:
        raise failed(command, process.returncode, said)
    for role in [role for role, samples in series.items() if not samples]:
        raise failed(command, 0, f"{said}\nno {role} was seen: no process below it had such a title")
    return series


def heard(command: Sequence[str], environment: Environment, words: Sequence[str]) -> list[float]:
    """Run a command to its end; seconds until it first said each of the words.

    **Raises:** `ChildProcessError` if it failed, or never said one.
    """
    begun, at, said = time.monotonic(), dict.fromkeys(words, 0.0), ""
    with started(command, environment, subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said += line.decode(errors="replace")
            at |= {word: time.monotonic() - begun for word in words if not at[word] and word in said}
        process.wait()
    if process.returncode or not all(at.values()):
        raise failed(command, process.returncode, said)
    return [at[word] for word in words]


def failed(command: Sequence[str], status: int, said: str) -> ChildProcessError:
    """The error that says which command it was and what it said last."""
    last = "\n".join(said.splitlines()[-LAST_LINES:])
    return ChildProcessError(f"{' '.join(command)}: ended with status {status}:\n{last}")


@contextlib.contextmanager
def started(command: Sequence[str], environment: Environment, output: IO[bytes] | int) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the context: interrupted, so that it ends its Ray, and killed if it stays."""
    unset = [word for name, value in environment.items() if value is None for word in ("-u", name)]
    variables = [f"{name}={value}" for name, value in environment.items() if value is not None]
    words = ["env", *unset, *variables, *command]  # "env" leaves the other variables as they are
    with subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(ENDS_WITHIN_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


# memory ---------------------------------------------------------------------------------------------------------------


def _sample(process: subprocess.Popen, roles: Mapping[str, str], series: dict[str, list[Sample]]) -> None:
    """Sample a process, and those of its descendants who have a role, until it ends."""
    found, looked = {"driver": psutil.Process(process.pid)}, 0.0
    while process.poll() is None:
        now = time.monotonic()
        if now - looked > LOOKED_FOR_SECONDS:
            missing = {role: title for role, title in roles.items() if role not in found}
            found |= _descendants(found["driver"], missing) if missing else {}
            looked = time.monotonic()
        for role, each in found.items():
            with contextlib.suppress(psutil.Error, OSError, KeyError):  # it is about to begin, or has just ended
                series[role].append(_sampled(each))
        time.sleep(max(0.0, EVERY_SECONDS - (time.monotonic() - now)))


def _descendants(process: psutil.Process, titles: Mapping[str, str]) -> dict[str, psutil.Process]:
    found: dict[str, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        for each in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(each.cmdline())
                found |= {role: each for role, begins in titles.items() if title.startswith(begins)}
    return found


def _sampled(process: psutil.Process) -> Sample:
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}
    uss = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return Sample(time.monotonic(), sizes["Pss_Anon"], uss, sizes["Rss"])


def imports_mb(modules: Sequence[str]) -> dict[str, float]:
    """MB of a fresh process that has only imported some modules, by each measure."""
    command = [sys.executable, "-c", f"import {', '.join(modules)}; print('ready', flush=True); input()"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        said = process.stdout.readline().decode()
        if said.strip() != "ready":
            raise failed(command, process.wait(), said)
        sample = _sampled(psutil.Process(process.pid))
        process.stdin.write(b"\n")
    return peak_mb([sample])


def peak_mb(series: Sequence[Sample]) -> dict[str, float]:
    """MB that a process held at most, by each measure."""
    return {name: max(getattr(sample, name) for sample in series) / MEGABYTE for name in MEASURES}


def grown_mb(series: Sequence[Sample], since: float) -> dict[str, float]:
    """MB by which a process grew, by each measure: its peak from a moment on, less what it held right before."""
    before = [sample for sample in series if sample.at < since]
    after = [sample for sample in series if sample.at >= since]
    if not before or not after:
        raise ChildProcessError(f"a process was seen {len(before)} times before the first round, {len(after)} after")
    highest = peak_mb(after)
    return {name: highest[name] - getattr(before[-1], name) / MEGABYTE for name in MEASURES}


# Flower's environment -------------------------------------------------------------------------------------------------


def flower_python(folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has Flower and the same torch and transformers as this one; made if need be.

    **Raises:** `ValueError` for a folder that holds something else; `ChildProcessError` if pip cannot install it.
    """
    python = folder.absolute() / "bin" / "python"  # not resolved: the link is what makes it the environment's
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        refuse("--flower-env", str(folder), "a virtual environment, or a folder that is not there yet")
    wanted = {"flwr": FLOWER, **{name: plain(versions()[name]) for name in ("torch", "transformers")}}
    if not python.exists():
        say(f"making {folder}")
        called([sys.executable, "-m", "venv", str(folder)])
    if installed(python, list(wanted)) != wanted:
        say(f"installing flwr {FLOWER} into {folder}")
        named = [f"{name}{'[simulation]' if name == 'flwr' else ''}=={version}" for name, version in wanted.items()]
        called([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *named])
    return python


def installed(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Versions, without their local part, of those packages that an environment has."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({name: there[name] for name in sys.argv[1:] if name in there}))"
    )
    return {name: plain(version) for name, version in json.loads(called([str(python), "-c", program, *names])).items()}


def plain(version: str) -> str:
    """`2.13.0+cpu` -> `2.13.0`."""
    return version.partition("+")[0]


def called(command: Sequence[str]) -> str:
    """What a command says. **Raises:** `ChildProcessError` if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise failed(command, ended.returncode, ended.stdout + ended.stderr)
    return ended.stdout
