"""A results folder of version 0.1.0, of before modules moved into rooms: it is read, exported from, computed again.

`before.zip`: two runs of `tiny` with portable numerics, one finished and one cut after round 1.
"""

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import fedsim
from benchmarks.suites import tiny
from fedsim.cli import main
from fedsim.experiment import Experiment, with_settings
from tests.support.disturbed import TINY_SETTINGS
from tests.support.other_processors import ELSEWHERE, needs_avx2


FINISHED, CUT = "ff0703696e7e9032", "6803d8b20ea88d8a"


def both() -> list[Experiment]:
    """The experiments the folder holds."""
    experiment = with_settings(tiny(), TINY_SETTINGS)
    return [experiment, replace(experiment, seed=1)]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).with_name("before.zip")) as packed:
        packed.extractall(tmp_path / "before")
    return tmp_path / "before"


def test_the_same_experiments_have_the_same_run_ids() -> None:
    assert [experiment.run_id for experiment in both()] == [FINISHED, CUT]


def test_its_tables_are_read(before: Path) -> None:
    results = fedsim.load(before)
    assert list(results.runs.run_id) == [FINISHED] and set(results.rounds.run_id) == {FINISHED, CUT}
    assert len(results.clients) == 3 * (3 + 2) and list(results.table().method) == ["fedgrow (paper)"]


def test_models_are_exported_from_it(before: Path, tmp_path: Path) -> None:
    words = ["export", str(before), "--run", FINISHED, "--participant", "0", "--to", str(tmp_path / "model")]
    assert main(words) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


@needs_avx2
def test_both_runs_are_computed_again_with_the_same_bits_and_a_message_says_why(before: Path) -> None:
    rounds = fedsim.load(before).rounds.set_index(["run_id", "round"]).state_sha256
    words = ["run", f"{__name__}:both", "--out", str(before), "--runtime", "inline", "--numerics", "portable"]
    command = [sys.executable, "-m", "fedsim", *words, "--resume"]
    done = subprocess.run(command, env=ELSEWHERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("computed again, the code has changed") == 2
    again = fedsim.load(before).rounds.set_index(["run_id", "round"]).state_sha256
    assert len(again) == 2 * 3 and dict(rounds) == {key: again[key] for key in rounds.index}
