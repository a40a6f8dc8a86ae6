"""Whatever dies, the run goes on, or resumes, with the bits of an undisturbed run."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import ray

import fedsim
from fedsim.runner import run_all
from fedsim.runtime.base import Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.ray_runtime import ATTEMPTS, RayRuntime
from tests.disturbed import Disturbed, small, without_federation


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_hosts():
    """A runtime that outlives its runs, as in a sweep: what one test kills must be whole again for the next."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    runtime = RayRuntime(hosts=2)
    yield runtime
    runtime.close()
    ray.shutdown()


class Kept(Runtime):
    """Lends a runtime to `run_all`, which closes what it is given."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def start(self, *args) -> None:
        self.runtime.start(*args)

    def ask(self, method, *args, watch=None):
        return self.runtime.ask(method, *args, watch=watch)

    def close(self) -> None:
        """The fixture closes it."""


def lend(runtime):
    return lambda: Kept(runtime)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """name -> hashes of an inline run, for experiments with and without private state that changes."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_all([small(), without_federation()], out=out, make_runtime=InlineRuntime) == []
    rounds = fedsim.load(out).rounds
    return {name: list(part.sort_values("round").state_sha256) for name, part in rounds.groupby("algorithm")}


def disturbed(experiment, event, folder, **where):
    return replace(experiment, algorithm=Disturbed(experiment.algorithm, event, str(folder), **where))


def hashes(out) -> list[str]:
    return list(fedsim.load(out).rounds.sort_values("round").state_sha256)


@pytest.mark.parametrize("make", [small, without_federation])
def test_host_killed_in_a_round(two_hosts, undisturbed, tmp_path, make):
    experiment = disturbed(make(), "die", tmp_path)
    failures = run_all([experiment], out=tmp_path / "out", make_runtime=lend(two_hosts))
    assert failures == [] and (tmp_path / "happened").exists()
    assert hashes(tmp_path / "out") == undisturbed[experiment.algorithm.name]
    rounds = fedsim.load(tmp_path / "out").rounds.set_index("round")
    assert rounds.retries[2] > 0 and rounds.retries[1] == rounds.retries[3] == 0
    clients = fedsim.load(tmp_path / "out").clients
    assert clients[(clients["round"] == 2) & (clients.client == 1)].retries.item() > 0


@pytest.mark.parametrize("make", [small, without_federation])
def test_aggregator_killed_in_a_round(two_hosts, undisturbed, tmp_path, make):
    experiment = disturbed(make(), "die_server", tmp_path)
    failures = run_all([experiment], out=tmp_path / "out", make_runtime=lend(two_hosts))
    assert failures == [] and (tmp_path / "happened").exists()
    assert hashes(tmp_path / "out") == undisturbed[experiment.algorithm.name]


def test_host_that_keeps_dying_ends_the_run_and_loses_nothing(two_hosts, undisturbed, tmp_path):
    experiment = disturbed(small(), "die_always", tmp_path)
    (failure,) = run_all([experiment], out=tmp_path / "out", make_runtime=lend(two_hosts))
    assert f"died {ATTEMPTS} times" in failure.reason and "participants" in failure.reason
    results = fedsim.load(tmp_path / "out")
    assert results.runs.status.tolist() == ["failed"] and f"died {ATTEMPTS} times" in results.runs.error[0]
    assert hashes(tmp_path / "out") == undisturbed["fedgrow"][:2], "rounds 0 and 1 were finished"


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_that_raises_is_named(two_hosts, tmp_path, where):
    experiment = disturbed(small(), "raise", tmp_path)
    make_runtime = InlineRuntime if where == "inline" else lend(two_hosts)
    (failure,) = run_all([experiment], out=tmp_path, make_runtime=make_runtime)
    assert failure.reason == "participant 1: ZeroDivisionError: a disturbance"
    assert len(hashes(tmp_path)) == 2


def test_participant_that_raises_can_be_dropped_with_the_same_bits_everywhere(two_hosts, tmp_path):
    experiment = replace(disturbed(small(), "raise", tmp_path), on_error="drop")
    for name, make_runtime in {"inline": InlineRuntime, "ray": lend(two_hosts)}.items():
        assert run_all([experiment], out=tmp_path / name, make_runtime=make_runtime) == []
    assert hashes(tmp_path / "inline") == hashes(tmp_path / "ray")
    assert fedsim.load(tmp_path / "ray").rounds.failed.tolist() == [0, 0, 1, 0]


def started(folder, out, *words) -> tuple[list[str], subprocess.Popen]:
    """`fedsim run` of an experiment that stalls in round 2, brought to where it stalls."""
    folder.mkdir(exist_ok=True)
    (folder / "happened").unlink(missing_ok=True)
    command = [sys.executable, "-m", "fedsim", "run", "tests.disturbed:stalling", "--out", str(out)]
    command += ["--set", f"algorithm.folder={folder}", *words]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (folder / "happened").exists() or driver.poll() is not None)
    return command, driver


def test_driver_killed_in_a_round_and_resumed(undisturbed, tmp_path):
    out = tmp_path / "out"
    command, driver = started(tmp_path / "marks", out, "--runtime", "inline")
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert hashes(out) == undisturbed["fedgrow"][:2]

    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed at round 2" in resumed.stdout
    assert hashes(out) == undisturbed["fedgrow"]


def test_driver_on_ray_interrupted_then_killed_then_resumed(undisturbed, tmp_path):
    out, marks = tmp_path / "out", tmp_path / "marks"
    _, driver = started(marks, out, "--hosts", "2")
    begun = time.monotonic()
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, output
    assert time.monotonic() - begun < 15, "5 seconds are promised on an idle machine"
    assert hashes(out) == undisturbed["fedgrow"][:2]

    command, driver = started(marks, out, "--hosts", "2", "--resume")
    actors = [process for process in psutil.Process(driver.pid).children(recursive=True) if is_actor(process)]
    assert len(actors) == 3, "two hosts and the server"
    driver.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in actors))
    driver.communicate()
    assert hashes(out) == undisturbed["fedgrow"][:2]

    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed at round 2" in resumed.stdout
    assert hashes(out) == undisturbed["fedgrow"]


def is_actor(process: psutil.Process) -> bool:
    """A host or the server, by the name Ray gives its process."""
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith(("ray::Host", "ray::Server"))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)
