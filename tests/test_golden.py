"""Golden curves: what each method gave on one small federation, so that no change of its numbers goes unseen.

A change that is meant is written with `python -m tests.test_golden` and explained in its commit. Losses are compared to
within what another CPU's sums may differ by.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import fedsim.simulation
from benchmarks.methods import DIGITS, methods
from benchmarks.suites import quick
from fedsim.algorithm import Algorithm
from fedsim.data.config import digits
from fedsim.data.partition import Partition
from fedsim.progress import Silent
from fedsim.results import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.task import TaskConfig
from fedsim.training import StepCost


GOLDEN = Path(__file__).with_name("golden.json")
METHODS = {f"{method.name} {method.preset_name}".strip(): method for method in methods(DIGITS)}
COLUMNS = ("train_loss", "loss_mean", "bytes_up", "bytes_down", "coverage")


def curves(algorithm: Algorithm, folder: Path) -> dict[str, list[float | None]]:
    """Two rounds of three participants on 240 digits: losses, bytes and coverage of each round."""
    base = replace(
        quick()[0],
        task=TaskConfig(digits(limit=240), patch_size=4),
        partition=Partition("dirichlet", alpha=0.5, min_size=20),
        participants=3,
        rounds=2,
        algorithm=algorithm,
    )
    runtime = InlineRuntime()
    try:
        run(base, runtime=runtime, out=folder, progress=Silent())
    finally:
        runtime.close()
    rounds = load(folder).rounds.sort_values("round")
    return {name: [None if value != value else float(value) for value in rounds[name]] for name in COLUMNS}


@pytest.fixture(autouse=True)
def _uncounted(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step takes longer than these trainings do. What stands in for it must not be remembered."""
    monkeypatch.setattr(fedsim.simulation, "COUNTED", {})
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (1, 1))))


def test_every_file_of_baselines_has_a_curve() -> None:
    files = {path.stem for path in Path(__file__).parents[1].joinpath("baselines").glob("*.py")} - {"__init__"}
    assert files == {
        type(method).__module__.removeprefix("baselines.")
        for method in METHODS.values()
        if type(method).__module__.startswith("baselines.")
    }
    assert json.loads(GOLDEN.read_text()).keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    golden, found = json.loads(GOLDEN.read_text())[name], curves(METHODS[name], tmp_path)
    for column in COLUMNS:
        tolerance = 2e-3 if "loss" in column else 1e-9
        assert found[column] == pytest.approx(golden[column], abs=tolerance, nan_ok=True), column


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: curves(method, Path(scratch, str(i))) for i, (name, method) in enumerate(METHODS.items())}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
