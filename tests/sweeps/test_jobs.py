"""Several runs at once: the numbers of one after another, and whatever ends one run ends no other."""

import io
import shlex
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from rich.console import Console

import fedsim
from benchmarks import suites, sweep
from fedsim.cli import sweep as cli
from fedsim.data.source import cifar10
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.learning.task import TaskConfig
from fedsim.runtime import Choice
from fedsim.runtime.base import Resources
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.placement import Capacity, misfit, most_cpus, part_of
from fedsim.sweeps.progress import Lines, Overview, RunsTable, label_of, labels_of, overview_for
from fedsim.sweeps.runner import run_all
from tests.support.sweeping import (
    Sweep,
    assert_same_tables,
    averaging,
    disturbed,
    growing,
    one_suite,
    rounds_done,
    start_server,
    undisturbed,
    wait_for,
)


SEEDS = (0, 1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with undisturbed runs of `averaging` and `growing` for two seeds, one after another."""
    start_server()
    experiments = [replace(make(), seed=seed) for make in (averaging, growing) for seed in SEEDS]
    return undisturbed(experiments, tmp_path_factory.mktemp("reference"))


def hashes(out: Path, algorithm: str, seed: int = 0) -> list[str]:
    rounds = fedsim.load(out).rounds.sort_values(by=["run_id", "round"])
    return list(rounds.state_sha256[(rounds.algorithm == algorithm) & (rounds.seed == seed)])


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# the same numbers -----------------------------------------------------------------------------------------------------


class Remembered(ProgressListener):
    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.ended = False

    def finished(self, row: dict) -> None:
        self.rounds.append(row["round"])

    def end(self) -> None:
        self.ended = True


class Told:
    """An overview that remembers which run was told what."""

    def begin(self, found: Sequence[tuple[Experiment, str]]) -> None:
        self.found = [status for _, status in found]
        self.runs = {experiment.run_id: Remembered() for experiment, _ in found}

    def of(self, run_id: str) -> Remembered:
        return self.runs[run_id]

    def close(self) -> None:
        self.closed = True


def test_two_jobs_give_the_tables_of_one_and_compute_nothing_twice(reference: Path, tmp_path: Path) -> None:
    experiments = [replace(make(), seed=seed) for make in (averaging, growing) for seed in SEEDS]
    told = Told()
    settings = {"out": tmp_path, "make_runtime": Choice("inline"), "suite": "small", "jobs": 2}
    assert run_all([*experiments, experiments[0]], overview=told, command="typed", **settings) == []
    assert told.found == ["absent"] * 4 and told.closed, "an experiment that is asked for twice is one run"
    assert all(run.ended and run.rounds == [0, 1, 2] for run in told.runs.values())
    assert_same_tables(tmp_path, reference)
    assert set(fedsim.load(tmp_path).runs.command) == {"typed"}

    again = Told()
    assert run_all(experiments, overview=again, **settings) == []
    assert again.found == ["finished"] * 4
    assert not any(run.ended or run.rounds for run in again.runs.values())


# one that breaks ------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_fails_its_run_alone_and_the_printed_command_finishes_it(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, good = disturbed("die", tmp_path / "killed"), growing()
    monkeypatch.setattr(suites, "small", one_suite([killed, good]), raising=False)
    monkeypatch.setattr(cli, "write_report", lambda out, **_: out / "report.html")
    out = tmp_path / "out"
    words = ["--suite", "small", "--runtime", "inline", "--jobs", "2", "--seeds", "0", "1", "--out", str(out)]
    assert sweep.main(words) == 1
    said = capsys.readouterr().out
    (failed,) = {killed.run_id, replace(killed, seed=1).run_id} - set(fedsim.load(out).runs.run_id)
    assert f"run {failed} failed: the process that computed it died (signal 9)" in said
    assert rounds_done(out)[failed] == 0, "cut in round 1, and what was finished before is on disk"
    assert list(fedsim.load(out).runs.status) == ["finished"] * 3

    (line,) = (line for line in said.splitlines() if line.startswith("go on with: "))
    command = shlex.split(line.removeprefix("go on with: "))
    assert command == ["fedsim", "sweep", *words]
    assert sweep.main(command[2:]) == 0
    said = capsys.readouterr().out
    assert said.count("finished before") == 3 and "(resumed at round 1)" in said
    for seed in SEEDS:
        for algorithm in ("fedavg", "fedgrow"):
            assert hashes(out, algorithm, seed) == hashes(reference, algorithm, seed)


def test_a_sweep_of_which_nothing_is_left_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "small", one_suite([disturbed("die", tmp_path / "killed")]), raising=False)
    words = ["--suite", "small", "--runtime", "inline", "--jobs", "2", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert sweep.main(words) == 1
    assert "died (signal 9)" in capsys.readouterr().out


def test_a_participant_that_raises_fails_its_run_alone(reference: Path, tmp_path: Path) -> None:
    broken, good = disturbed("raise", tmp_path), growing()
    out, said = tmp_path / "out", io.StringIO()
    console = Console(file=said, width=300)
    (failure,) = run_all([broken, good], out=out, make_runtime=Choice("inline"), jobs=2, console=console)
    assert failure.run_id == broken.run_id
    assert failure.reason == "participant 1: ZeroDivisionError: a disturbance"
    assert fedsim.load(out).runs.set_index("run_id").status.to_dict() == {
        broken.run_id: "failed",
        good.run_id: "finished",
    }
    assert hashes(out, "fedgrow") == hashes(reference, "fedgrow")
    lines = said.getvalue().splitlines()
    assert f"{label_of(broken)}: Traceback (most recent call last):" in lines
    for experiment, rounds in ((broken, 1), (good, 3)):
        mine = [line for line in lines if line.startswith(f"{label_of(experiment)}: round ")]
        assert len(mine) == rounds, "every line says which run it is of"


def test_a_run_that_cannot_be_begun_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def broken(experiment: Experiment, **fields: object) -> None:
        if experiment.seed == 0:
            raise MemoryError("no room")
        computed.append(experiment.seed)

    monkeypatch.setattr("fedsim.sweeps.runner.run", broken)
    (failure,) = run_all([replace(averaging(), seed=seed) for seed in (0, 1)], out=tmp_path, make_runtime=InlineRuntime)
    assert (failure.run_id, failure.reason) == (averaging().run_id, "MemoryError: no room")
    assert computed == [1]


def test_a_request_that_a_worker_cannot_meet_ends_the_sweep(tmp_path: Path) -> None:
    pictures = replace(averaging(), task=TaskConfig(cifar10(limit=300), patch_size=8))
    with pytest.raises(ValueError, match="cifar10"):
        run_all([pictures], out=tmp_path, make_runtime=Choice("inline"), jobs=2)


def test_a_run_that_a_worker_of_a_killed_sweep_still_writes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.sweeps.attempt.LOCK_SECONDS", 0.1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with FileLock(folder / f".{averaging().run_id}.lock"):
        (failure,) = run_all([averaging()], out=tmp_path, make_runtime=InlineRuntime)
    assert "another process has been writing it for 0.1 s" in failure.reason
    assert rounds_done(tmp_path) == {}


# interrupted ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_and_a_kill_leave_no_worker_and_every_finished_round(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, marks = tmp_path / "out", [tmp_path / name / "happened" for name in ("one", "two")]
    stalling = [disturbed("stall", mark.parent, chunk=chunk) for mark, chunk in zip(marks, (4, 3), strict=True)]
    words = ("--runtime", "inline", "--jobs", "2", "--seeds", "0")
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        for mark in marks:
            mark.unlink(missing_ok=True)
        with Sweep(stalling, out, *words) as swept:
            wait_for(lambda: all(mark.exists() for mark in marks))  # both at once: each waits until it is killed
            workers = swept.workers()
            assert len(workers) == 2
            if number == signal.SIGINT:
                monkeypatch.setattr(suites, "small", one_suite(stalling), raising=False)
                assert sweep.main(swept.words) == 2, "a second sweep is refused"
                assert "another process is writing to this folder" in capsys.readouterr().err
                for worker in workers:  # as a terminal does; they leave it to the process that hands out runs
                    worker.send_signal(signal.SIGINT)
                time.sleep(0.2)
                assert not any(map(gone, workers))
            assert swept.end(number) == status
            wait_for(lambda workers=workers: all(map(gone, workers)))
            assert rounds_done(out) == {experiment.run_id: 0 for experiment in stalling}
    assert "interrupted: every finished round is on disk" in swept.said()
    assert fedsim.load(out).runs.empty, "neither was said to have failed"

    assert run_all(stalling, out=out, make_runtime=InlineRuntime) == []
    rounds = fedsim.load(out).rounds
    assert sorted(Counter(rounds.run_id).values()) == [3, 3]
    assert list(rounds[rounds.run_id == stalling[0].run_id].state_sha256) == hashes(reference, "fedavg")


# on Ray ---------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_two_jobs_share_a_private_ray_and_give_the_numbers_of_inline(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Sweep([averaging()], out, "--hosts", "1", "--jobs", "2", "--seeds", "0", "1") as swept:
        wait_for(lambda: rounds_done(out) or not swept.process.is_alive())
        assert swept.process.is_alive(), swept.said()
        assert len(swept.workers()) == 2
        started = psutil.Process(swept.process.pid).children(recursive=True)
        assert [process.name() for process in started].count("raylet") == 1
        assert swept.wait() == 0, swept.said()
    wait_for(lambda: all(map(gone, started)))
    for seed in SEEDS:
        assert hashes(out, "fedavg", seed) == hashes(reference, "fedavg", seed)


def test_what_does_not_fit_into_a_jobs_part_is_refused_with_both_numbers() -> None:
    machine = Capacity(cpus=6, gpus=[1.0, 1.0, 1.0], memory_mb=8000)
    assert part_of(machine, 1) == machine
    assert part_of(machine, 2) == Capacity(3, [1.0], 4000, share=2)
    assert part_of(machine, 3).gpus == [1.0]
    assert part_of(machine, 4).gpus == part_of(machine, 6).gpus == [0.5], "two jobs on a device"
    assert part_of(Capacity(None, [], 8000), 4) == Capacity(None, [], 2000, share=4)

    half = part_of(machine, 2)
    assert misfit([Resources(3)], half) is None
    assert misfit([Resources(4)], half) == "1 hosts ask for 4 CPUs, but there are 3 for each of 2 jobs"
    assert misfit([Resources(1, memory_mb=5000)], half) is not None
    assert "there are 1 (1 devices) for each of 2 jobs" in (misfit([Resources(1, 2)], half) or "")


@pytest.mark.parametrize(
    "participants, num_cpus, hosts, cores, expected",
    [(6, 0.5, None, 2, 2), (3, 0.5, None, 2, 1.5), (6, 4, None, 2, 4), (6, 0.5, 2, 8, 1), (2, 1, 8, 2, 8)],
)
def test_logical_cpus_of_a_shared_private_ray_cover_every_plan(
    participants: int, num_cpus: float, hosts: int | None, cores: int, expected: float
) -> None:
    assert most_cpus(participants, num_cpus, hosts, cores) == expected


# words and displays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", ["0", "-2"])
def test_fewer_than_one_job_is_refused(jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sweep.main(["--jobs", jobs, "--runtime", "inline", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: --jobs={jobs}: must be at least 1\n"
    assert not (tmp_path / "out").exists()


def test_runtimes_of_several_jobs_must_be_picklable_choices(tmp_path: Path) -> None:
    for jobs, expected in ((0, "jobs=0: must be at least 1"), (2, r"jobs=2: .*fedsim\.runtime\.Choice")):
        with pytest.raises(ValueError, match=expected):
            run_all([averaging()], out=tmp_path, make_runtime=InlineRuntime, jobs=jobs)
    assert not list(tmp_path.iterdir())


def told(overview: Overview, found: list[tuple[Experiment, str]], running: int, failed: int) -> None:
    """The first runs that are not finished run and have done a round; the next ones have failed."""
    overview.begin(found)
    row = {"round": 1, "accuracy_mean": 0.5, "bytes_up_total": 10**6, "bytes_down_total": 10**6, "participants": 3}
    waiting = [experiment for experiment, status in found if status != "finished"]
    for number, experiment in enumerate(waiting[: running + failed]):
        progress = overview.of(experiment.run_id)
        progress.begin(experiment, 1)
        progress.within("train", 2, 3)
        progress.finished(row)
        progress.within("score", 1, 3)
        if number >= running:
            progress.failed("it broke")


def test_a_terminal_shows_one_row_a_run(tmp_path: Path) -> None:
    found = [(replace(averaging(), seed=seed), "finished" if seed == 0 else "absent") for seed in range(5)]
    screen, page = io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=24)
    overview = overview_for(console)
    assert isinstance(overview, RunsTable)
    told(overview, found, running=1, failed=1)
    overview.close()
    Console(file=page, width=120).print(overview.table())
    lines = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert "fedavg, seed 0 finished before" in lines
    assert f"fedavg, seed 1 running {6 * '━'} 1/2 50.0 % 2.00 0:00 score 1/3" in lines
    assert "fedavg, seed 2 failed 1/2 50.0 % 2.00" in lines
    assert "fedavg, seed 3 waiting" in lines
    assert lines[-1] == "1 running, 2 waiting, 1 finished before, 1 failed"
    assert "fedavg, seed 2: it broke" in screen.getvalue()


def test_more_runs_than_the_terminal_has_lines_are_counted() -> None:
    found = [(replace(averaging(), seed=seed), "finished" if seed < 20 else "absent") for seed in range(60)]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=12)
    overview = RunsTable(console)
    told(overview, found, running=3, failed=10)
    overview.close()
    shown = overview.shown(6)
    assert [row.status for row in shown] == ["running"] * 3 + ["failed"] * 3
    assert shown == [row for row in overview.rows.values() if row in shown], "in order"
    assert overview.table().row_count == 12 - 6


def test_other_outputs_get_lines_that_say_which_run_they_are_of() -> None:
    page = io.StringIO()
    overview = overview_for(Console(file=page, width=60))
    assert isinstance(overview, Lines)
    alike = [averaging(rounds) for rounds in (2, 3)]
    labels = labels_of([*alike, growing()])
    assert len(set(labels.values())) == 3 and labels[growing().run_id] == label_of(growing())
    told(overview, [(alike[0], "absent"), (alike[1], "finished")], running=0, failed=1)
    overview.close()
    assert page.getvalue().splitlines() == [
        f"{labels[alike[1].run_id]}: finished before, run {alike[1].run_id}",
        f"{labels[alike[0].run_id]}: 2 rounds (resumed at round 1)",
        f"{labels[alike[0].run_id]}: round 1/2: 3 participants, accuracy 50.0 %, 2.00 MB sent, 0:00 left",
        f"{labels[alike[0].run_id]}: it broke",
    ]
