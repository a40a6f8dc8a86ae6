"""What the page says of attacks: a table, curves, accuracy against leakage, images; nothing where there are none."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.core.sealed import Damaged
from fedsim.report.document import write_report
from fedsim.report.leakage import curves, leakage, pictures, rows_of, trade_off
from fedsim.report.readings import read
from fedsim.results.pictures import TRUE, name_of, path_of, read_pictures, write_pictures
from fedsim.results.tables import load, read_table, write_table
from fedsim.results.tables import rows_of as rows_of_table
from tests.report.test_report import add_quick, add_run, written


Measured = tuple[str, str, int, int | None, str, float, float | None, float | None]
PARTS = ("What leaks", "Who is a member, by a score", "What privacy costs", "An image of one participant")


def audited(folder: Path, run_id: str, measured: list[Measured], points: Sequence[tuple[Any, ...]] = ()) -> None:
    """Write what attacks found. - `measured`: attack, knowledge, round, client, metric, value, low, high.
    - `points`: attack, knowledge, round, client, fpr, tpr."""
    run = {"run_id": run_id, "algorithm": "fedavg", "seed": 0, "method": "fedavg"}
    names = ("attack", "knowledge", "round", "client", "metric", "value", "low", "high")
    write_table(folder, "attacks", run_id, [run | dict(zip(names, each, strict=True)) for each in measured])
    names = (*names[:4], "fpr", "tpr")
    write_table(folder, "roc", run_id, [run | dict(zip(names, each, strict=True)) for each in points])


def epsilon_of(folder: Path, run_id: str, epsilon: float | None) -> None:
    rows = [row for row in rows_of_table(read_table(folder, "rounds"), "rounds") if row["run_id"] == run_id]
    write_table(folder, "rounds", run_id, [row | {"epsilon": epsilon} for row in rows])


LOSS: list[Measured] = [
    ("loss", "shared", 1, None, "auc", 0.9, 0.8, 1.0),  # of an earlier round
    ("loss", "shared", 3, 0, "auc", 0.7, 0.6, 0.8),  # of one participant
    ("loss", "shared", 3, None, "auc", 0.6, 0.5, 0.75),
    ("loss", "shared", 3, None, "tpr_at_1_percent", 0.02, 0.01, 0.03),
    ("labels", "shared", 3, None, "distance", 0.25, None, None),
    ("labels", "shared", 3, None, "distance_chance", 0.5, 0.4, 0.6),
    ("inputs", "intermediate", 3, None, "psnr", 61.26, None, None),
]


def test_the_table_reads_the_last_round_over_all_participants(tmp_path: Path) -> None:
    audited(tmp_path, add_run(tmp_path, "fedavg", [0.1, 0.9], 250), LOSS)
    results = load(tmp_path)
    runs, attacks = read(results).runs, rows_of(results, "attacks")
    assert [[*row.values()] for row in leakage(runs, attacks)] == [
        [
            "fedavg",
            "loss",
            "shared",
            "auc",
            "0.600 (0.500 .. 0.750)",
            "0.500",
            "tpr_at_1_percent 0.020 (0.010 .. 0.030)",
        ],
        ["fedavg", "labels", "shared", "distance", "0.250", "0.500 (0.400 .. 0.600)", "-"],
        ["fedavg", "inputs", "intermediate", "psnr", "61.3 dB", "-", "-"],
    ]


def test_intervals_are_over_seeds_where_there_are_several(tmp_path: Path) -> None:
    for seed, value in ((0, 0.6), (1, 0.62)):
        run_id = add_run(tmp_path, "fedavg", [0.1, 0.9], 250, seed=seed)
        audited(tmp_path, run_id, [("loss", "shared", 1, None, "auc", value, 0.1, 0.9)])
    results = load(tmp_path)
    (row,) = leakage(read(results).runs, rows_of(results, "attacks"))
    assert row["value (95 % interval)"] == "0.610 (0.483 .. 0.737)"  # 12.706 x 0.01414 / sqrt 2


def test_a_curve_a_seed_of_the_attacker_who_knows_most(tmp_path: Path) -> None:
    shared, knowing = [(0.0, 0.5), (1.0, 1.0)], [(0.0, 0.7), (0.5, 1.0), (1.0, 1.0)]
    points = [("loss", "shared", 3, None, *point) for point in shared]
    points += [("loss", "intermediate", 3, None, *point) for point in knowing]
    points += [("loss", "intermediate", 3, 0, 0.0, 0.1), ("loss", "intermediate", 1, None, 0.0, 0.2)]
    audited(tmp_path, add_run(tmp_path, "fedavg", [0.1, 0.9], 250), LOSS, points)
    results = load(tmp_path)
    assert curves(read(results).runs, rows_of(results, "roc")) == {"loss": {"fedavg": [knowing]}}


def test_accuracy_against_leakage_goes_over_epsilon(tmp_path: Path) -> None:
    for sigma, epsilon, auc, accuracy in ((0, None, 0.7, 0.9), (2, 1.0, 0.5, 0.6), (1, 8.01, 0.6, 0.8)):
        for seed in (0, 1):
            run_id = add_run(tmp_path, "fedavg", [0.1, accuracy + seed / 100], 250, seed=seed, config={"sigma": sigma})
            epsilon_of(tmp_path, run_id, epsilon)
            audited(tmp_path, run_id, [("loss_deployed", "shared", 1, None, "auc", auc + seed / 10, None, None)])
    results = load(tmp_path)
    readings = read(results)
    found = trade_off(readings.runs, rows_of(results, "attacks"), readings.rounds)
    assert [*found] == ["fedavg"] and [name for name, _, _ in found["fedavg"]] == ["1", "8", "no noise"]
    numbers = [number for _, *point in found["fedavg"] for number in point]
    assert numbers == pytest.approx([0.55, 0.605, 0.65, 0.805, 0.75, 0.905])
    plain = [run for run in readings.runs if run["parsed"]["sigma"] == 0]
    assert trade_off(plain, rows_of(results, "attacks"), readings.rounds) == {}


def images() -> dict[str, np.ndarray]:
    true = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    return {name_of(3, TRUE): true, name_of(3, "inputs", "shared"): true + 1, name_of(1, TRUE): true + 2}


def test_images_are_those_of_the_last_round_and_lie_with_what_is_private(tmp_path: Path) -> None:
    run_id = add_run(tmp_path, "fedavg", [0.1, 0.9], 250)
    path = path_of(tmp_path, run_id)
    assert path.parent.name == "private" and read_pictures(tmp_path, run_id) == {}
    path.parent.mkdir(parents=True)
    write_pictures(tmp_path, run_id, images())
    ((method, found),) = pictures(read(load(tmp_path)).runs, load(tmp_path)).items()
    assert method == "fedavg" and [*found] == [TRUE, "inputs/shared"]
    assert found[TRUE][1, 1, 0] == 5 and found["inputs/shared"][1, 1, 0] == 6
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"pictures.safetensors: not readable pictures"):
        read_pictures(tmp_path, run_id)
    write_pictures(tmp_path, run_id, {})
    assert not path.exists()


def test_the_page_has_every_part_and_none_without_attacks(tmp_path: Path) -> None:
    run_id = add_run(tmp_path, "fedavg", [0.1, 0.9], 250)
    other = add_run(tmp_path, "fedavg", [0.1, 0.8], 250, config={"sigma": 1})
    page = write_report(tmp_path)
    assert isinstance(page, Path)
    assert not [part for part in PARTS if part in page.read_text()]
    assert not [*(tmp_path / "report_figures").glob("0-roc.svg")]
    deployed: Measured = ("loss_deployed", "shared", 3, None, "auc", 0.6, 0.5, 0.7)
    audited(tmp_path, run_id, [*LOSS, deployed], [("loss", "shared", 3, None, rate, rate) for rate in (0.0, 1.0)])
    audited(tmp_path, other, [deployed])
    epsilon_of(tmp_path, other, 2.0)
    path_of(tmp_path, run_id).parent.mkdir(parents=True)
    write_pictures(tmp_path, run_id, images())
    write_report(tmp_path)
    html, markdown = page.read_text(), (tmp_path / "report.md").read_text()
    for part in PARTS:
        assert part in html and part in markdown
    assert "0.600 (0.500 .. 0.750)" in html
    drawn = {path.name for path in (tmp_path / "report_figures").glob("*.svg")}
    assert {"0-roc.svg", "0-trade-off.svg", "0-pictures.svg"} < drawn
    assert len(re.findall(r"0-(?:roc|trade-off|pictures)\.svg", markdown)) == 3


def test_methods_are_called_by_what_is_around_them(tmp_path: Path) -> None:
    method = {"class": "baselines.fedavg.FedAvg", "name": "fedavg", "lr": 0.1}
    pairs = [{"class": "fedsim.privacy.example_dp.ExampleDP", "clip": 1, "accountant": "rdp"}]
    private = {"class": "fedsim.privacy.pairs.Around", "method": method, "pairs": pairs}
    for algorithm in (method, private):
        add_run(tmp_path, "fedavg", [0.1, 0.9], 250, config={"algorithm": algorithm})
    names = {run["method"] for run in read(load(tmp_path)).runs}
    assert names == {"fedavg", "fedavg around=ExampleDP(clip=1)"}, "rdp is the default"


def test_names_of_attacks_are_text(tmp_path: Path) -> None:
    add_quick(tmp_path)
    run_id = load(tmp_path).runs.run_id[0]
    bad = "<script>$x_$</script>\x1b[2J"
    audited(tmp_path, run_id, [(bad, bad, 3, None, bad, 0.6, None, None)], [(bad, bad, 3, None, 0.5, 0.5)])
    page = write_report(tmp_path)
    assert isinstance(page, Path)
    for text in (written(page.read_text()), (tmp_path / "report.md").read_text()):
        assert "<script" not in text and "\x1b" not in text
