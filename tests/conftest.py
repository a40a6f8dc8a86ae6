"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.suites import tiny
from fedsim.experiment import Experiment, with_settings
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run


# What makes `benchmarks.suites:tiny` tinier still, as words for `--set`.
TINY_SETTINGS = (
    "rounds=2",
    "task.data.limit=120",
    "task.patch_size=4",
    "partition.min_size=10",
    "algorithm.small_epochs=1",
    "algorithm.local_epochs=1",
    "tiers.0.form.width=8",
    "tiers.1.form.width=8",
    "tiers.2.form.width=12",
    "tiers.2.form.depth=2",
    "intermediate.width=16",
    "intermediate.depth=2",
    "target.width=20",
    "target.depth=3",
)


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
    out, runtime = tmp_path_factory.mktemp("tiny_run"), InlineRuntime()
    run(tiny_experiment, runtime=runtime, out=out)
    runtime.close()
    return out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of computation, as in every host: models this small only lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
