"""The federation depends on the seed, the data and the population alone, so every method meets the same one."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow
from fedsim.data.config import digits
from fedsim.data.partition import Partition
from fedsim.devices import Conditions
from fedsim.engine.cohort import (
    cohort_of,
    federation_sha256,
    label_histograms,
    members,
    scored_in,
    tiers_of,
)
from fedsim.experiment import Experiment, Tier
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import Form


FORM = Form(8, 1, heads=2)


def experiment(shares: tuple[float, ...] = (1.0,), **fields) -> Experiment:
    defaults = {
        "algorithm": FedAvg(),
        "task": TaskConfig(digits(limit=300), patch_size=4),
        "tiers": tuple(Tier(f"tier {i}", FORM, share) for i, share in enumerate(shares)),
        "intermediate": FORM,
        "target": FORM,
        "partition": Partition("iid"),
        "participants": 10,
        "rounds": 4,
    }
    return Experiment(**defaults | fields)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(experiment().task, None)


# tiers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares, participants, counts",
    [
        ((1, 1, 1), 9, [3, 3, 3]),
        ((1, 2, 3), 12, [2, 4, 6]),
        ((0.5, 0.3, 0.2), 10, [5, 3, 2]),
        ((1, 1), 5, [3, 2]),  # exact 2.5 each
        ((6, 3, 1), 7, [4, 2, 1]),  # exact 4.2, 2.1, 0.7: the largest remainder gets the seventh
        ((1000, 1, 1), 5, [3, 1, 1]),  # nobody is left out
        ((1, 1000), 2, [1, 1]),
        ((7,), 4, [4]),
    ],
)
def test_tiers_are_dealt_by_share(shares: tuple[float, ...], participants: int, counts: list[int]) -> None:
    tiers = tiers_of(experiment(shares, participants=participants))
    assert len(tiers) == participants
    assert [Counter(tier.name for tier in tiers)[f"tier {i}"] for i in range(len(shares))] == counts


def test_places_of_tiers_depend_on_the_seed_alone() -> None:
    base = experiment((1, 1, 1), participants=12)
    again = dataclasses.replace(base, algorithm=FedGrow(), rounds=99, chunk=1, cohort=2, partition=Partition("shards"))
    assert tiers_of(base) == tiers_of(again)
    others = [tiers_of(dataclasses.replace(base, seed=seed)) for seed in range(1, 6)]
    assert any(other != tiers_of(base) for other in others)
    assert tiers_of(base) != sorted(tiers_of(base), key=lambda tier: tier.name), "tiers must not follow the ids"


# cohorts --------------------------------------------------------------------------------------------------------------


def test_everyone_takes_part_unless_a_cohort_is_asked_for() -> None:
    for cohort in (None, 10):
        assert cohort_of(experiment(cohort=cohort), 3) == tuple(range(10))


def test_cohorts_are_sorted_of_the_right_size_and_reproducible() -> None:
    base = experiment(participants=50, cohort=7)
    cohorts = [cohort_of(base, round) for round in range(1, 30)]
    for cohort in cohorts:
        assert len(cohort) == len(set(cohort)) == 7
        assert list(cohort) == sorted(cohort)
        assert set(cohort) <= set(range(50))
        assert all(type(id_) is int for id_ in cohort)
    assert [cohort_of(base, round) for round in range(1, 30)] == cohorts
    assert len(set(cohorts)) == len(cohorts)
    assert len({id_ for cohort in cohorts for id_ in cohort}) > 40
    assert [cohort_of(dataclasses.replace(base, seed=1), round) for round in range(1, 30)] != cohorts


def test_round_0_scores_the_state_before_round_1_for_the_same_cohort() -> None:
    base = experiment(participants=50, cohort=7)
    assert cohort_of(base, 0) == cohort_of(base, 1) != cohort_of(base, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": FedGrow()},
        {"rounds": 99},
        {"target": Form(16, 2, heads=2)},
        {"partition": Partition("shards")},
        {"chunk": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_cohorts_do_not_depend_on_the_method(change: dict) -> None:
    base = experiment(participants=50, cohort=7)
    other = dataclasses.replace(base, **change)
    assert [cohort_of(other, round) for round in range(5)] == [cohort_of(base, round) for round in range(5)]


@pytest.mark.parametrize(
    "fields, round, expected",
    [
        ({}, 0, tuple(range(10))),
        ({}, 4, tuple(range(10))),
        ({"cohort": 3}, 2, tuple(range(10))),  # a small population is scored as a whole
        ({"cohort": 3, "scored": "cohort"}, 2, "cohort"),
        ({"cohort": 3, "scored": "cohort"}, 0, "cohort"),
        ({"cohort": 3, "scored": "cohort"}, 4, tuple(range(10))),  # everyone after the last round
        ({"participants": 100, "cohort": 3}, 2, tuple(range(100))),
        ({"participants": 101, "cohort": 3}, 2, "cohort"),
        ({"participants": 101, "cohort": 3}, 4, tuple(range(101))),
        ({"participants": 101, "cohort": 3, "scored": "everyone"}, 2, tuple(range(101))),
        ({"eval_every": 3}, 0, tuple(range(10))),
        ({"eval_every": 3}, 1, ()),
        ({"eval_every": 3}, 2, ()),
        ({"eval_every": 3}, 3, tuple(range(10))),
        ({"eval_every": 3}, 4, tuple(range(10))),  # the last round, whatever eval_every
        ({"eval_every": 3, "scored": "everyone"}, 2, ()),
    ],
)
def test_who_is_scored(fields: dict, round: int, expected: tuple[int, ...] | str) -> None:
    one = experiment(**fields)
    assert scored_in(one, round) == (cohort_of(one, round) if expected == "cohort" else expected)


# members --------------------------------------------------------------------------------------------------------------


def test_members_hold_all_the_data_once(task: Task) -> None:
    population = members(experiment((1, 2), validation_share=0.25), task)
    assert [member.info.id for member in population] == list(range(10))
    dealt = np.concatenate([np.concatenate([member.train, member.validation]) for member in population])
    assert sorted(dealt.tolist()) == list(range(300))
    for member in population:
        assert len(member.train) == member.info.num_examples == 22
        assert len(member.validation) == 8
        assert not set(member.train.tolist()) & set(member.validation.tolist())
        assert (member.info.tier, member.info.form) == (member.tier.name, member.tier.form)


def test_nothing_is_held_out_without_a_validation_share(task: Task) -> None:
    population = members(experiment(validation_share=0.0), task)
    assert [len(member.validation) for member in population] == [0] * 10
    assert [len(member.train) for member in population] == [30] * 10


def test_shards_depend_neither_on_the_method_nor_on_the_forms(task: Task) -> None:
    base = experiment((1, 1), partition=Partition("dirichlet", alpha=0.5, min_size=5))
    other = dataclasses.replace(base, algorithm=FedGrow(), target=Form(16, 2, heads=2), rounds=7, chunk=1)
    for one, two in zip(members(base, task), members(other, task), strict=True):
        assert np.array_equal(one.train, two.train)
        assert np.array_equal(one.validation, two.validation)
        assert one.info == two.info
    reseeded = members(dataclasses.replace(base, seed=1), task)
    assert any(not np.array_equal(a.train, b.train) for a, b in zip(members(base, task), reseeded, strict=True))


def test_data_that_cannot_be_dealt_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=r"min_size=40.*400.*300"):
        members(experiment(partition=Partition("dirichlet", min_size=40)), task)


def test_label_histograms_count_training_examples(task: Task) -> None:
    population = members(experiment(), task)
    histograms = label_histograms(population, task)
    assert [sum(histogram) for histogram in histograms] == [member.info.num_examples for member in population]
    assert task.dataset is not None
    first = task.dataset.train.labels[population[0].train]
    assert histograms[0] == [int((first == label).sum()) for label in range(10)]


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda e: dataclasses.replace(e, algorithm=FedGrow()), True),
        (lambda e: dataclasses.replace(e, chunk=1, eval_every=2, scored="cohort"), True),
        (lambda e: dataclasses.replace(e, target=Form(16, 2, heads=2)), True),
        (lambda e: dataclasses.replace(e, seed=1), False),
        (lambda e: dataclasses.replace(e, cohort=5), False),
        (lambda e: dataclasses.replace(e, rounds=5), False),
        (lambda e: dataclasses.replace(e, partition=Partition("by_size", min_size=5)), False),
        (lambda e: dataclasses.replace(e, validation_share=0.3), False),
        (lambda e: dataclasses.replace(e, tiers=(Tier("tier 0", Form(4, 1, heads=2)),)), False),
    ],
)
def test_hash_of_the_federation(task: Task, change: Callable[[Experiment], Experiment], same: bool) -> None:
    base = experiment(cohort=4)
    other = change(base)
    hashes = [federation_sha256(one, members(one, task)) for one in (base, other)]
    assert (hashes[0] == hashes[1]) == same


# by coins -------------------------------------------------------------------------------------------------------------


def test_by_coins_everyone_is_sampled_alone_at_the_rate_of_the_cohort() -> None:
    base = experiment(cohort=3, sampling="poisson")
    rounds = 4000
    cohorts = [cohort_of(base, round) for round in range(1, rounds + 1)]
    assert cohort_of(base, 0) == cohorts[0] and cohorts[0] == cohort_of(base, 1)
    taken = Counter(id_ for cohort in cohorts for id_ in cohort)
    share, error = 0.3, (0.3 * 0.7 / rounds) ** 0.5
    assert all(abs(taken[id_] / rounds - share) < 6 * error for id_ in range(10)), "each: two in a billion"
    both = sum({0, 1} <= {*cohort} for cohort in cohorts) / rounds
    assert abs(both - share**2) < 6 * (0.09 * 0.91 / rounds) ** 0.5, "independent; without replacement it is 0.067"
    sizes = Counter(len(cohort) for cohort in cohorts)
    assert sizes[0] > 0 and max(sizes) > 6 and all(cohort == tuple(sorted(cohort)) for cohort in cohorts)
    assert cohort_of(experiment(cohort=10, sampling="poisson"), 1) == tuple(range(10))


def test_coins_fall_for_those_who_are_there() -> None:
    base = experiment(cohort=5, sampling="poisson")
    away = dataclasses.replace(base, conditions=Conditions(availability=0.5))
    for round in range(1, 30):
        assert {*cohort_of(away, round)} <= {*cohort_of(base, round)}
    assert sum(len(cohort_of(away, round)) for round in range(1, 30)) > 29
    with pytest.raises(ValueError, match=r"conditions.over_selection=0.5: must be 0 where sampling='poisson'"):
        dataclasses.replace(base, conditions=Conditions(over_selection=0.5))
