"""A sweep that is killed again and again gives the tables of one that never was, and computes no run twice."""

import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import fedsim
from fedsim.sweeps.progress import label_of
from tests.support.sweeping import Sweep, assert_same_tables, averaging, growing, rounds_done, start_server, undisturbed


KILLS = 10
SEEDS = (0, 1)
ROUNDS = 20


def files_of(out: Path, run_id: str) -> dict[Path, tuple[int, int]]:
    """What a run left: file -> which file it is, and when it was written."""
    tables = [out / table / f"{run_id}.parquet" for table in ("runs", "rounds", "clients")]
    paths = [*tables, *(out / "checkpoints" / run_id).rglob("*.*")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def finished_in(out: Path) -> set[str]:
    return {path.stem for path in (out / "runs").glob("[!.]*.parquet")}


def all_rounds(out: Path) -> int:
    return sum(round + 1 for round in rounds_done(out).values())


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_table_and_repeat_no_run(tmp_path: Path) -> None:
    draw, out = random.Random(19), tmp_path / "out"
    bases = [averaging(ROUNDS), replace(growing(), rounds=ROUNDS)]
    experiments = [replace(base, seed=seed) for seed in SEEDS for base in bases]
    start_server()
    reference = undisturbed(experiments, tmp_path / "reference")
    words = ("--runtime", "inline", "--jobs", "2", "--seeds", *map(str, SEEDS))

    left: dict[str, dict[Path, tuple[int, int]]] = {}  # of every run that was finished when a sweep was killed
    found = Counter()  # what kills met
    for rounds in sorted(draw.sample(range(3 * (ROUNDS + 1)), KILLS)):  # of four runs, two are always left
        before = all_rounds(out)
        with Sweep(bases, out, *words) as swept:
            while all_rounds(out) < max(rounds, before + 1):  # its workers are there, however fast the last ones were
                assert swept.process.is_alive(), swept.said()
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.05))
            workers = swept.workers()
            assert swept.end(signal.SIGKILL) == -signal.SIGKILL, "it had not come to its end"
            if draw.random() < 0.5:  # a machine that stops takes everything with it
                kill(workers)
        found["workers"] += len(workers) == 2
        wait_until_gone(workers)
        done, finished = rounds_done(out), finished_in(out)
        found["cut runs"] += any(0 <= round < ROUNDS for run_id, round in done.items() if run_id not in finished)
        found["finished and cut runs"] += bool(finished) and bool(set(done) - finished)
        for run_id, files in left.items():
            assert files_of(out, run_id) == files, "a finished run was written to"
        left |= {run_id: files_of(out, run_id) for run_id in finished}

    with Sweep(bases, out, *words) as swept:
        assert swept.wait() == 0, swept.said()
    for run_id, files in left.items():
        assert files_of(out, run_id) == files, "a finished run was written to"
    assert_same_tables(out, reference)
    assert len(fedsim.load(out).runs) == len(experiments) and (out / "report.html").exists()
    assert left and found["finished and cut runs"] and found["cut runs"] >= KILLS // 2 <= found["workers"], found
    said = swept.said().splitlines()  # by all of these sweeps
    for experiment in experiments:
        last = f"{label_of(experiment)}: round {ROUNDS}/{ROUNDS}: "
        assert sum(line.startswith(last) for line in said) <= 1, "computed to the end twice"


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
