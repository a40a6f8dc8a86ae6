"""What `fedsim.load`, `fedsim.run` and `fedsim.sweep` answer, and what the report compares with."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from baselines.fedavg import FedAvg
from fedsim.cli import main
from fedsim.core.canonical import revived
from fedsim.experiment import Experiment
from fedsim.report.tables import summary
from fedsim.results.tables import Results


@pytest.fixture(scope="module")
def swept(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds each, by `fedsim.sweep`. Do not write to it."""
    out = tmp_path_factory.mktemp("swept")
    fedsim.sweep([tiny_experiment, replace(tiny_experiment, algorithm=FedAvg())], out=out, seeds=(0, 1))
    return out


def test_a_sweep_computes_every_experiment_with_every_seed_and_no_run_twice(
    swept: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    runs = fedsim.load(swept).runs
    assert sorted(zip(runs.algorithm, runs.seed, strict=True)) == [
        ("fedavg", 0),
        ("fedavg", 1),
        ("fedgrow", 0),
        ("fedgrow", 1),
    ]
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*.parquet")}
    again = fedsim.sweep([tiny_experiment], out=swept, seeds=[1])
    assert "finished before" in capsys.readouterr().out and len(again.runs) == 4
    assert before == {path: path.stat().st_mtime_ns for path in swept.rglob("*.parquet")}


def test_one_run_into_the_folder_of_others_is_refused_and_told_of_sweeps(
    swept: Path, tiny_experiment: Experiment
) -> None:
    with pytest.raises(ValueError, match="holds a different experiment"):
        fedsim.run(replace(tiny_experiment, seed=7), out=swept)
    wrong: Any
    for wrong, said in (
        ({"seeds": []}, r"seeds=\[\]"),
        ({"runtime": "rey"}, "runtime='rey': must be one of ray, inline"),
        ({"hosts": 0}, "hosts=0"),
        ({"jobs": 0}, "jobs=0"),
    ):
        with pytest.raises(ValueError, match=said):
            fedsim.sweep([tiny_experiment], out=swept, **wrong)
    with pytest.raises(ValueError, match="must be an Experiment"):
        fedsim.sweep([None], out=swept)  # pyright: ignore[reportArgumentType]


def test_a_table_compares_with_fedgrow_or_with_what_is_named(swept: Path) -> None:
    results = fedsim.load(swept)
    table, other = results.table(), results.table(reference="fedavg")
    assert set(table.reference) == {"fedgrow (paper)"} and set(other.reference) == {"fedavg"}
    ours, theirs = (frame.set_index("method").accuracy_difference for frame in (table, other))
    assert ours["fedavg"] == -theirs["fedgrow (paper)"] and math.isnan(ours["fedgrow (paper)"])
    with pytest.raises(ValueError, match=r"reference='fedprox'.* fedavg, fedgrow, fedgrow \(paper\)"):
        results.table(reference="fedprox")


def test_without_fedgrow_the_first_method_is_what_others_are_compared_with(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    methods = [replace(tiny_experiment, rounds=1, algorithm=FedAvg(of=of)) for of in ("intermediate", "smallest")]
    results = fedsim.sweep(methods, out=tmp_path, seeds=(0, 1))
    table = summary(results).set_index("method")
    assert list(table.index) == ["fedavg_small", "fedavg_mid"], "in the order of lists"
    assert set(table.reference) == {"fedavg_small"} and not math.isnan(table.equal_bytes_accuracy["fedavg_mid"])


def test_comparing_two_methods_is_a_paired_difference(swept: Path) -> None:
    results = fedsim.load(swept)
    found = results.compare("fedavg", "fedgrow (paper)")
    last = results.rounds[results.rounds["round"] == 2].set_index(["algorithm", "seed"]).accuracy_mean
    by_hand = [last["fedavg", seed] - last["fedgrow", seed] for seed in (0, 1)]
    assert found.difference.mean == pytest.approx(sum(by_hand) / 2, abs=1e-12) and found.difference.n == 2
    back = results.compare("fedgrow (paper)", "fedavg")
    assert back.difference.mean == -found.difference.mean and (back.p == found.p or math.isnan(found.p))
    at_equal_bytes = results.compare("fedgrow (paper)", "fedavg", at="bytes").difference.mean
    table = results.table(reference="fedavg").set_index("method")
    assert at_equal_bytes == table.equal_bytes_accuracy_difference["fedgrow (paper)"], "within what FedAvg sent"
    with pytest.raises(ValueError, match="a='fedprox'"):
        results.compare("fedprox", "fedavg")
    with pytest.raises(ValueError, match="two methods"):
        results.compare("fedavg", "fedavg")
    with pytest.raises(ValueError, match="at='time'"):
        results.compare("fedavg", "fedgrow (paper)", at="time")


def test_the_best_run_is_chosen_on_validation_alone(swept: Path) -> None:
    results = fedsim.load(swept)
    last = results.rounds[results.rounds["round"] == 2].set_index("run_id")
    best = results.best()
    assert last.accuracy_val_mean[best["run_id"]] == last.accuracy_val_mean.max()
    assert results.best("fedavg")["algorithm"] == "fedavg"
    with pytest.raises(ValueError, match="fedprox"):
        results.best("fedprox")


def test_a_plot_has_a_line_a_method(swept: Path) -> None:
    results = fedsim.load(swept)
    for against in ("rounds", "MB", "FLOPs"):
        (axes,) = results.plot("loss_mean", against=against).axes
        assert [line.get_label() for line in axes.get_lines()] == ["fedgrow (paper)", "fedavg"]
    (axes,) = results.plot("bytes_up").axes
    assert [int(x) for x in np.asarray(axes.get_lines()[1].get_xdata())] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"y='acuracy_mean'.*accuracy_mean"):
        results.plot("acuracy_mean")
    with pytest.raises(ValueError, match="against='time'"):
        results.plot(against="time")
    with pytest.raises(ValueError, match=r"simulated_seconds.*no round"):
        results.plot("simulated_seconds")


def test_a_setting_is_chosen_by_its_name_or_a_part_of_it(tiny_experiment: Experiment, tmp_path: Path) -> None:
    base = replace(tiny_experiment, rounds=1, algorithm=FedAvg())
    results = fedsim.sweep([base, replace(base, cohort=2)], out=tmp_path)
    whole = "sweep: digits, vit, dirichlet (alpha 0.5), 3 participants"
    assert results.best(setting=whole)["cohort"] == 3 and results.best(setting="2 a round")["cohort"] == 2
    with pytest.raises(ValueError, match="exactly one of"):
        results.best()


def test_folders_are_read_as_one_and_reported_together(
    swept: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    fedsim.run(with_seed(fedsim.load(tiny_run), 5), out=other)
    both = fedsim.load(swept, other)
    assert len(both.runs) == 5 and len(both.clients) == len(fedsim.load(swept).clients) * 5 // 4
    page = tmp_path / "page.html"
    assert main(["report", str(swept), str(other), "--out", str(page), "--reference", "fedavg"]) == 0
    said = page.with_suffix(".md").read_text()
    assert "swept" in page.read_text() and "--reference fedavg" in said
    assert "The reference, **fedavg**" in said and "without federation" not in said
    with pytest.raises(ValueError, match="more than one"):
        fedsim.load(swept, swept)
    for path in (other / "runs").iterdir():  # a copy made before its run had finished
        path.unlink()
    again = tmp_path / "again"
    shutil.copytree(other, again)
    with pytest.raises(ValueError, match="more than one"):
        fedsim.load(other, again)
    with pytest.raises(ValueError, match="at least one"):
        fedsim.load()
    capsys.readouterr()
    assert main(["report", str(swept), "--reference", "fedprox"]) == 2
    assert "reference='fedprox'" in capsys.readouterr().err


def with_seed(results: Results, seed: int) -> Experiment:
    """The one experiment of some results, at another seed."""
    return replace(revived(json.loads(results.runs.config[0])), seed=seed)


def test_names_that_scripts_import_are_there_and_nothing_heavy_is_loaded_for_them() -> None:
    program = "import sys, fedsim; fedsim.run, fedsim.sweep, fedsim.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    for name in ["Experiment", "Tier", "Form", "Partition", "DataConfig", "TaskConfig", "from_pretrained"]:
        found: Callable = getattr(fedsim, name)
        assert found.__name__ == name and name in dir(fedsim)
    with pytest.raises(AttributeError, match="Experimnt"):
        fedsim.Experimnt  # noqa: B018
