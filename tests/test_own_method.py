"""A method in a user's own folder, as CONTRIBUTING.md prints it: it trains, batches, resumes and exports."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageClassification

import fedsim
from fedsim.cli import main
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import load_experiments, with_settings
from fedsim.report.frames import Study
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.disturbed import TINY_SETTINGS


GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
SETTINGS = [words for words in TINY_SETTINGS if not words.startswith("algorithm.")]


class Stopped(BaseException):
    """What Ctrl-C looks like."""


class StopAfterOne(ProgressListener):
    def finished(self, row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise Stopped


def run_into(out: str, *more: str) -> Study:
    words = ["run", "my_study:suite", "--runtime", "inline", "--out", out, "--set", *SETTINGS, *more]
    assert main(words) == 0
    return fedsim.load(out)


def test_the_first_tutorial_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import dataclasses\n.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "my_study.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_study", raising=False)  # another test's

    batched, single = run_into("batched"), run_into("single", "batched=false")
    assert batched.runs.algorithm.tolist() == ["fedper"]
    assert batched.rounds.state_sha256.iloc[-1] != single.rounds.state_sha256.iloc[-1], (
        "equal to rounding, not to the bit"
    )
    assert batched.clients.train_loss.dropna().tolist() == pytest.approx(
        single.clients.train_loss.dropna().tolist(), rel=1e-4
    )

    (experiment,) = load_experiments("my_study:suite")
    with pytest.raises(Stopped):
        experiment = with_settings(experiment, SETTINGS)
        run(experiment, runtime=InlineRuntime(), out=tmp_path / "cut", progress=StopAfterOne())
    assert main(["run", "my_study:suite", "--runtime", "inline", "--out", "cut", "--resume", "--set", *SETTINGS]) == 0
    resumed = fedsim.load("cut")
    assert resumed.rounds.state_sha256.tolist() == batched.rounds.state_sha256.tolist()

    assert main(["export", "single", "--participant", "1", "--to", "model"]) == 0
    assert AutoModelForImageClassification.from_pretrained("model").num_parameters() > 1000
