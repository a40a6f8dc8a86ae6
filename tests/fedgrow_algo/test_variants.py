"""Runs of Fed-Grow's own variants: one that is cut and resumed gives the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import tiny
from fedgrow_algo.anchored import FedGrowAnchored
from fedgrow_algo.matched import FedGrowMatched
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm
from fedsim.data.config import digits
from fedsim.learning.task import TaskConfig
from fedsim.results.tables import load
from tests.support.inline_runs import Cut, Interrupted, assert_same_numbers, inline


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

ROUND: dict[str, Any] = {"preset": "preserving", "lr": 3e-3, "small_epochs": 1, "batch_size": 32}
STAGED: dict[str, Any] = ROUND | {"local_epochs": 1}
VARIANTS = [FedGrowResidual(**STAGED), FedGrowAnchored(**ROUND), FedGrowMatched(**STAGED, rank=4)]


@pytest.mark.parametrize("algorithm", VARIANTS, ids=lambda each: each.name)
def test_a_resumed_run_gives_the_same_bits(algorithm: Algorithm, tmp_path: Path) -> None:
    task = TaskConfig(digits(limit=240), patch_size=4)
    experiment = dataclasses.replace(tiny(), task=task, algorithm=algorithm, rounds=3)
    inline(experiment, tmp_path / "whole")
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path / "cut", progress=Cut(after=1))
    inline(experiment, tmp_path / "cut", resume=True)
    assert_same_numbers(tmp_path / "whole", tmp_path / "cut")
    results = load(tmp_path / "whole")
    assert len({*results.rounds["state_sha256"]}) == 4
    assert results.runs["algorithm"].tolist() == [algorithm.name]
