"""The plan of a sweep: what it says beforehand is what runs then cost, and nothing is written."""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import fedsim.learning.training
from baselines.depthfl import DepthFL
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg, fedavg_small
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.heterofl import HeteroFL
from baselines.lora import hetlora
from baselines.progfed import ProgFed
from benchmarks import suites, sweep
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedsim.algorithm import Algorithm
from fedsim.cli import parser
from fedsim.data.config import DataConfig, digits
from fedsim.data.partition import Partition
from fedsim.engine.cohort import cohort_of, members
from fedsim.experiment import Experiment, Tier
from fedsim.learning.task import TaskConfig, load_task
from fedsim.models import Form
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.sweeps.calibration import LONG, SMALL, Calibration, phases
from fedsim.sweeps.outline import Line, Model, Outline, Part, Phase, Stage
from fedsim.sweeps.plan import Estimate, Machine, Planner, print_plan
from fedsim.sweeps.suites import experiments_of as selected
from fedsim.sweeps.suites import suites_in
from tests.support.small_federation import without_counting


LOCAL: dict[str, Any] = {"lr": 1e-3, "epochs": 2, "batch_size": 16}
ALONE: dict[str, Any] = LOCAL | {"small_lr": 1e-3, "small_epochs": 2}
STAGED: dict[str, Any] = ALONE | {"local_lr": 1e-3, "local_epochs": 3}
ONE_CORE = Machine("inline", None, 1, 1)


def on_few_digits(algorithm: Algorithm) -> Experiment:
    """Five participants of unequal shards and three sizes, of whom three take part in a round."""
    return Experiment(
        algorithm,
        TaskConfig(digits(limit=120), patch_size=4),
        tuple(Tier(name, Form(*size, heads=2)) for name, size in (("a", (8, 1)), ("b", (8, 2)), ("c", (16, 2)))),
        Form(16, 3, heads=2),
        Form(16, 4, heads=2),
        partition=Partition("dirichlet", alpha=0.5, min_size=5),
        participants=5,
        cohort=3,
        rounds=4,
        eval_every=2,
        chunk=2,
    )


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example costs a FLOP, whatever is trained on it."""
    without_counting(monkeypatch)


# what runs cost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        FedGrow(**STAGED),
        FedAvg(**LOCAL),
        fedavg_small(**LOCAL),
        HeteroFL(**LOCAL),
        DepthFL(**LOCAL),
        hetlora(**LOCAL, rank=4),
    ],
    ids=lambda algorithm: algorithm.name,
)
def test_a_run_costs_what_was_planned(algorithm: Algorithm, tmp_path: Path) -> None:
    planned, rounds = planned_and_run(algorithm, tmp_path)
    assert (planned.runs, planned.rounds) == (1, 4)
    assert planned.flops == pytest.approx(rounds.flops.sum(), rel=1e-6)
    assert planned.sent == (rounds.bytes_up + rounds.bytes_down).sum()
    assert 0 < planned.core_seconds < math.inf and planned.seconds == planned.core_seconds


def test_batches_that_add_up_or_are_left_out_cost_what_was_planned(tmp_path: Path) -> None:
    for settings in ({"accumulate": 3}, {"drop_last": True}, {"drop_last": True, "accumulate": 2, "batch_size": 16}):
        algorithm = dataclasses.replace(FedAvg(**LOCAL), **settings)
        planned, rounds = planned_and_run(algorithm, tmp_path / str(settings))
        assert planned.flops == pytest.approx(rounds.flops.sum(), rel=1e-6)


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(
    "algorithm",
    [
        FedGrow(**STAGED, finetune_after=2),
        FedGrowReleasedCode(**STAGED),
        ProgFed(**LOCAL, stage_rounds=1),
        GrowThenFedAvg(**LOCAL, small_rounds=2),
        Exclusive(**ALONE, share=0.3),
    ],
    ids=lambda algorithm: algorithm.name,
)
def test_a_run_whose_rounds_differ_costs_what_was_planned(algorithm: Algorithm, tmp_path: Path) -> None:
    planned, rounds = planned_and_run(algorithm, tmp_path)
    assert planned.flops == rounds.flops.sum()
    # Who receives Global in order to fine-tune depends on who was there before: that is not foreseen.
    foreseen = getattr(algorithm, "finetune_after", None) is None
    assert planned.sent == pytest.approx((rounds.bytes_up + rounds.bytes_down).sum(), rel=0 if foreseen else 0.5)


def planned_and_run(algorithm: Algorithm, out: Path) -> tuple[Estimate, pd.DataFrame]:
    experiment, runtime = on_few_digits(algorithm), InlineRuntime()
    planned = Planner(None, ONE_CORE).estimate(experiment)
    run(experiment, runtime=runtime, out=out)
    runtime.close()
    return planned, load(out).rounds


@pytest.mark.usefixtures("uncounted")
def test_the_sum_over_participants_and_rounds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All begin, three of five train in a round; all are scored after rounds 0, 2 and 4, with the server's in 4."""
    experiment = on_few_digits(FedAvg())
    planner = Planner(None, Machine("ray", 2, 3, 4))
    model, begun = Model(10.0, Line(0.0, 1.0)), Part((), 0, 1000.0, None)
    part = Part((Stage(2, 16, Line(1.0, 3.0), Line(0.5, 0.0)),), 11, 0.0, model)
    early, late = Phase((1, 3), (part,) * 3, 0.25, None), Phase((4, 4), (part,) * 3, 0.25, model)
    monkeypatch.setattr(planner.calibration, "outline", lambda *_, **__: Outline((begun,) * 3, (early, late)))
    population = members(experiment, load_task(experiment.task, None))
    sizes = np.array([len(population[id_].train) for round in (1, 2, 3, 4) for id_ in cohort_of(experiment, round)])
    held_out = sum(len(member.validation) for member in population)
    assert len(sizes) == 12 and len({*sizes}) > 2 and held_out > 0

    planned = planner.estimate(experiment)
    assert planned.sent == 12 * 11
    assert planned.flops == 2 * (np.ceil(sizes / 16) + 3 * sizes).sum()
    scoring = 3 * (5 * (10 + 120) + 5 * 0 + held_out) + (10 + 120)
    assert planned.core_seconds == pytest.approx(5000 + 2 * 0.5 * np.ceil(sizes / 16).sum() + 12 * 0.25 + scoring)
    assert planned.seconds == pytest.approx(planned.core_seconds / 4), "3 jobs of 2 hosts have 4 cores"


@pytest.mark.parametrize(
    "machine, expected",
    [
        (Machine("inline", None, 1, 8), 1),
        (Machine("inline", 4, 3, 8), 3),
        (Machine("inline", None, 3, 2), 2),
        (Machine("ray", None, 1, 8), 3),
        (Machine("ray", 2, 1, 8), 2),
        (Machine("ray", 5, 1, 8), 3),
        (Machine("ray", 2, 3, 8), 6),
        (Machine("ray", None, 1, 2), 2),
    ],
)
def test_processes_at_work(machine: Machine, expected: int) -> None:
    assert machine.at_work(on_few_digits(FedAvg())) == expected


# rounds that are alike ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(
    "algorithm, expected",
    [
        (FedAvg(**LOCAL), [(1, 9)]),
        (ProgFed(**LOCAL, stage_rounds=2), [(1, 2), (3, 4), (5, 6), (7, 9)]),
        (GrowThenFedAvg(**LOCAL, small_rounds=4), [(1, 4), (5, 9)]),
        (FedGrowReleasedCode(**STAGED), [(1, 1), (2, 9)]),
        (FedGrow(**STAGED, finetune_after=5), [(1, 5), (6, 6), (7, 9)]),
        (FedGrow(**STAGED, finetune_after=9), [(1, 9)]),
    ],
    ids=lambda value: value.name if isinstance(value, Algorithm) else "",
)
def test_phases(algorithm: Algorithm, expected: list[tuple[int, int]]) -> None:
    assert phases(dataclasses.replace(on_few_digits(algorithm), rounds=9), {})[0] == expected


# times ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, expected",
    [
        (((2, 7.0), (16, 35.0)), Line(3.0, 2.0)),
        (((16, 35.0), (2, 7.0)), Line(3.0, 2.0)),
        (((2, 7.0), (2, 7.0)), Line(0.0, 3.5)),
        (((2, 7.0), (16, 5.0)), Line(5.0, 0.0)),
        (((2, 2.0), (4, 8.0)), Line(0.0, 2.0)),
    ],
    ids=["line", "order", "one point", "no time for an example", "no time for a batch"],
)
def test_a_line_through_two_points(points: Sequence[tuple[int, float]], expected: Line) -> None:
    assert Line.through(*points) == expected
    fixed, each = expected.fixed, expected.each
    totals = [0, fixed + 5 * each, fixed + 16 * each, 2 * fixed + 17 * each]
    assert expected.total(np.array([0, 5, 16, 17]), 16) == pytest.approx(totals)


@pytest.fixture
def asked(uncounted: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes whose steps were timed; a step takes 0.01 s and 0.001 s for each example."""
    sizes = []

    def step(_ctx, training, _objective) -> float:
        size = training.batch_size
        assert torch.get_num_threads() == 1
        sizes.append(size)
        return 0.01 + 0.001 * size

    monkeypatch.setattr(fedsim.learning.training, "seconds_of_step", step)
    return sizes


def test_steps_are_timed_in_small_and_in_full_batches_on_one_thread(asked: list[int]) -> None:
    torch.set_num_threads(2)
    outline = Calibration().outline(on_few_digits(FedGrow(**STAGED)), timing=True)
    assert torch.get_num_threads() == 2
    # Three small models are trained, and grown into the intermediate form; what is grown into the target is alike.
    assert sorted(asked) == [SMALL] * 7 + [16] * 7
    stages = [stage for part in (*outline.begun, *outline.phases[0].parts) for stage in part.stages]
    assert len(stages) == 9 and {stage.batch_size for stage in stages} == {16}
    for stage in stages:
        assert stage.seconds
        assert (stage.seconds.fixed, stage.seconds.each) == pytest.approx((0.01, 0.001))


def test_a_step_that_would_take_long_is_timed_in_small_batches_only(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_ctx, training, _objective) -> float:
        asked.append(training.batch_size)
        return 0.9 * LONG * training.batch_size

    monkeypatch.setattr(fedsim.learning.training, "seconds_of_step", slow)
    outline = Calibration().outline(on_few_digits(FedAvg(**LOCAL)), timing=True)
    assert asked == [SMALL]
    assert outline.phases[0].parts[0].stages[0].seconds == Line(0.0, 0.9 * LONG)


def test_what_was_timed_once_is_not_timed_again(asked: list[int]) -> None:
    shared, base = Calibration(), on_few_digits(FedGrow(**STAGED))
    shared.outline(base, timing=True)
    asked.clear()
    variants = [
        dataclasses.replace(base, seed=3, participants=9, partition=Partition("iid"), cohort=None, eval_every=1),
        dataclasses.replace(base, algorithm=dataclasses.replace(FedGrow(**STAGED), lr=0.5, epochs=7)),
        dataclasses.replace(base, algorithm=FedGrow(**STAGED, federate=False)),
        dataclasses.replace(base, rounds=6),
    ]
    for variant in variants:
        outline = shared.outline(variant, timing=True)
        assert all(stage.seconds for part in outline.phases[0].parts for stage in part.stages)
    assert asked == []
    wider = dataclasses.replace(base, algorithm=dataclasses.replace(FedGrow(**STAGED), batch_size=8))
    shared.outline(wider, timing=True)
    assert {*asked} == {SMALL, 8}


# what is printed ------------------------------------------------------------------------------------------------------


def printed(*experiments: Experiment, out: Path, data_dir: str | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=60)
    print_plan({"mine": experiments}, out=out, data_dir=data_dir, machine=ONE_CORE, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def cells(lines: list[str], first: str) -> list[list[str]]:
    """Words of the table's rows that begin so."""
    return [line.split() for line in lines if line.startswith(f" {first} ")]


@pytest.mark.usefixtures("uncounted")
def test_seeds_share_a_row_and_the_suite_has_a_total(tmp_path: Path, tiny_experiment: Experiment) -> None:
    fedavg = dataclasses.replace(tiny_experiment, algorithm=FedAvg(**LOCAL), cohort=2)
    seeds = [dataclasses.replace(each, seed=seed) for seed in (0, 5) for each in (tiny_experiment, fedavg)]
    lines = printed(*seeds, out=tmp_path / "out")
    assert lines[0] == "suite mine: 4 runs"
    assert all(len(line) <= 120 for line in lines[1:13])
    # Global grows 16x2 into 20x3. One map of the residual axis, a map for each of two blocks of queries, keys, values
    # and the MLP, and a 3x2 table for each of a block's eight modules; 4 bytes, down and up, 3 participants, 4 rounds.
    ((*setting, runs, rounds, megabytes, flops, core_hours, hours),) = cells(lines, "fedgrow")
    assert setting == ["fedgrow", "paper", "digits", "3", "0.5"]
    operator = 20 * 16 + 4 * 2 * 20 * 16 + 8 * 3 * 2
    assert (runs, rounds, megabytes) == ("2", "4", f"{operator * 4 * 2 * 3 * 4 / 1e6:.1f}")
    assert float(flops) > 0 and 0 < float(core_hours) == float(hours)
    ((*setting, runs, rounds, _, _, _, _),) = cells(lines, "fedavg")
    assert setting == ["fedavg", "digits", "2", "of", "3", "0.5"] and (runs, rounds) == ("2", "4")
    (total,) = cells(lines, "in all")
    assert total[2:4] == ["4", "8"] and float(total[5]) > float(flops)
    for experiment in seeds:
        (line,) = [line for line in lines if experiment.run_id in line]
        assert f"seed {experiment.seed}, digits" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("uncounted")
def test_runs_that_differ_in_settings_that_are_not_shown_share_a_row(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    rates = [
        dataclasses.replace(tiny_experiment, algorithm=dataclasses.replace(FedAvg(**LOCAL), lr=lr))
        for lr in (1e-2, 1e-3, 1e-4)
    ]
    ((*_, runs, rounds, _, _, _, _),) = cells(printed(*rates, out=tmp_path), "fedavg")
    assert (runs, rounds) == ("3", "6")


@pytest.mark.usefixtures("uncounted")
def test_finished_runs_are_said_and_not_counted(tiny_run: Path, tiny_experiment: Experiment) -> None:
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    other = dataclasses.replace(tiny_experiment, seed=1)
    lines = printed(tiny_experiment, other, out=tiny_run)
    assert lines[0] == "suite mine: 2 runs, 1 of them finished before"
    assert cells(lines, "in all")[0][2:4] == ["1", "2"]
    assert any(line.endswith(f"finished before, run {tiny_experiment.run_id}") for line in lines)
    assert any(line.endswith(f"0.5: run {other.run_id}") for line in lines)
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before
    assert printed(tiny_experiment, out=tiny_run)[:1] == ["suite mine: 1 runs, 1 of them finished before"]


@pytest.mark.usefixtures("uncounted")
def test_without_data_the_rest_is_planned_and_what_is_missing_is_said(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedsim.learning.training, "seconds_of_step", lambda *_: pytest.fail("hours need the data"))
    data = DataConfig("cifar10", image_size=8, channels=1)
    experiment = dataclasses.replace(tiny_experiment, task=TaskConfig(data, patch_size=4), algorithm=FedAvg(**LOCAL))
    crowded = dataclasses.replace(tiny_experiment, partition=Partition(min_size=50), algorithm=FedAvg(**LOCAL))
    lines = printed(experiment, crowded, out=tmp_path, data_dir=str(tmp_path))
    for row, name in zip(cells(lines, "fedavg"), ("cifar10", "digits"), strict=True):
        assert row[1] == name and float(row[-4]) > 0 and row[-3:] == ["-", "-", "-"]
    missing = [line for line in lines if line.startswith("FLOPs and hours cannot be told without the data: ")]
    assert len(missing) == 2 and "task.data.name='cifar10'" in missing[0] and "min_size=50" in missing[1]


# which suites, how large, on what data --------------------------------------------------------------------------------


def experiments_of(name: str, *words: str) -> list[Experiment]:
    return selected(suites_in(suites), name, parser().parse_args(["sweep", "--seeds", "0", *words]))


def test_a_suite_is_spelled_with_hyphens_or_underscores() -> None:
    assert "paper-cv" in suites_in(suites) and "paper_cv" not in suites_in(suites)
    assert experiments_of("cifar_subset") == experiments_of("cifar-subset")


@pytest.mark.usefixtures("uncounted")
def test_results_have_the_spelling_with_hyphens(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def two_words(scale: float = 1.0) -> list[Experiment]:
        return [dataclasses.replace(tiny_experiment, algorithm=FedAvg(**LOCAL), rounds=1 if scale < 1 else 2)]

    two_words.__module__ = "benchmarks.suites"
    monkeypatch.setattr("benchmarks.suites.two_words", two_words, raising=False)
    monkeypatch.chdir(tmp_path)
    words = ["--suite", "two_words", "two-words", "--scale", "0.5", "--seeds", "0", "--runtime", "inline"]
    assert sweep.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("suite two-words: 1 runs\n")
    assert not [*tmp_path.iterdir()]
    assert sweep.main(words) == 0
    runs = load(tmp_path / "results" / "two-words").runs
    assert (runs.suite.tolist(), runs.rounds.tolist()) == (["two-words"], [1])


def test_a_scale_is_handed_to_the_suite() -> None:
    small, smaller = (experiments_of("paper-cv", "--scale", scale, "--data", "cifar10") for scale in ("0.1", "0.05"))
    assert (small[0].rounds, smaller[0].rounds) == (20, 10)
    assert {each.task.data.name for each in small} == {"cifar10"} and len(small) == 36
    assert {each.algorithm.name for each in experiments_of("paper_cv", "--scale", "0.1", "--only", "fedit")} == {
        "fedit"
    }


@pytest.mark.parametrize(
    "words, expected",
    [
        (["quick", "--scale", "0.5"], ["--scale=0.5", "'quick'", "paper-cv, paper-nlp"]),
        (["paper-cv", "--scale", "0"], ["--scale=0.0", "at least 0.001 and at most 1"]),
        (["paper-cv", "--scale", "1.5"], ["--scale=1.5", "at least 0.001 and at most 1"]),
        (["paper-cv", "--scale", "nan"], ["--scale=nan"]),
        (["quick", "--data", "digit"], ["--data='digit'", "'quick'", "did you mean digits?"]),
        (["text", "--data", "pydoc", "digits"], ["--data='digits'", "'text'", "there are ag_news, pydoc, sst2"]),
        (["paper_vc"], ["--suite='paper_vc'", "did you mean paper-cv"]),
    ],
)
def test_what_a_suite_does_not_have_is_refused(words: list[str], expected: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        experiments_of(*words)
    for word in expected:
        assert word in str(refused.value)


def test_algorithms_and_data_that_never_meet_are_refused(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(tiny_experiment, algorithm=FedAvg(), task=TaskConfig(digits(limit=90, name="mine.csv")))

    def apart() -> list[Experiment]:
        return [tiny_experiment, other]

    apart.__module__ = "benchmarks.suites"
    monkeypatch.setattr("benchmarks.suites.apart", apart, raising=False)
    assert len(experiments_of("apart", "--data", "digits", "--only", "fedgrow")) == 1
    with pytest.raises(ValueError, match=r"--only=\['fedavg'\], --data=\['digits'\]: suite 'apart' has no such"):
        experiments_of("apart", "--only", "fedavg", "--data", "digits")
