"""Membership: certain where a model has memorised, chance where nobody has seen anything."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from fedsim.data.source import Split
from fedsim.privacy.attacks import membership
from fedsim.privacy.attacks.replay import Exchange, Replay, change, without_data
from fedsim.privacy.measures import auc
from fedsim.testing import Federation


def unseen(federation: Federation) -> Split:
    assert federation.task.dataset is not None
    return federation.task.dataset.test


def noise(count: int, seed: int) -> Split:
    stream = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=stream, dtype=torch.uint8)
    return Split({"pixel_values": pixels}, torch.randint(0, 10, (count,), generator=stream))


def test_pairs_have_the_same_classes() -> None:
    members, others = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 1, 1, 0, 3])
    one, other = membership.matched(members, others, np.random.default_rng(0))
    assert sorted(members[one].tolist()) == sorted(others[other].tolist()) == [0, 0, 1]
    assert len({*one.tolist()}) == len({*other.tolist()}) == 3


def test_confidences_are_the_loss_and_its_log_odds() -> None:
    federation = Federation(FedAvg())
    shard = federation.shards[2]
    found = membership.confidences(federation.task, federation.deployed(1, 2), shard)
    assert np.allclose(-found[:, 0].mean(), federation.task.score(federation.deployed(1, 2), shard).loss, atol=1e-6)
    assert np.allclose(found[:, 1], found[:, 0] - np.log1p(-np.exp(found[:, 0])), atol=1e-9)


def test_what_was_memorised_is_told_and_what_was_not_seen_is_not() -> None:
    """A participant's 24 digits, trained for 60 epochs. Two sides of 12,000 examples that nobody has seen have an AUC
    of standard deviation sqrt((1/12,000 + 1/12,000) / 12) = 0.0037: 0.02 is 5.4 of them, exceeded once in 1e7."""
    federation = Federation(FedAvg(lr=1e-2, epochs=60, batch_size=8, clip=None), sizes=(24, 1, 1))
    model = federation.algorithm.client_model(federation.update(1, 0).tree, {}, federation.at_client(1, 0))
    members, others = federation.shards[0], unseen(federation)
    scores = [membership.confidences(federation.task, model, split)[:, 0] for split in (members, others)]
    assert auc(*scores).value > 0.9
    sides = [membership.confidences(federation.task, model, noise(12_000, seed))[:, 0] for seed in (1, 2)]
    assert abs(auc(*sides).value - 0.5) < 0.02


def test_likelihood_by_hand_and_what_it_adds_to_the_loss() -> None:
    """phi of 0 and 2 under two others: mean 1, variance 2. An example that is easy for all is no member for it."""
    assert np.allclose(membership.likelihood_ratio(np.array([3.0]), np.array([[0.0], [2.0]])), 2 / math.sqrt(2))
    hard, easy = np.array([1.0, 5.0]), np.array([[-1.0, 5.0], [-0.8, 5.2]])
    assert membership.likelihood_ratio(hard, easy)[0] > membership.likelihood_ratio(hard, easy)[1]


def test_likelihood_online_by_hand() -> None:
    """In: 2 and 4, out: -1 and 1; each of variance 2: (9 - 0) / 4 at 3, minus that at 0, nothing half way."""
    models, held = np.array([[2.0], [4.0], [-1.0], [1.0]]), np.array([[True], [True], [False], [False]])
    for phi, score in ((3.0, 9 / 4), (1.5, 0.0), (0.0, -9 / 4)):
        assert membership.likelihood_ratio_online(np.array([phi]), models, held) == pytest.approx(score)
    wide = np.array([[0.0], [6.0], [-1.0], [1.0]])  # variance 18: (9 / 2 - log 9) / 2 more at its middle
    found = membership.likelihood_ratio_online(np.array([3.0]), wide, held)
    assert found == pytest.approx(9 / 4 - math.log(9) / 2)
    few = np.array([[True], [False], [False], [False]])
    assert np.isnan(membership.likelihood_ratio_online(np.array([3.0]), models, few)).all()


def test_likelihood_online_finds_what_an_example_adds_and_nothing_where_it_adds_nothing() -> None:
    """phi is an example's own difficulty, plus `gain` where it was trained on, plus noise of deviation 1. Of 20 models
    a side the means are known to 1 / sqrt(20), so the AUC is Phi(gain / sqrt(2)) nearly; 0.03 is 4.6 deviations of it
    at 4,000 examples."""
    stream = np.random.default_rng(0)
    difficulty, held = stream.normal(0, 3, 4000), stream.random((40, 4000)) < 0.5
    inside = np.arange(4000) < 2000
    for gain in (0.0, 2.0):
        models = difficulty + gain * held + stream.normal(size=held.shape)
        target = difficulty + gain * inside + stream.normal(size=4000)
        scores = membership.likelihood_ratio_online(target, models, held)
        found = auc(scores[inside], scores[~inside]).value
        assert abs(found - 0.5 * (1 + math.erf(gain / 2))) < 0.03
        if gain:
            assert auc(target[inside], target[~inside]).value < found - 0.1  # the loss alone sees difficulty


def test_a_gradient_is_aligned_with_the_change_it_made() -> None:
    """After one step of SGD on one example: cosine 1 for it, less for all others."""
    federation = Federation(FedAvg(optimizer="sgd", lr=1e-2, clip=None), sizes=(1, 6, 6))
    update = federation.update(1, 0)
    replay = Replay(
        federation.algorithm,
        Exchange(1, 0, federation.payload(1, 0), update.tree),
        {},
        without_data(federation.at_client(1, 0)),
    )
    asked = replay.asked()
    assert asked is not None
    moved = change(asked, update.tree)
    assert moved is not None
    (own,) = membership.alignment(asked, moved, federation.task, federation.shards[0])
    others = membership.alignment(asked, moved, federation.task, federation.shards[1])
    assert own > 0.9999 > others.max() + 1e-3


def test_the_rows_of_a_change_span_what_the_layer_saw() -> None:
    """Delta W = sum delta x^T of two inputs in four dimensions: both are inside, what is orthogonal is outside."""
    seen, other = torch.eye(4)[:2], torch.tensor([[0.0, 0.0, 3.0, 4.0]])
    moved = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]]) @ seen
    found = membership.residual(moved, [seen[:1], seen[1:], seen.sum(0)[None], other, seen[:1] + torch.eye(4)[2:3]])
    assert np.allclose(found, [0, 0, 0, -1, -math.sqrt(0.5)], atol=1e-12)
    assert membership.rank(moved) == 2


def test_inputs_of_a_layer_are_each_examples_own() -> None:
    federation = Federation(FedAvg())
    model = federation.deployed(1, 0)
    name = next(name for name, each in model.named_modules() if isinstance(each, nn.Linear))
    shard = federation.shards[0]
    found = membership.inputs_of(model, name, federation.task, shard)
    again = membership.inputs_of(model, name, federation.task, shard.select(np.array([2])))
    assert len(found) == len(shard) and torch.equal(found[2], again[0]) and not torch.equal(found[1], found[2])
