"""Whatever is lost while a run is under way, it goes on, or says why not, with the bits of an undisturbed run."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import fedsim
from fedsim.algorithm import Algorithm, ClientUpdate, weighted_mean
from fedsim.experiment import Experiment
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import Disturbed, Lent, marks, small


pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed(reference: Path) -> list[str]:
    """Hashes of an inline run of `small`."""
    return hashes(reference, "fedgrow")


def disturbed(event: str, folder: Path, on_error: Any = "stop", **where: Any) -> Experiment:
    experiment = small()
    algorithm = Disturbed(experiment.algorithm, event, str(folder), **where)
    return replace(experiment, algorithm=algorithm, on_error=on_error)


def hashes(out: Path, algorithm: str | None = None) -> list[str]:
    rounds = fedsim.load(out).rounds.sort_values("round")
    return list(rounds.state_sha256[rounds.algorithm == algorithm] if algorithm else rounds.state_sha256)


def met(folder: Path, times: int = 1) -> list[tuple[str, str]]:
    """Process ids and names of those that met the event, which must have happened so often."""
    met = [mark.read_text().split(maxsplit=1) for mark in marks(folder, times)]
    return [(number, name) for number, name in met]


# processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event, at, round",
    [
        ("exit", "client_update", 2),
        ("die", "client_init", 0),
        ("die", "client_model", 2),
        ("die", "combine", 2),
    ],
)
def test_host_that_ends_at_any_call(two_hosts, undisturbed, tmp_path, event, at, round):
    experiment = disturbed(event, tmp_path, at=at, round=round)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts) == []
    ((_, name),) = met(tmp_path)
    assert "Host" in name
    assert hashes(tmp_path / "out") == undisturbed
    assert fedsim.load(tmp_path / "out").rounds.retries.sum() > 0


@pytest.mark.parametrize("at, round", [("server_init", 0), ("server_broadcast", 2)])
def test_aggregator_killed_before_anybody_was_asked(two_hosts, undisturbed, tmp_path, at, round):
    experiment = disturbed("die", tmp_path, at=at, round=round)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts) == []
    ((_, name),) = met(tmp_path)
    assert "Server" in name
    assert hashes(tmp_path / "out") == undisturbed


def test_both_hosts_killed_in_one_round(two_hosts, undisturbed, tmp_path):
    experiment = disturbed("die", tmp_path, client=-1, times=2)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=two_hosts) == []
    assert len({number for number, _ in met(tmp_path, times=2)}) == 2
    assert hashes(tmp_path / "out") == undisturbed


# participants that raise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_that_raises_once_is_asked_again(two_hosts, undisturbed, tmp_path, where):
    experiment = disturbed("raise_once", tmp_path, on_error="retry")
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    assert run_all([experiment], out=tmp_path / "out", make_runtime=make_runtime) == []
    met(tmp_path)
    results = fedsim.load(tmp_path / "out")
    assert hashes(tmp_path / "out") == undisturbed
    assert results.rounds.retries.tolist() == [0, 0, 1, 0]
    again = results.clients[results.clients.retries > 0]
    assert [*zip(again["round"], again.client, again.retries, strict=True)] == [(2, 1, 1)]


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_that_raises_again_stops_the_run_and_is_named(two_hosts, tmp_path, where):
    experiment = disturbed("raise", tmp_path, on_error="retry")
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    (failure,) = run_all([experiment], out=tmp_path / "out", make_runtime=make_runtime)
    assert failure.reason == "participant 1: ZeroDivisionError: a disturbance"
    assert len(hashes(tmp_path / "out")) == 2


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_without_memory_is_asked_again_when_nobody_else_computes(two_hosts, undisturbed, tmp_path, where):
    experiment = disturbed("oom_once", tmp_path, on_error="retry")
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    assert run_all([experiment], out=tmp_path / "out", make_runtime=make_runtime) == []
    met(tmp_path)
    assert hashes(tmp_path / "out") == undisturbed
    retries = fedsim.load(tmp_path / "out").rounds.retries
    assert retries[2] > 0 and retries.drop(2).eq(0).all()
    order = (tmp_path / "order").read_text().split()
    assert order.count("1") == 2 and {*order} == {*"012345"}
    assert order[-1] == "1" if where == "ray" else order == [*"0112345"]


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_participant_without_memory_says_who_and_how_much(two_hosts, tmp_path, where):
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    (failure,) = run_all([disturbed("oom_once", tmp_path)], out=tmp_path / "out", make_runtime=make_runtime)
    met(tmp_path)
    for said in ("participant 1 ", "tier 'phone'", "Tried to allocate 2.00 GiB"):
        assert said in failure.reason
    assert len(hashes(tmp_path / "out")) == 2


# a Ray of its own -----------------------------------------------------------------------------------------------------


def elsewhere(function: str, *words: object) -> str:
    """Call a function of this module in a process that is connected to no Ray. Returns what it printed."""
    program = f"import sys; from tests.runtime import test_recovery as here; here.{function}(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `on_a_cluster` left."""
    folder = tmp_path_factory.mktemp("cluster")
    elsewhere("on_a_cluster", folder)
    return folder


@pytest.mark.slow
def test_four_hosts_on_two_nodes(clustered, undisturbed):
    assert hashes(clustered / "four") == undisturbed
    assert fedsim.load(clustered / "four").clients.host.nunique() == 4
    assert (clustered / "nodes").read_text() == "1 1 2 2", "two hosts on each node"


@pytest.mark.slow
def test_node_removed_in_a_round_and_another_added(clustered, undisturbed):
    assert (clustered / "failures").read_text() == ""
    assert met(clustered) and hashes(clustered / "losing") == undisturbed


@pytest.mark.slow
def test_nodes_that_come_when_they_are_waited_for(clustered, undisturbed):
    assert (clustered / "growing-failures").read_text() == "" and hashes(clustered / "growing") == undisturbed


@pytest.mark.slow
def test_object_store_that_is_too_small_spills(clustered, tmp_path):
    assert "Spilled" in (clustered / "memory").read_text()
    assert run_all([echoing()], out=tmp_path, make_runtime=InlineRuntime) == []
    assert hashes(clustered / "echoing") == hashes(tmp_path) and len(hashes(tmp_path)) == 2


def on_a_cluster(folder: str) -> None:
    """Runs on a Ray of a head and another node with small object stores: two with four hosts, two on each node, of
    which the second sends more than the stores can hold; then one with two hosts on a node that is removed; then one
    that waits for a node."""
    import ray
    from ray._private import state
    from ray._private.internal_api import memory_summary
    from ray.cluster_utils import Cluster

    from fedsim.runtime.ray_runtime import RayRuntime

    here = Path(folder)
    missed = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}
    little: dict[str, Any] = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    head: dict[str, Any] = little | {"include_dashboard": False, "_system_config": missed}
    farm: dict[str, Any] = little | {"resources": {"farm": 2}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(**farm)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        runtime = RayRuntime(hosts=4)
        with contextlib.closing(runtime):
            for name, experiment in (("four", small()), ("echoing", echoing())):
                tiers = tuple(replace(tier, num_cpus=1.0) for tier in experiment.tiers)
                experiment = replace(experiment, tiers=tiers)
                failures = run_all([experiment], out=here / name, make_runtime=lambda: Lent(runtime))
                assert failures == [], failures
            (here / "memory").write_text(memory_summary(address=cluster.address, stats_only=True))
            where = [state.actors(actor._actor_id.hex())["Address"]["NodeID"] for actor in runtime.actors]
            (here / "nodes").write_text(" ".join(map(str, sorted(sorted({*where}).index(one) + 1 for one in where))))

        tiers = tuple(replace(tier, resources=(("farm", 1.0),)) for tier in small().tiers)
        experiment = replace(disturbed("stall", here), tiers=tiers)
        with ThreadPoolExecutor(1) as pool:  # nodes are started by the main thread, or not at all
            made = pool.submit(run_all, [experiment], out=here / "losing", make_runtime=lambda: RayRuntime(hosts=2))
            wait_for(lambda: marks(here)[0].exists() or made.done())
            if not made.done():
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(**farm)
            (here / "failures").write_text("\n".join(map(str, made.result())))

        tiers = tuple(replace(tier, resources=(("barn", 1.0),)) for tier in small().tiers)
        experiment = replace(small(), tiers=tiers)
        growing = RayRuntime(address=cluster.address, hosts=2, wait=120.0)
        with ThreadPoolExecutor(1) as pool, contextlib.closing(growing):
            made = pool.submit(run_all, [experiment], out=here / "growing", make_runtime=lambda: growing)
            wait_for(lambda: growing.starting or made.done())
            if not made.done():
                cluster.add_node(**little, resources={"barn": 2})
            (here / "growing-failures").write_text("\n".join(map(str, made.result())))
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass(frozen=True)
class Echo(Algorithm):
    """Sends each client a tensor of its own, which comes back a little larger. Learns nothing, moves much."""

    size: int

    @property
    def name(self) -> str:
        return "echo"

    def server_init(self, ctx):
        return {"x": torch.zeros(self.size)}

    def server_broadcast(self, state, cohort, ctx):
        return {client.id: {"x": state["x"] + client.id} for client in cohort}

    def server_aggregate(self, state, updates, ctx):
        return weighted_mean(updates, state)

    def client_update(self, payload, state, ctx):
        return ClientUpdate(ctx.info.id, {"x": payload["x"] + 1}, ctx.info.num_examples), state

    def client_model(self, payload, state, ctx):
        return ctx.task.module(ctx.info.form, ctx.task.fresh(ctx.info.form, 0))


def echoing() -> Experiment:
    """A run of large payloads and updates."""
    return replace(small(), participants=8, rounds=1, algorithm=Echo(4 * 10**6))


# disks and neighbours -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "fedsim", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_full_is_named_and_nothing_is_lost(disk, undisturbed, tmp_path):
    experiment, out = disturbed("fill", disk), disk / "out"
    (failure,) = run_all([experiment], out=out, make_runtime=InlineRuntime)
    met(disk)
    assert "No space left on device" in failure.reason and str(out) in failure.reason
    assert hashes(out) == undisturbed[:2]
    (failure,) = run_all([experiment], out=out, make_runtime=InlineRuntime)
    assert "No space left on device" in failure.reason and hashes(out) == undisturbed[:2]

    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    assert run_all([experiment], out=out, make_runtime=InlineRuntime) == []
    assert hashes(out) == undisturbed


@pytest.mark.slow
def test_two_runs_at_the_same_time_leave_nothing_behind(tmp_path):
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # Ray's sockets must have short paths
        working = tmp_path / "working"
        working.mkdir()
        places = {"TMPDIR": temporary, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        outs = [tmp_path / "first", tmp_path / "second"]
        words = ("run", "tests.support.disturbed:small", "--hosts", "1", "--set", "rounds=1")
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "fedsim", *words, "--out", str(out)],
                cwd=working,
                env={**os.environ, **places},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for out in outs
        ]
        said = [process.communicate(timeout=900)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        assert hashes(outs[0]) == hashes(outs[1]) and len(hashes(outs[0])) == 2
        wait_for(lambda: not started_in(temporary), seconds=120)
        assert [path.name for path in Path(temporary).iterdir()] == ["ray"]
        assert not [*working.iterdir()]


def started_in(temporary: str) -> Sequence[psutil.Process]:
    """Processes that were told to put temporary files there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == temporary and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)
