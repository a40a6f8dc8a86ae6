"""Whatever dies, the run goes on, or resumes, with the bits of an undisturbed run."""

import io
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

import fedsim
from fedsim.cli import main
from fedsim.experiment import with_settings
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.ray_runtime import ATTEMPTS
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import Disturbed, small, stalling, without_federation


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(reference):
    """name -> hashes of an inline run, for experiments with and without private state that changes."""
    rounds = fedsim.load(reference).rounds
    return {name: list(part.sort_values("round").state_sha256) for name, part in rounds.groupby("algorithm")}


def disturbed(experiment, event, folder, **where):
    return replace(experiment, algorithm=Disturbed(experiment.algorithm, event, str(folder), **where))


def hashes(out) -> list[str]:
    return list(fedsim.load(out).rounds.sort_values("round").state_sha256)


@pytest.mark.parametrize("make", [small, without_federation])
def test_host_killed_in_a_round(two_hosts, undisturbed, tmp_path, make):
    experiment = disturbed(make(), "die", tmp_path)
    failures = run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts)
    assert failures == [] and (tmp_path / "happened").exists()
    assert hashes(tmp_path / "out") == undisturbed[experiment.algorithm.name]
    rounds = fedsim.load(tmp_path / "out").rounds.set_index("round")
    assert rounds.retries[2] > 0 and rounds.retries[1] == rounds.retries[3] == 0
    clients = fedsim.load(tmp_path / "out").clients
    assert clients[(clients["round"] == 2) & (clients.client == 1)].retries.item() > 0


@pytest.mark.parametrize("make", [small, without_federation])
def test_aggregator_killed_in_a_round(two_hosts, undisturbed, tmp_path, make):
    experiment = disturbed(make(), "die_server", tmp_path)
    failures = run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts)
    assert failures == [] and (tmp_path / "happened").exists()
    assert hashes(tmp_path / "out") == undisturbed[experiment.algorithm.name]
    assert fedsim.load(tmp_path / "out").rounds.retries.tolist() == [0, 0, 1, 0]


def test_host_that_keeps_dying_ends_the_run_and_loses_nothing(two_hosts, undisturbed, tmp_path):
    experiment = disturbed(small(), "die_always", tmp_path)
    (failure,) = run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts)
    assert f"died {ATTEMPTS} times" in failure.reason and "participants" in failure.reason
    results = fedsim.load(tmp_path / "out")
    assert results.runs.status.tolist() == ["failed"] and f"died {ATTEMPTS} times" in results.runs.error[0]
    assert hashes(tmp_path / "out") == undisturbed["fedgrow"][:2], "rounds 0 and 1 were finished"


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_that_raises_is_named(two_hosts, tmp_path, where):
    experiment = disturbed(small(), "raise", tmp_path)
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    (failure,) = run_all([experiment], out=tmp_path, make_runtime=make_runtime)
    assert failure.reason == "participant 1: ZeroDivisionError: a disturbance"
    assert len(hashes(tmp_path)) == 2


def test_participant_that_raises_can_be_dropped_with_the_same_bits_everywhere(two_hosts, tmp_path):
    experiment = replace(disturbed(small(), "raise", tmp_path), on_error="drop")
    for name, make_runtime in {"inline": InlineRuntime, "ray": two_hosts}.items():
        assert run_all([experiment], out=tmp_path / name, make_runtime=make_runtime) == []
    assert hashes(tmp_path / "inline") == hashes(tmp_path / "ray")
    assert fedsim.load(tmp_path / "ray").rounds.failed.tolist() == [0, 0, 1, 0]


class Driver:
    """A process with `fedsim run` of an experiment that stalls in round 2, and its results folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.out, self.folder = folder / "out", folder
        self.words = [
            "run",
            "tests.support.disturbed:stalling",
            "--out",
            str(self.out),
            "--set",
            f"algorithm.folder={folder}",
        ]
        self.start(*words)

    def start(self, *words: str) -> None:
        (self.folder / "happened").unlink(missing_ok=True)
        command = [sys.executable, "-m", "fedsim", *self.words, *words]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # what a shell runs in the background ignores Ctrl-C, and hands that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_until_it_stalls(self) -> None:
        wait_for(lambda: (self.folder / "happened").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()[0]

    def end(self, number: signal.Signals) -> str:
        """Send a signal and wait for the end. Returns what was printed."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=300)[0]


@pytest.fixture(scope="module", autouse=True)
def drivers(tmp_path_factory):
    """Where -> a driver. They come up, and wait where they stall, while the other tests of this module run."""
    words = {"inline": ["--runtime", "inline"], "ray": ["--hosts", "2"]}
    drivers = {where: Driver(tmp_path_factory.mktemp(where), *words[where]) for where in words}
    yield drivers
    for driver in drivers.values():
        if driver.process.poll() is None:
            driver.end(signal.SIGINT)


def test_driver_killed_in_a_round_and_resumed(drivers, undisturbed, capsys):
    driver = drivers["inline"]
    driver.wait_until_it_stalls()
    driver.end(signal.SIGKILL)
    assert hashes(driver.out) == undisturbed["fedgrow"][:2]

    words = [*driver.words, "--runtime", "inline"]
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert hashes(driver.out) == undisturbed["fedgrow"][:2]
    assert main([*words, "--resume"]) == 0
    assert "resumed at round 2" in capsys.readouterr().out
    assert hashes(driver.out) == undisturbed["fedgrow"]


def test_driver_on_ray_killed_then_resumed_and_interrupted_then_resumed(drivers, undisturbed, two_hosts):
    driver = drivers["ray"]
    driver.wait_until_it_stalls()
    actors = [process for process in psutil.Process(driver.process.pid).children(recursive=True) if is_actor(process)]
    assert len(actors) == 3, "two hosts and the server"
    driver.end(signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in actors))
    assert hashes(driver.out) == undisturbed["fedgrow"][:2]

    driver.start("--hosts", "1", "--resume")
    driver.wait_until_it_stalls()
    output = driver.end(signal.SIGINT)
    assert driver.process.returncode == 130, output
    assert "resumed at round 2" in output
    assert hashes(driver.out) == undisturbed["fedgrow"][:2]

    experiment = with_settings(stalling(), [f"algorithm.folder={driver.folder}"])
    said = io.StringIO()
    console = Console(file=said, width=200)
    assert run_all([experiment], out=driver.out, make_runtime=two_hosts, console=console) == []
    assert "resumed at round 2" in said.getvalue()
    assert hashes(driver.out) == undisturbed["fedgrow"]


def is_actor(process: psutil.Process) -> bool:
    """A host or the server, by the name Ray gives its process."""
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith(("ray::Host", "ray::Server"))


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)
