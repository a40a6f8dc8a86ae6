"""What the suites hold: the paper's settings at full size, less of everything at a smaller scale."""

from typing import Any

import pytest

from baselines.fedavg import FedAvg
from benchmarks import suites
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import LocalTraining
from fedsim.experiment import Experiment
from fedsim.learning.augmentation import Augmentation
from fedsim.models import Form


def cells(experiments: list[Experiment]) -> dict[tuple[str, int], set[tuple[Any, ...]]]:
    """(data set, participants) -> what Fed-Grow's runs on it have: rounds, epochs, epochs alone, batch, rate."""
    found: dict[tuple[str, int], set[tuple[Any, ...]]] = {}
    for each in experiments:
        if isinstance(grow := each.algorithm, FedGrow):
            key = (each.task.data.name, each.participants)
            row = (each.rounds, grow.epochs, grow.small_epochs, grow.local_epochs, grow.batch_size, grow.lr)
            found.setdefault(key, set()).add(row)
    return found


def test_paper_cv_at_full_size_is_the_released_code():
    experiments = suites.paper_cv()
    assert cells(experiments) == {
        ("cifar10", 10): {(200, 4, 50, 50, 64, 5e-4)},
        ("cifar10", 20): {(200, 8, 100, 100, 64, 5e-4)},
        ("cifar100", 10): {(200, 4, 50, 50, 64, 5e-4)},
        ("cifar100", 20): {(200, 8, 100, 100, 64, 5e-4)},
        ("flowers102", 10): {(100, 40, 200, 200, 64, 5e-4)},
        ("flowers102", 20): {(100, 40, 200, 200, 64, 5e-4)},
    }
    for each in experiments:
        assert [tier.form for tier in each.tiers] == [Form(256, depth, 8) for depth in (2, 3, 4)]
        assert (each.intermediate, each.target) == (Form(320, 4, 8), Form(384, 6, 8))
        assert (each.task.data.image_size, each.task.patch_size, each.task.data.limit) == (224, 16, None)
        assert all(tier.num_gpus == 0.25 for tier in each.tiers)
    dealt = {(each.partition.scheme, each.partition.alpha) for each in experiments}
    assert dealt == {("dirichlet", 0.5), ("dirichlet", 100.0)}


def test_paper_cv_trains_every_method_for_as_long():
    for each in suites.paper_cv():
        if isinstance(each.algorithm, FedAvg | FedGrow):
            expected = {"cifar10": {10: 4, 20: 8}, "cifar100": {10: 4, 20: 8}, "flowers102": {10: 40, 20: 40}}
            assert each.algorithm.epochs == expected[each.task.data.name][each.participants]


def test_paper_cv_augments_images_for_every_method():
    asked = {each.task.augmentation for scale in (1.0, 0.1) for each in suites.paper_cv(scale)}
    assert asked == {Augmentation(crop=(0.08, 1.0), flip=0.5, randaugment=2, magnitude=9, erase=0.25)}


def test_paper_nlp_warms_up_and_decays_for_every_method():
    for each in suites.paper_nlp(0.5):
        assert isinstance(each.algorithm, LocalTraining)
        settings = each.algorithm.settings()
        asked = {"schedule": "linear", "lr_warmup": 0.06, "clip": 1.0, "weight_decay": 0.01, "optimizer": "adamw"}
        assert {name: settings[name] for name in asked} == asked
        assert each.task.dropout == 0.1


def test_paper_nlp_keeps_the_proportions_of_the_released_code():
    # At full size its tokenizer is the hub's; half of it is what can be built anywhere.
    assert cells(suites.paper_nlp(0.5)) == {
        (name, participants): {row}
        for name, row in (
            ("ag_news", (50, 1, 5, 5, 32, 1e-4)),
            ("newsgroups", (100, 5, 50, 50, 32, 3e-4)),
        )
        for participants in (10, 20)
    }


@pytest.mark.parametrize("make", [suites.paper_cv, suites.paper_nlp])
def test_a_smaller_scale_has_the_same_cells_and_less_of_everything(make):
    small, larger = make(0.02), make(0.5)
    assert len(small) == len(larger)
    for less, more in zip(small, larger, strict=True):
        assert less.algorithm.name == more.algorithm.name and less.participants == more.participants
        assert less.rounds < more.rounds and less.target.width < more.target.width
        assert less.task.data.limit < more.task.data.limit
        assert all(tier.num_gpus == 0 for tier in less.tiers), "runs where no GPU is"
        assert [tier.form.depth for tier in less.tiers] == [tier.form.depth for tier in more.tiers]


@pytest.mark.parametrize("make", [suites.quick, suites.baselines, suites.text, suites.scaling, suites.ablations])
def test_no_experiment_is_in_a_suite_twice(make):
    experiments = make()
    assert len({each.run_id for each in experiments}) == len(experiments)


def test_scaling_reaches_ten_thousand_participants():
    populations = {each.participants for each in suites.scaling()}
    assert (min(populations), max(populations)) == (10, 10_000)
