"""Partitions: what every scheme promises, what each one means, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import partition
from fedsim.data.partition import SCHEMES, Partition, train_validation


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _check_dealt(parts: list[np.ndarray], n: int, participants: int) -> None:
    """K sorted int64 arrays, disjoint, complete, none empty."""
    assert len(parts) == participants
    assert all(part.dtype == np.int64 and len(part) >= 1 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(SCHEMES),
    n=st.integers(40, 200),
    participants=st.integers(1, 6),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_every_scheme_deals_each_example_once(scheme, n, participants, classes, seed):
    labels = np.arange(n) % classes
    groups = np.arange(n) % 11
    settings = Partition(scheme=scheme, alpha=1.0, min_size=2)
    parts = settings.split(labels, groups, participants, seed)
    _check_dealt(parts, n, participants)
    if scheme in ("dirichlet", "by_size"):
        assert min(map(len, parts)) >= 2
    again = settings.split(labels, groups, participants, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    alpha=st.floats(1e-6, 1e6),
    min_size=st.integers(1, 20),
    participants=st.integers(1, 12),
    n=st.integers(1, 150),
    name=st.sampled_from(["dirichlet", "by_size"]),
)
def test_minimum_is_met_or_refused_and_never_endless(alpha, min_size, participants, n, name):
    labels = np.arange(n) % 3
    try:
        if name == "dirichlet":
            parts = partition.dirichlet(labels, participants, alpha, min_size, _rng())
        else:
            parts = partition.by_size(n, participants, alpha, min_size, _rng())
    except ValueError as error:
        assert "partition.min_size=" in str(error)
    else:
        _check_dealt(parts, n, participants)
        assert min(map(len, parts)) >= min_size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_deals_otherwise(scheme):
    labels, groups = np.arange(400) % 10, np.arange(400) // 8
    deal = Partition(scheme=scheme)
    first, second = (deal.split(labels, groups, 5, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_alpha_approaches_iid_and_small_alpha_one_class_each():
    labels = np.arange(6000) % 10
    for part in partition.dirichlet(labels, 4, 1e5, 10, _rng()):
        shares = np.bincount(labels[part], minlength=10) / len(part)
        assert abs(len(part) - 1500) < 100
        np.testing.assert_allclose(shares, 0.1, atol=0.01)

    # With almost all mass on one participant a class, a participant's classes are its own.
    parts = partition.dirichlet(labels, 3, 1e-3, 10, _rng())
    owners = np.array([[np.mean(np.isin(np.flatnonzero(labels == c), part)) for part in parts] for c in range(10)])
    assert np.all(owners.max(axis=1) > 0.99)


def test_classes_per_participant_grow_with_alpha():
    labels = np.arange(5000) % 10

    def effective_classes(alpha: float) -> float:
        counts = []
        for seed in range(5):
            for part in partition.dirichlet(labels, 8, alpha, 1, _rng(seed)):
                shares = np.bincount(labels[part], minlength=10) / len(part)
                counts.append(1 / np.sum(shares**2))
        return float(np.mean(counts))

    spread = [effective_classes(alpha) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert spread == sorted(spread)
    assert spread[0] < 2.5 and spread[-1] > 9.5


def test_by_size_varies_sizes_but_not_labels():
    labels = np.arange(20_000) % 2
    parts = partition.by_size(20_000, 5, 1.0, 100, _rng())
    sizes = [len(part) for part in parts]
    assert max(sizes) > 2 * min(sizes)
    for part in parts:
        assert abs(labels[part].mean() - 0.5) < 0.1


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(map(len, partition.iid(10, 3, _rng()))) == [3, 3, 4]
    assert [part.tolist() for part in partition.iid(1, 1, _rng())] == [[0]]


def test_shards_give_each_participant_few_classes():
    labels = np.repeat([2, 0, 1, 3], 2)
    parts = partition.shards(labels, 4, 1, _rng())
    assert sorted(part.tolist() for part in parts) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    labels = np.arange(1000) % 10
    for part in partition.shards(labels, 10, 2, _rng()):
        assert len(np.unique(labels[part])) <= 2


def test_natural_keeps_groups_whole_and_balances():
    # Sizes 5, 3, 2, 2: the largest goes to one, 3 and 2 to the other, and the last 2 joins either (5 against 5).
    groups = np.repeat([7, 1, 4, 9], [5, 3, 2, 2])
    parts = partition.natural(groups, 2, _rng())
    assert sorted(map(len, parts)) == [5, 7]
    for group in np.unique(groups):
        assert sum(group in groups[part] for part in parts) == 1


def test_natural_breaks_ties_by_the_generator():
    groups = np.arange(6)
    dealt = {tuple(tuple(part) for part in partition.natural(groups, 3, _rng(seed))) for seed in range(20)}
    assert len(dealt) > 5
    for parts in dealt:
        assert [len(part) for part in parts] == [2, 2, 2]


def test_impossible_minimum_is_refused_before_anything_is_drawn():
    rng = _rng()
    with pytest.raises(ValueError, match=r"partition\.min_size=11: 10 participants need 110 examples.* only 100"):
        partition.dirichlet(np.arange(100) % 10, 10, 0.5, 11, rng)
    assert rng.random() == _rng().random()


@pytest.mark.parametrize("scheme", ["dirichlet", "by_size"])
def test_unlikely_minimum_is_refused_with_all_numbers(scheme):
    with pytest.raises(ValueError) as caught:
        Partition(scheme=scheme, alpha=0.01, min_size=10).split(np.arange(100) % 2, None, 10, 0)
    message = str(caught.value)
    for piece in (
        "partition.alpha=0.01",
        "100 draws",
        "10 participants",
        "partition.min_size=10",
        "100 examples",
        "0)",
    ):
        assert piece in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("alpha", -1, r"partition\.alpha=-1: must be greater than 0"),
        ("alpha", 0.0, r"partition\.alpha=0\.0: must be greater than 0"),
        ("alpha", float("nan"), r"partition\.alpha=nan: must be a number"),
        ("alpha", float("inf"), r"partition\.alpha=inf: must be finite; partition\.scheme='iid'"),
        ("alpha", float("-inf"), r"partition\.alpha=-inf: must be greater than 0"),
        ("alpha", "0.5", r"partition\.alpha='0\.5'"),
        ("alpha", True, r"partition\.alpha=True"),
        ("alpha", None, r"partition\.alpha=None"),
        ("scheme", "random", r"partition\.scheme='random': must be one of iid, dirichlet"),
        ("scheme", None, r"partition\.scheme=None"),
        ("min_size", 0, r"partition\.min_size=0: must be at least 1"),
        ("min_size", 2.0, r"partition\.min_size=2\.0"),
        ("min_size", True, r"partition\.min_size=True"),
        ("shards_per_client", 0, r"partition\.shards_per_client=0"),
        ("shards_per_client", "2", r"partition\.shards_per_client='2'"),
    ],
)
def test_wrong_settings_are_refused_by_name(field, value, words):
    with pytest.raises(ValueError, match=words):
        Partition(**{field: value})


def test_wrong_calls_are_refused_by_name():
    labels = np.zeros(10, dtype=np.int64)
    with pytest.raises(ValueError, match="participants=0"):
        Partition().split(labels, None, 0, 0)
    with pytest.raises(ValueError, match=r"participants=2\.0"):
        Partition().split(labels, None, 2.0, 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="participants=11: 10 examples"):
        Partition(scheme="iid").split(labels, None, 11, 0)
    with pytest.raises(ValueError, match="6 participants would need 12 shards, but there are only 10 examples"):
        Partition(scheme="shards").split(labels, None, 6, 0)
    with pytest.raises(ValueError, match="has no groups"):
        Partition(scheme="natural").split(labels, None, 2, 0)
    with pytest.raises(ValueError, match="2 groups cannot be dealt to 3 participants"):
        Partition(scheme="natural").split(labels, np.arange(10) % 2, 3, 0)
    with pytest.raises(ValueError, match="9 values for 10 labels"):
        Partition(scheme="natural").split(labels, np.arange(9), 3, 0)


@settings(deadline=None)
@given(n=st.integers(0, 50), share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 1000))
def test_validation_share(n, share, seed):
    indices = np.arange(n) * 3 + 1
    train, validation = train_validation(indices, share, _rng(seed))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), indices)
    assert np.all(np.diff(train) > 0) and np.all(np.diff(validation) > 0)
    assert train.dtype == validation.dtype == np.int64
    if share == 0 or n < 2:
        assert len(validation) == 0
    else:
        assert len(train) >= 1 and len(validation) >= 1
        assert abs(len(validation) - share * n) <= 1


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), "0.1", True, None])
def test_wrong_validation_share_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share!r}: must be"):
        train_validation(np.arange(4), share, _rng())
