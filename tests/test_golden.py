"""Golden curves: what each method gave on one small federation, so that no change of its numbers goes unseen.

They are computed with portable numerics, in a process of their own, and compared to the last bit: that tests the
promise on whatever processor this is. A change that is meant is written with `python -m tests.test_golden` and
explained in its commit.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.methods import DIGITS, methods
from benchmarks.suites import quick
from fedsim.algorithm import Algorithm
from fedsim.core.numerics import PORTABLE
from fedsim.data.config import digits
from fedsim.data.partition import Partition
from fedsim.engine.progress import ProgressListener
from fedsim.learning.meter import StepCost
from fedsim.learning.task import TaskConfig
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.other_processors import ELSEWHERE, needs_avx2


GOLDEN = Path(__file__).with_name("golden.json")
METHODS = {f"{method.name} {method.preset_name}".strip(): method for method in methods(DIGITS)}
COLUMNS = ("train_loss", "loss_mean", "bytes_up", "bytes_down", "coverage")

Curves = dict[str, list[float | None]]


def curves(algorithm: Algorithm, folder: Path) -> Curves:
    """Two rounds of three participants on 240 digits: losses, bytes and coverage of each round."""
    base = replace(
        quick()[0],
        task=TaskConfig(digits(limit=240), patch_size=4),
        partition=Partition("dirichlet", alpha=0.5, min_size=20),
        participants=3,
        rounds=2,
        algorithm=algorithm,
    )
    runtime = InlineRuntime(PORTABLE)
    try:
        run(base, runtime=runtime, out=folder, progress=ProgressListener())
    finally:
        runtime.close()
    rounds = load(folder).rounds.sort_values("round")
    return {name: [None if value != value else float(value) for value in rounds[name]] for name in COLUMNS}


def write(path: Path) -> None:
    """The curves of all methods, computed here: nothing may have been computed before."""
    # Counting a step takes longer than these trainings do.
    setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (1, 1))))  # noqa: B010
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: curves(method, Path(scratch, str(i))) for i, (name, method) in enumerate(METHODS.items())}
    path.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curves]:
    """The curves as they come out in a process whose libraries are told to compute in another way."""
    path = tmp_path_factory.mktemp("golden") / "found.json"
    subprocess.run([sys.executable, "-m", "tests.test_golden", str(path)], env=ELSEWHERE, check=True)
    return json.loads(path.read_text())


def test_every_file_of_baselines_has_a_curve() -> None:
    files = {path.stem for path in Path(__file__).parents[1].joinpath("baselines").glob("*.py")} - {
        "__init__",
        "sub_models",
        "private_models",
    }
    assert files == {
        type(method).__module__.removeprefix("baselines.")
        for method in METHODS.values()
        if type(method).__module__.startswith("baselines.")
    }
    assert json.loads(GOLDEN.read_text()).keys() == METHODS.keys()


@needs_avx2
@pytest.mark.xdist_group("golden")  # all in one process: their curves are computed once
@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_what_it_gave(name: str, found: dict[str, Curves]) -> None:
    assert found[name] == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else GOLDEN)
