"""Fixtures that several test modules share."""

import atexit
import gc
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from benchmarks.suites import tiny
from fedgrow_algo.fedgrow import FedGrow
from fedsim.data.source import _loaded
from fedsim.experiment import Experiment, with_settings
from fedsim.learning.meter import StepCost
from fedsim.runtime.base import Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.counting import count_once
from tests.support.disturbed import TINY_SETTINGS, Lent, small, without_federation
from tests.support.inline_runs import inline
from tests.support.small_federation import without_counting


# Commands in this process, which has computed before, and those it starts give the same bits.
os.environ["FEDSIM_NUMERICS"] = "native"
if "PYTEST_XDIST_WORKER" not in os.environ:  # processes that test inherit it
    os.environ["FEDSIM_CACHE_DIR"] = tempfile.mkdtemp(prefix="fedsim-tests-")
    atexit.register(shutil.rmtree, os.environ["FEDSIM_CACHE_DIR"], ignore_errors=True)
hypothesis.settings.register_profile("untimed", deadline=None)  # speed is measured in benchmarks
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on Ray share one Ray. They come last; of several processes that test, one has them all, and first."""
    one_of_several = hasattr(config, "workerinput")
    items.sort(key=lambda item: (item.get_closest_marker("ray") is not None) != one_of_several)
    for item in items:
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif "one_thread" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.trains)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Several processes that test must not start a Ray each: pytest-xdist names the group at the end of a test's id."""
    if hasattr(session.config, "workerinput") and session.config.getvalue("loadgroup"):
        marked = [item.nodeid for item in session.items if item.get_closest_marker("ray") is not None]
        assert all(nodeid.endswith("@ray") for nodeid in marked), "pytest-xdist does not group tests"


@pytest.fixture(scope="session", autouse=True)
def _count_once() -> Iterator[None]:
    real = count_once()
    yield
    StepCost.measured = staticmethod(real)


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """Words for `--set` that turn `benchmarks.suites:tiny` into `tiny_experiment`."""
    return list(TINY_SETTINGS)


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    """Fed-Grow on a few digits: 3 participants of 3 small forms, 2 federated rounds, under a second once counted."""
    return with_settings(tiny(), TINY_SETTINGS)


@pytest.fixture(scope="session")
def tiny_run(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a finished, undisturbed run of `tiny_experiment`, computed inline. Do not write to it."""
    out = tmp_path_factory.mktemp("tiny_run")
    inline(tiny_experiment, out)
    return out


@pytest.fixture(scope="session")
def alone(tiny_experiment: Experiment) -> Experiment:
    """The same growth without federation: participants keep private state that changes in every round."""
    assert isinstance(tiny_experiment.algorithm, FedGrow)
    return replace(tiny_experiment, algorithm=replace(tiny_experiment.algorithm, federate=False))


@pytest.fixture(scope="session")
def alone_run(alone: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a finished, undisturbed run of `alone`. Do not write to it."""
    out = tmp_path_factory.mktemp("alone_run")
    inline(alone, out)
    return out


@pytest.fixture(params=["fedgrow", "fedgrow_no_federation"])
def undisturbed(
    request: pytest.FixtureRequest, tiny_experiment: Experiment, alone: Experiment
) -> tuple[Experiment, Path]:
    """An experiment and the results of its run."""
    if request.param == "fedgrow":
        return tiny_experiment, request.getfixturevalue("tiny_run")
    return alone, request.getfixturevalue("alone_run")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of computation, as in every host: models this small only lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not counted, which takes longer than trainings of the tests' size."""
    without_counting(monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Note every attempt to reach the network: libraries swallow what they meet there, so raising is not enough."""
    attempts: list[Any] = []

    def refuse_to(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise OSError("tests touch no network")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse_to)
    yield
    assert not attempts


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What `transformers` warns of; it has a logger of its own, so the warnings filter does not see it."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger("transformers"), Ear(logging.WARNING)
    logger.addHandler(ear)
    yield heard
    logger.removeHandler(ear)


@pytest.fixture
def read_again(no_network: None) -> None:
    """Data are read from files in this test, which may have the names of others."""
    _loaded.cache_clear()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with undisturbed inline runs of `small` and `without_federation`. Do not write to it."""
    out = tmp_path_factory.mktemp("reference")
    assert run_all([small(), without_federation()], out=out, make_runtime=InlineRuntime) == []
    return out


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One private Ray for all tests in this process, with more logical CPUs and GPUs than the machine has."""
    import ray  # only here: tests that need no Ray do not wait for it

    os.environ.pop("RAY_AUTH_MODE", None)  # commands with an address have set it, where this user has a token
    often = {"metrics_report_interval_ms": 1000}
    ray.init(
        address="local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False, _system_config=often
    )
    yield
    with warnings.catch_warnings():  # Ray does not wait for all that it ends: not a leak of what is tested
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()


@pytest.fixture(scope="session")
def on_hosts(cluster: None) -> Iterator[Callable[[int], Callable[[], Runtime]]]:
    """number of hosts -> a function that lends a runtime with so many.

    One runtime, and one server, for all runs, as in a sweep: what one test kills must be whole again for the next. Its
    hosts stay as long as their number does: a start costs seconds, most of them for importing torch and transformers.
    """
    from fedsim.runtime.ray_runtime import RayRuntime

    runtime = RayRuntime()

    def lender(hosts: int) -> Callable[[], Runtime]:
        def lend() -> Runtime:
            runtime.hosts = hosts
            return Lent(runtime)

        return lend

    yield lender
    runtime.close()


@pytest.fixture
def two_hosts(on_hosts: Callable[[int], Callable[[], Runtime]]) -> Callable[[], Runtime]:
    """A function that lends a runtime with two hosts."""
    return on_hosts(2)
