"""Statistics over seeds, against numbers that can be checked with a table of Student's t and a pencil."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tune import best_of, grids_of, on_edge
from fedsim.report.comparison import differences, holm, interval, reference_of, to_target
from fedsim.report.notes import notes
from fedsim.report.readings import best_validated, read
from fedsim.report.tables import summary
from fedsim.results.tables import SCHEMAS, load, write_table
from tests.report.test_report import add_run, row_of


NAN = math.nan


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0, NAN])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)  # t with 2 degrees of freedom, sd 1
    assert interval([0.5] * 4).half == 0.0


@pytest.mark.parametrize("values, mean", [([0.7], 0.7), ([NAN, 0.7], 0.7)])
def test_one_seed_has_no_interval(values: list[float], mean: float) -> None:
    found = interval(values)
    assert found.mean == mean and math.isnan(found.half) and found.n == 1
    assert math.isnan(interval([]).mean)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 is 0.03, 0.06, 0.04, and the last may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.5, NAN, 0.9])
    assert (adjusted[0], adjusted[2]) == (1.0, 1.0) and math.isnan(adjusted[1])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    ordered = [q for _, q in sorted(zip(p_values, adjusted, strict=True))]
    assert ordered == sorted(ordered)
    assert adjusted[p_values.index(min(p_values))] == min(1.0, len(p_values) * min(p_values))


def runs_of(method: str, accuracies: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    run = {"method": method, "algorithm": method.split()[0], "leaves": "model", "accuracy_val": 0.5}
    return [run | {"seed": seed, "accuracy": accuracy} | more for seed, accuracy in enumerate(accuracies)]


def test_paired_differences_by_hand() -> None:
    runs = runs_of("fedgrow (paper)", [0.1, 0.2, 0.3]) + runs_of("fedavg", [0.3, 0.5, 0.7])
    found = differences(runs, "accuracy", "fedgrow (paper)")
    assert list(found) == ["fedavg"]  # the reference is not compared with itself
    # 0.2, 0.3, 0.4: mean 0.3, sd 0.1; t = 0.3 / (0.1 / sqrt 3) = 5.196, p = 0.0351 with 2 degrees of freedom
    assert found["fedavg"].difference.mean == pytest.approx(0.3)
    assert found["fedavg"].difference.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), abs=1e-5)
    assert found["fedavg"].p == pytest.approx(0.0351, abs=1e-4)


def test_pairs_are_seeds_that_both_have() -> None:
    reference = runs_of("fedgrow (paper)", [0.0, 0.0, 0.0])
    other = [run for run in runs_of("fedavg", [0.9, 0.2, 0.4]) if run["seed"]]
    found = differences(reference + other, "accuracy", "fedgrow (paper)")["fedavg"]
    assert found.difference.n == 2 and found.difference.mean == pytest.approx(0.3)
    alone = differences(reference + other[:1], "accuracy", "fedgrow (paper)")["fedavg"]
    assert alone.difference.mean == pytest.approx(0.2) and math.isnan(alone.p)


def test_correction_counts_the_methods() -> None:
    runs = runs_of("fedgrow (paper)", [0.1, 0.2, 0.3]) + runs_of("fedavg", [0.3, 0.5, 0.7])
    alone = differences(runs, "accuracy", "fedgrow (paper)")["fedavg"].p
    both = differences(runs + runs_of("fedit", [0.3, 0.5, 0.7]), "accuracy", "fedgrow (paper)")["fedavg"].p
    assert both == pytest.approx(2 * alone)


def test_the_reference_is_chosen_by_validation_not_by_test() -> None:
    good, bad = runs_of("fedgrow (paper)", [0.1], accuracy_val=0.9), runs_of("fedgrow (aki)", [0.8], accuracy_val=0.2)
    assert reference_of(good + bad) == "fedgrow (paper)"
    assert reference_of(runs_of("fedavg", [0.9])) == "fedavg", "nobody else is there"
    assert reference_of(good + bad, "fedgrow (aki)") == "fedgrow (aki)"
    assert reference_of(good + runs_of("fedavg", [0.9]), "fedavg") == "fedavg"
    assert reference_of(runs_of("fedavg", [0.9], accuracy_val=NAN), "fedavg") == "fedavg", "it was named"
    silent = [run | {"upload_mb": 0.0} for run in runs_of("fedgrow_no_federation (paper)", [0.8])]
    sending = [run | {"upload_mb": 1.0} for run in runs_of("fedavg", [0.9])]
    assert reference_of(silent + sending) == "fedavg", "what sent nothing is no budget"
    assert reference_of(silent) == "fedgrow_no_federation (paper)"
    assert reference_of(runs_of("fedgrow (paper)", [0.9], accuracy_val=NAN)) is None


def test_costs_to_a_target_with_runs_that_never_reach_it() -> None:
    def runs(*costs: tuple[bool, float]) -> list[dict[str, Any]]:
        return [{"reached": reached, "target_mb": cost} for reached, cost in costs]

    found = to_target(runs((True, 3.0), (True, 1.0), (True, 2.0)), "mb")
    assert (found.median, found.censored, found.reached, found.n) == (2.0, False, 3, 3)
    # The one that gave up after 0.5 would have needed more than that: it counts as the slowest.
    found = to_target(runs((True, 3.0), (True, 1.0), (False, 0.5)), "mb")
    assert (found.median, found.censored, found.reached) == (3.0, False, 2)
    found = to_target(runs((True, 3.0), (False, 10.0), (False, 10.0)), "mb")
    assert (found.median, found.censored, found.reached) == (10.0, True, 1)
    assert math.isnan(to_target(runs((False, NAN)), "mb").median)


def test_best_validated_round_does_not_look_at_the_test_score() -> None:
    rows = [
        {"round": 0, "accuracy_mean": 0.9, "accuracy_val_mean": 0.2},
        {"round": 1, "accuracy_mean": 0.4, "accuracy_val_mean": 0.7},
        {"round": 2, "accuracy_mean": 0.8, "accuracy_val_mean": 0.7},
        {"round": 3, "accuracy_mean": NAN, "accuracy_val_mean": NAN},
    ]
    found = best_validated(rows)
    assert found is not None and found["round"] == 1  # of equal ones the first
    assert best_validated(rows[3:]) is None


def add_clients(directory: Path, run_id: str, accuracies: Sequence[float | None], small: str | None = None) -> None:
    rows = [
        dict.fromkeys(SCHEMAS["clients"].names)
        | dict(run_id=run_id, algorithm="a", seed=0, round=round_, client=client, num_examples=10, stage="local")
        | dict(bytes_up=0, bytes_down=0, retries=0, accuracy=accuracy if round_ else 0.0)
        | dict(small_sha256=None if small is None or round_ else f"{small}{client}")
        for round_ in (0, 3)
        for client, accuracy in enumerate(accuracies)
    ]
    write_table(directory, "clients", run_id, rows)


def test_the_worst_tenth_is_read_after_the_last_scored_round(tmp_path: Path) -> None:
    run = add_run(tmp_path, "fedgrow", [0.1, 0.5], 100, preset="paper")
    add_clients(tmp_path, run, [0.5 + 0.01 * client for client in range(20)])
    other = add_run(tmp_path, "fedavg", [0.1, 0.5], 100)
    add_clients(tmp_path, other, [0.3, 0.2, 0.4])
    table = summary(load(tmp_path))
    assert row_of(table, "fedgrow (paper)")["accuracy_bottom"] == pytest.approx((0.5 + 0.51) / 2)  # 2 of 20
    assert row_of(table, "fedavg")["accuracy_bottom"] == pytest.approx(0.2)  # one of three, at least


def test_equal_flops_and_costs_to_the_target(tmp_path: Path) -> None:
    """Every round costs one FLOP, as `add_run` has it: Fed-Grow's three rounds and round 0 are the budget."""
    add_run(tmp_path, "fedgrow", [0.1, 0.5, 0.6, 0.7], 100, preset="paper")
    add_run(tmp_path, "fedavg", [0.1, 0.4, 0.6, 0.7, 0.85, 0.9], 250)
    fedavg = row_of(summary(load(tmp_path)), "fedavg")
    assert (fedavg["equal_flops_accuracy"], fedavg["equal_flops_round"]) == (0.7, 3)
    assert (fedavg["accuracy"], fedavg["chosen_round"]) == (0.9, 5)
    assert (fedavg["target"], fedavg["target_rounds"], fedavg["target_mb"], fedavg["target_flops"]) == (0.8, 4, 2.0, 5)
    paper = row_of(summary(load(tmp_path)), "fedgrow (paper)")
    assert paper["target_censored"] and paper["target_rounds"] == 3 and paper["target_reached"] == 0
    assert read(load(tmp_path), target=0.55).runs[0]["target_rounds"] == 2


def test_other_small_models_are_said(tmp_path: Path) -> None:
    for algorithm, small in (
        ("fedgrow", "x"),
        ("fedgrow_no_federation", "x"),
        ("fedgrow_joint", "y"),
        ("fedavg", None),
    ):
        preset = None if algorithm == "fedavg" else "paper"
        add_clients(tmp_path, add_run(tmp_path, algorithm, [0.1, 0.5], 1, preset=preset), [0.1, 0.2], small)
    (line,) = [note for note in notes(load(tmp_path)) if "small models" in note]
    assert line.endswith("fedgrow (paper), fedgrow_no_federation (paper); fedgrow_joint (paper).") or line.endswith(
        "fedgrow (paper); fedgrow_no_federation (paper), fedgrow_joint (paper)."
    )
    assert "fedavg" not in line.partition("same")[2]


def test_the_same_small_models_are_not_worth_a_word(tmp_path: Path) -> None:
    for algorithm in ("fedgrow", "fedgrow_no_federation"):
        add_clients(tmp_path, add_run(tmp_path, algorithm, [0.1, 0.5], 1, preset="paper"), [0.1, 0.2], "x")
    # Of `exclusive`, only those train a small model who cannot train the target: fewer, but no others.
    add_clients(tmp_path, add_run(tmp_path, "exclusive", [0.1, 0.5], 1), [0.1], "x")
    assert not [note for note in notes(load(tmp_path)) if "small models" in note]


def test_variants_are_named_by_what_does_not_go_without_saying(tmp_path: Path) -> None:
    """`draw` has the default "own"; `small_epochs` none among these, so the most frequent is left out."""
    kind = {"class": "fedgrow_algo.fedgrow.FedGrow", "preset": "paper", "lr": 0.1, "small_epochs": 15, "draw": "own"}
    variants = [kind, kind | {"draw": "common", "lr": 0.3}, kind | {"draw": "common", "small_epochs": 1}]
    for variant in variants:
        add_run(tmp_path, "fedgrow", [0.1, 0.5], 1, preset="paper", config={"algorithm": variant})
    assert {run["method"] for run in read(load(tmp_path)).runs} == {
        "fedgrow (paper)",
        "fedgrow (paper) init=common",
        "fedgrow (paper) small_epochs=1 init=common",
    }
    add_run(tmp_path, "fedgrow", [0.1, 0.5], 1, preset="paper", config={"algorithm": kind | {"lr": 0.2}})
    rates = {run["method"] for run in read(load(tmp_path)).runs}  # now a rate alone tells two of them apart
    assert {"fedgrow (paper)", "fedgrow (paper) lr=0.2", "fedgrow (paper) lr=0.3 init=common"} < rates


def test_rates_are_chosen_by_setting_and_variant_on_the_mean_over_seeds(tmp_path: Path) -> None:
    def tried(lr: float, accuracy: float, **run: Any) -> None:
        algorithm = {"class": "baselines.fedavg.FedAvg", "lr": lr, "epochs": run.pop("epochs", 1)}
        about: dict[str, Any] = {
            "config": {"seed": run.get("seed", 0), "algorithm": algorithm, "data": run.get("dataset", "digits")}
        }
        add_run(tmp_path, "fedavg", [0.1, accuracy], 1, **run, **about)

    tried(0.1, 0.4)
    tried(0.2, 0.7)
    tried(0.2, 0.1, seed=1)  # 0.4 on average, as the smaller rate
    tried(0.3, 0.3)
    tried(0.1, 0.9, epochs=2)
    tried(0.2, 0.8, epochs=2)
    tried(0.3, 0.9, dataset="cifar10")
    digits, cifar = (
        grid
        for dataset in ("digits", "cifar10")
        for setting, grid in grids_of(load(tmp_path)).items()
        if dataset in setting
    )
    assert {method: best_of(rates) for method, rates in digits.items()} == {"fedavg": 0.1, "fedavg epochs=2": 0.1}
    assert digits["fedavg"] == {0.1: [0.4], 0.2: [0.7, 0.1], 0.3: [0.3]}
    assert {method: best_of(rates) for method, rates in cifar.items()} == {"fedavg": 0.3}
    assert on_edge(digits["fedavg"]) and not on_edge({0.1: [0.2], 0.2: [0.5], 0.3: [0.4]})
