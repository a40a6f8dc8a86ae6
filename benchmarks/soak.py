"""Runs while processes are killed: `python benchmarks/soak.py [--minutes 15] [--every 5] [--hosts 2] [--json FILE]`.

Two Fed-Grow runs, one that federates and one whose private state changes in every round, take turns on one private Ray
for so many minutes, while a thread kills one of our processes every few seconds: a host mostly, sometimes the
aggregator, never this one. Every finished run must have the hashes of an inline run, round by round; in the end no
process may be left. A run that ends because a host died too often at the same participants is resumed. Exit status 1
if hashes differ, a run failed for any other reason, or a process was left.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

import fedsim  # noqa: E402
from benchmarks.options import check_json, check_numbers  # noqa: E402
from benchmarks.suites import tiny  # noqa: E402
from fedgrow_algo.fedgrow import FedGrow  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import WHOLE  # noqa: E402
from fedsim.experiment import Experiment  # noqa: E402
from fedsim.runtime import Choice  # noqa: E402
from fedsim.simulation import RunFailed, run  # noqa: E402
from fedsim.sweeps.progress import label_of  # noqa: E402


HOST, SERVER = "ray::Host", "ray::Server"  # what Ray calls our processes
AGGREGATOR_SHARE = 0.15  # of the kills
SAMPLE_SECONDS = 2.0
LEAVING_SECONDS = 30.0  # in which processes must be gone at the end
RESUMED = 20  # times one run may be resumed
WARM_UP = 0.2  # share of the samples before anything is said of memory


def experiments() -> list[Experiment]:
    """`tiny` for twelve participants and ten rounds of a second or two; with federation, and without."""
    base = dataclasses.replace(tiny(), participants=12, rounds=10)
    assert isinstance(base.algorithm, FedGrow)
    alone = dataclasses.replace(base.algorithm, federate=False)
    return [base, dataclasses.replace(base, algorithm=alone)]


def kill_times(seed: int, every: float) -> Iterator[tuple[float, str, float]]:
    """Without end: seconds to wait, whom to kill (`HOST` or `SERVER`), and which of several, as a number below 1."""
    draw = random.Random(seed)
    while True:
        wait, server, which = draw.expovariate(1 / every), draw.random() < AGGREGATOR_SHARE, draw.random()
        yield wait, SERVER if server else HOST, which


@dataclasses.dataclass
class Tally:
    """What happened, but for samples.

    - `worn_out`: runs that ended, as they should, when a process died too often at the same place; they were resumed.
    - `failed`: reasons of the others that did not finish. - `left`: processes that outlived the runtime.
    """

    minutes: float = 0.0
    runs: int = 0
    equal: int = 0
    rounds: int = 0
    retries: int = 0
    worn_out: int = 0
    kills: dict[str, int] = dataclasses.field(default_factory=lambda: {HOST: 0, SERVER: 0})
    failed: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)

    def passed(self) -> bool:
        return self.equal == self.runs > 0 and not self.failed and not self.left


def is_worn_out(reason: str) -> bool:
    """Whether a run ended because a host, or the aggregator, died as often as it may."""
    return re.search(r"(host|aggregator) died \d+ times", reason) is not None


# processes ------------------------------------------------------------------------------------------------------------


def ours(name: str = "") -> list[psutil.Process]:
    """Processes that this one has started, directly or not, the oldest first; those of a name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            if words and words[0].startswith(name):
                found.append((process.create_time(), process.pid, process))
        except psutil.Error:
            continue  # it has just ended
    return [process for _, _, process in sorted(found, key=lambda each: each[:2])]


class Killer(threading.Thread):
    """Kills, as `kill_times` says, until it is told to end."""

    def __init__(self, seed: int, every: float, tally: Tally) -> None:
        super().__init__(daemon=True)
        self.times, self.tally, self.over = kill_times(seed, every), tally, threading.Event()

    def run(self) -> None:
        for wait, name, which in self.times:
            if self.over.wait(wait):
                return
            met = ours(name)
            if met:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    met[int(which * len(met))].kill()
                    self.tally.kills[name] += 1

    def end(self) -> None:
        self.over.set()
        self.join()


class Watcher(threading.Thread):
    """Notes memory, processes, files and the results folder every `SAMPLE_SECONDS`."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.over = out, threading.Event()
        self.samples: list[dict[str, float]] = []
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.started = time.monotonic()

    def run(self) -> None:
        while not self.over.wait(SAMPLE_SECONDS):
            self.samples.append(self.sample())

    def end(self) -> None:
        self.over.set()
        self.join()

    def sample(self) -> dict[str, float]:
        here, all_of_them = psutil.Process(), ours()
        self.seen |= {(process.pid, process.create_time()): process for process in all_of_them}
        return {
            "seconds": time.monotonic() - self.started,
            "driver_mb": uss_mb([here]),
            "server_mb": uss_mb(ours(SERVER)),
            "hosts_mb": uss_mb(ours(HOST)),
            "processes": len(all_of_them),
            "open_files": here.num_fds(),
            "results_mb": size_mb(self.out),
        }

    def still_there(self) -> list[str]:
        """Processes seen in any sample that do not end."""
        _, alive = psutil.wait_procs([*self.seen.values()], timeout=LEAVING_SECONDS)
        return [f"{process.pid} {process.name()}" for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def uss_mb(processes: Sequence[psutil.Process]) -> float:
    """Memory that nobody shares with these processes, in MB."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue  # it has just ended
    return total / 1e6


def size_mb(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # replaced meanwhile
    return total / 1e6


def memory(samples: Sequence[Mapping[str, float]], of: str = "driver_mb") -> dict[str, float | None]:
    """Median MB of the first and of the last third of the samples after the warm-up, and growth in MB a minute."""
    settled = samples[int(len(samples) * WARM_UP) :]
    third = len(settled) // 3
    if not third:
        return {"first_mb": None, "last_mb": None, "mb_a_minute": None}
    first, last = (statistics.median(each[of] for each in part) for part in (settled[:third], settled[-third:]))
    starts = [statistics.median(each["seconds"] for each in part) for part in (settled[:third], settled[-third:])]
    minutes = (starts[1] - starts[0]) / 60
    return {"first_mb": first, "last_mb": last, "mb_a_minute": (last - first) / minutes}


# runs -----------------------------------------------------------------------------------------------------------------


def hashes(out: Path, run_id: str) -> list[str]:
    rounds = fedsim.load(out).rounds.sort_values("round")
    return list(rounds.state_sha256[rounds.run_id == run_id])


def undisturbed(folder: Path) -> dict[str, list[str]]:
    """Run -> hashes, computed inline."""
    runtime = Choice("inline")()
    try:
        run_ids = [run(experiment, runtime=runtime, out=folder) for experiment in experiments()]
        return {run_id: hashes(folder, run_id) for run_id in run_ids}
    finally:
        runtime.close()


def soak(minutes: float, every: float, hosts: int, seed: int, folder: Path, console: Console) -> tuple[Tally, Watcher]:
    """Kill and compare for so many minutes; the run that is then under way is finished in peace."""
    tally, out = Tally(), folder / "out"
    out.mkdir()
    expected = undisturbed(folder / "inline")
    runtime = Choice("ray", hosts=hosts)()
    killer, watcher = Killer(seed, every, tally), Watcher(out)
    started = time.monotonic()
    watcher.start()
    killer.start()
    try:
        quiet = threading.Timer(minutes * 60, killer.over.set)
        quiet.daemon = True
        quiet.start()
        turns = collections.deque(experiments())
        while not killer.over.is_set():
            one(turns[0], runtime, out, expected, tally, console)
            turns.rotate(-1)
    finally:
        killer.end()
        tally.minutes = (time.monotonic() - started) / 60
        watcher.end()
        watcher.sample()  # meets those that came up last
        runtime.close()
        tally.left = watcher.still_there()
    return tally, watcher


def one(
    experiment: Experiment, runtime: Any, out: Path, expected: Mapping[str, list[str]], tally: Tally, console: Console
) -> None:
    """One run, resumed as often as it wears out, and compared."""
    run_id, resumed, before = experiment.run_id, 0, dict(tally.kills)
    while True:
        try:
            run(experiment, runtime=runtime, out=out, resume=resumed > 0)
            break
        except RunFailed as failure:
            if not is_worn_out(failure.reason) or resumed == RESUMED:
                tally.failed.append(failure.reason)
                console.print(str(failure), highlight=False, markup=False, soft_wrap=True)
                return
            tally.worn_out += 1
            resumed += 1
    rounds = fedsim.load(out).rounds
    mine = rounds[rounds.run_id == run_id]
    equal = hashes(out, run_id) == expected[run_id]
    tally.runs, tally.equal = tally.runs + 1, tally.equal + equal
    tally.rounds, tally.retries = tally.rounds + len(mine), tally.retries + int(mine.retries.sum())
    kills = sum(tally.kills.values()) - sum(before.values())
    said = f"{kills} kills, {int(mine.retries.sum())} retries, resumed {resumed} times"
    console.print(f"{label_of(experiment)}: {said}, hashes {'equal' if equal else 'DIFFER'}", highlight=False)


def summary(tally: Tally, samples: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What the table says, line by line."""
    grown = memory(samples)
    marks = {of: max((each[of] for each in samples), default=0) for of in ("processes", "open_files", "results_mb")}
    told = "too few samples"
    if grown["mb_a_minute"] is not None:
        told = f"{grown['first_mb']:.0f} MB, {grown['last_mb']:.0f} MB: {grown['mb_a_minute']:+.2f} MB a minute"
    return {
        "minutes": f"{tally.minutes:.1f}",
        "runs, rounds": f"{tally.runs}, {tally.rounds}",
        "kills of hosts, of the aggregator": f"{tally.kills[HOST]}, {tally.kills[SERVER]}",
        "retries": f"{tally.retries}",
        "runs worn out and resumed": f"{tally.worn_out}",
        "runs failed": "; ".join(tally.failed) or "0",
        "hashes equal": f"{tally.equal} of {tally.runs}",
        "driver's memory, first and last third": told,
        "most processes, open files of the driver": f"{marks['processes']:.0f}, {marks['open_files']:.0f}",
        "results folder at most": f"{marks['results_mb']:.1f} MB",
        "processes left": "; ".join(tally.left) or "0",
        "verdict": "passed" if tally.passed() else "FAILED",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="mean time between kills")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--json", metavar="FILE", help="also write totals and samples")
    chosen, console = parser.parse_args(arguments), Console()
    return exit_status(lambda: measured(chosen, console), console)


def measured(chosen: argparse.Namespace, console: Console) -> int:
    check_numbers(chosen, "minutes", "every", least=0.01)
    check_numbers(chosen, "hosts", least=1, most=1000)
    check_numbers(chosen, "seed", least=0, most=WHOLE)
    check_json(chosen)
    with tempfile.TemporaryDirectory(prefix="fedsim-soak-") as folder:
        tally, watcher = soak(chosen.minutes, chosen.every, chosen.hosts, chosen.seed, Path(folder), console)
    table = Table(show_header=False)
    for name, told in summary(tally, watcher.samples).items():
        table.add_row(name, told)
    console.print(table)
    if chosen.json:
        totals = dataclasses.asdict(tally) | {"passed": tally.passed(), "driver": memory(watcher.samples)}
        chosen.json.write_text(json.dumps(totals | {"samples": watcher.samples}, indent=2))
    return 0 if tally.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
