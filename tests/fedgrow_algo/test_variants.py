"""The project's own variants of Fed-Grow in whole runs: one that is cut goes on to the same bits."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.suites import tiny
from fedgrow_algo.analytic import FedGrowAnalytic
from fedgrow_algo.anchored import FedGrowAnchored
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.fused import FedGrowFused
from fedgrow_algo.matched import FedGrowMatched
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm
from fedsim.experiment import with_settings
from tests.support.inline_runs import Cut, Interrupted, inline


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

VARIANTS = [
    FedGrowResidual(preset="preserving", small_epochs=1, local_epochs=1, lr=1e-3),
    FedGrowAnchored(preset="preserving", small_epochs=1, lr=1e-3),
    FedGrowMatched(preset="preserving", rank=2, small_epochs=1, local_epochs=1, lr=1e-3),
    FedGrowAnalytic(preset="preserving", rank=2, small_epochs=1, local_epochs=1, lr=1e-3),
    FedGrowCore(rank=2, lr=1e-3),
    FedGrowCore(rank=2, lr=1e-3, warm_rounds=2),
    FedGrowFused(preset="preserving", rank=2, small_epochs=1, local_epochs=1, lr=1e-3),
]


@pytest.mark.parametrize("algorithm", VARIANTS, ids=lambda algorithm: algorithm.name)
def test_a_cut_run_goes_on_to_the_same_bits(algorithm: Algorithm, tmp_path: Path, tiny_settings: list[str]) -> None:
    words = [word for word in tiny_settings if not word.startswith("algorithm.")]
    base = dataclasses.replace(tiny(), algorithm=algorithm)
    experiment = with_settings(base, [*words, "rounds=4", "cohort=2", "eval_every=2"])
    inline(experiment, tmp_path / "whole")
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path / "cut", progress=Cut(after=2))
    inline(experiment, tmp_path / "cut", resume=True)
    whole, cut = (
        pd.read_parquet(tmp_path / which / "rounds").sort_values("round").reset_index() for which in ("whole", "cut")
    )
    for column in ("state_sha256", "bytes_up", "bytes_down", "train_loss"):
        assert whole[column].equals(cut[column])
    assert len({*whole["state_sha256"]}) == 5, "every round moves something"
