"""A run with more rounds goes on where the same one with fewer ended, and is the run that it would have been."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedsim.cli import main
from fedsim.experiment import Experiment, with_settings
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.contract import METHODS, TASKS, Case
from tests.support.inline_runs import Cut, Interrupted, inline, numbers


pytestmark = pytest.mark.usefixtures("one_thread")


def of_method(method: str, rounds: int) -> Experiment:
    """Of three participants, two take part in a round, and scores are rare: a last round differs from others."""
    base = Case(METHODS[method], TASKS["vit/digits"], {}, {}).experiment()
    return replace(base, participants=3, cohort=2, eval_every=2, scored="cohort", rounds=rounds)


def computed(out: Path, *experiments: Experiment) -> Path:
    for experiment in experiments:
        assert run_all([experiment], out=out, make_runtime=InlineRuntime) == []
    return out


def assert_same_run(one: Path, other: Path, run_id: str) -> None:
    """Every number of a run is the same in two folders."""
    for left, right in zip(numbers(load(one)), numbers(load(other)), strict=True):
        mine, theirs = (frame.loc[frame["run_id"] == run_id].reset_index(drop=True) for frame in (left, right))
        assert len(mine)
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_run_it_would_have_been(method: str, tmp_path: Path) -> None:
    longer = of_method(method, 4)
    computed(tmp_path / "on", of_method(method, 1), of_method(method, 3), longer)
    computed(tmp_path / "whole", longer)
    assert_same_run(tmp_path / "on", tmp_path / "whole", longer.run_id)
    assert sorted(load(tmp_path / "on").runs.rounds) == [1, 3, 4]


def test_the_command_asks_for_resume_and_computes_the_last_round_again(
    tmp_path: Path, tiny_run: Path, tiny_settings: list[str], tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    words = ["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(out), "--set", *tiny_settings]
    assert main([*words, "rounds=3"]) == 2
    said = capsys.readouterr().err
    assert f"holds run {tiny_experiment.run_id}" in said and "rounds=2 (here 3)" in said and "--resume" in said
    assert main([*words, "rounds=3", "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"goes on where run {tiny_experiment.run_id} ended" in said and "resumed at round 2" in said
    longer = with_settings(tiny_experiment, ["rounds=3"])
    inline(longer, tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole", longer.run_id)
    assert_same_run(out, tiny_run, tiny_experiment.run_id)


@pytest.mark.parametrize("change", [["seed=1"], ["algorithm.lr=1e-2"], ["rounds=1"], ["participants=4"]])
def test_a_run_that_differs_in_more_than_rounds_is_another(
    change: list[str], tmp_path: Path, tiny_run: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    words = ["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(out), "--resume"]
    assert main([*words, "--set", *tiny_settings, "rounds=3", *change]) == 2
    said = capsys.readouterr().err
    assert "different experiment" in said and f"{change[0].partition('=')[0]}: " in said


def test_a_cut_run_is_gone_on_with_too(tmp_path: Path, alone: Experiment) -> None:
    longer = replace(alone, rounds=3)
    with pytest.raises(Interrupted):
        inline(alone, tmp_path / "on", progress=Cut(after=1))
    computed(tmp_path / "on", longer)
    inline(longer, tmp_path / "whole")
    assert_same_run(tmp_path / "on", tmp_path / "whole", longer.run_id)


def test_without_its_checkpoints_a_run_is_computed_from_the_beginning(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment
) -> None:
    out, longer = tmp_path / "out", replace(tiny_experiment, rounds=3)
    shutil.copytree(tiny_run, out)
    shutil.rmtree(out / "checkpoints" / tiny_experiment.run_id)
    computed(out, longer)
    inline(longer, tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole", longer.run_id)
