"""Fed-Grow drawn to common class means: what is trained, what is sent, and the two means that the server makes."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedgrow_algo.anchored import FedGrowAnchored
from fedsim.algorithm import ClientUpdate
from fedsim.core.tree import State, Tree, flat, mapped, nbytes, sha256
from fedsim.learning.batched import Tally
from fedsim.learning.features import features
from fedsim.learning.server_opt import ServerOptimizer
from fedsim.learning.steps import run_batched
from fedsim.learning.task import Task, TaskConfig
from fedsim.testing import MIDDLE, SMALL
from tests.support.clients import asked_of
from tests.support.exported import logits_of_the_reloaded
from tests.support.family_rows import NEXT_TOKEN
from tests.support.procedures import ROUND, TARGET, Federation, assert_equal, joint
from tests.support.small_federation import assert_close, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

CLASSES, WIDTH = 10, TARGET.width


def anchored(**changes: Any) -> FedGrowAnchored:
    settings: dict[str, Any] = ROUND | changes
    return FedGrowAnchored(**settings)


def update_of(client: int, weight: int, sums: Tensor, shares: Tensor, like: State) -> ClientUpdate:
    tree = {name: torch.full_like(tensor, float(client + 1)) for name, tensor in like.items()}
    return ClientUpdate(client, {"global": tree, "sums": sums, "shares": shares}, weight)


# at the server --------------------------------------------------------------------------------------------------------


def test_operators_are_weighted_by_examples_and_class_means_by_examples_of_the_class() -> None:
    """Client 0 has 6 examples: 4 of class 0, mean 1, and 2 of class 1, mean 5; client 1 has 12 of class 0, mean 3."""
    federation = Federation(anchored())
    like = federation.server["global"]
    shares = torch.zeros(2, CLASSES)
    shares[0, :2], shares[1, 0] = torch.tensor([4 / 6, 2 / 6]), 1.0
    means = torch.zeros(2, CLASSES, WIDTH)
    means[0, 0], means[0, 1], means[1, 0] = 1.0, 5.0, 3.0
    updates = [update_of(k, (6, 12)[k], shares[k, :, None] * means[k], shares[k], like) for k in (0, 1)]
    federation.server = federation.aggregate(1, updates)
    for tensor in federation.server["global"].values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, (6 * 1 + 12 * 2) / 18))
    found = federation.server["prototypes"][:, 0].tolist()
    assert found == pytest.approx([(4 * 1 + 12 * 3) / 16, 5.0, *[0.0] * 8])
    assert found[0] != pytest.approx((6 * 1 + 12 * 3) / 18), "not by all examples of a client"
    assert federation.server["known"].tolist() == [True, True, *[False] * 8]


def test_a_class_that_nobody_in_the_cohort_has_keeps_its_prototype() -> None:
    federation = Federation(anchored())
    like, ones = federation.server["global"], torch.ones(CLASSES, WIDTH)
    first, second = torch.zeros(CLASSES), torch.zeros(CLASSES)
    first[3], second[7] = 1.0, 1.0
    federation.server = federation.aggregate(1, [update_of(0, 6, 2 * ones * first[:, None], first, like)])
    federation.server = federation.aggregate(2, [update_of(1, 12, 9 * ones * second[:, None], second, like)])
    assert federation.server["prototypes"][:, 0].tolist() == [0, 0, 0, 2, 0, 0, 0, 9, 0, 0]
    assert federation.server["known"].nonzero().flatten().tolist() == [3, 7]


def test_a_server_optimiser_steps_the_operator_and_no_prototype() -> None:
    plain = Federation(anchored())
    updates = plain.run(1)
    slow = Federation(anchored(server=ServerOptimizer("avgm", lr=0.5, beta1=0.0)))
    begun = slow.server["global"]
    slow.server = slow.aggregate(1, updates)
    halfway = {name: (begun[name] + plain.server["global"][name]) / 2 for name in begun}
    assert_close(slow.server["global"], halfway, atol=1e-6)
    assert_equal({"p": slow.server["prototypes"]}, {"p": plain.server["prototypes"]})
    assert slow.payload(2, 0).keys() == {"global", "prototypes", "known"}


# at a participant -----------------------------------------------------------------------------------------------------


def test_what_is_sent_is_the_operator_and_each_classs_mean_feature_and_share() -> None:
    federation = Federation(anchored())
    updates = federation.run(1)
    shapes = {name: tuple(tensor.shape) for name, tensor in flat(federation.server["global"], ".").items()}
    for client, update in enumerate(updates):
        assert update.tree.keys() == {"global", "sums", "shares"}
        assert {name: tuple(t.shape) for name, t in update.tree["global"].items()} == shapes
        labels = federation.shards[client].labels
        assert_close({"s": update.tree["shares"]}, {"s": torch.bincount(labels, minlength=CLASSES) / len(labels)}, 1e-6)
        context = federation.at_client(1, client)
        model = weights_of(federation.algorithm.client_model(update.tree, federation.state(client), context))
        batch = federation.task.batch(federation.shards[client], torch.arange(len(labels)))
        z = features(federation.task, TARGET, model, batch)
        for label in range(CLASSES):
            expected = z[labels == label].sum(0) / len(labels)
            torch.testing.assert_close(update.tree["sums"][label], expected, rtol=1e-4, atol=1e-5)
    held = torch.cat([federation.shards[client].labels for client in range(3)]).unique()
    assert federation.server["known"].nonzero().flatten().tolist() == held.tolist()


def test_bytes_beside_the_operator_are_classes_times_width_and_one() -> None:
    federation = Federation(anchored())
    (update,) = federation.run(1, [0])
    extra = nbytes(update.tree) - nbytes(update.tree["global"])
    assert extra == 4 * CLASSES * (WIDTH + 1)
    low = Federation(anchored(rank=1))
    (smaller,) = low.run(1, [0])
    assert low.algorithm.name == "fedgrow_anchored_lowrank"
    assert nbytes(smaller.tree) - nbytes(smaller.tree["global"]) == extra
    assert nbytes(smaller.tree["global"]) < nbytes(update.tree["global"]) / 3


def test_the_first_round_is_the_joint_forms_and_the_second_is_not() -> None:
    """There is nothing to be drawn to before anybody has sent a class mean."""
    one, other = Federation(anchored(weight=3.0)), Federation(joint())
    for ours, plain in zip(one.run(1), other.run(1), strict=True):
        assert_close(ours.tree["global"], plain.tree, atol=1e-6)
    for ours, plain in zip(one.run(2), other.run(2), strict=True):
        with pytest.raises(AssertionError):
            assert_close(ours.tree["global"], plain.tree, atol=1e-4)


def gradients(federation: Federation) -> tuple[dict[str, Tree], float]:
    """Of what participant 1 trains in round 2, on its first 8 examples, and the loss."""
    algorithm, context = federation.algorithm, federation.at_client(2, 1)
    asked = asked_of(algorithm, federation.payload(2, 1), federation.state(1), context)
    leaves: Any = mapped(lambda tensor: tensor.clone().requires_grad_(), asked.start)
    batch = federation.task.batch(federation.shards[1], torch.arange(8))
    objective: Any = asked.objective
    loss = objective(leaves, asked.frozen, batch)
    loss.backward()
    return {part: {name: leaf.grad for name, leaf in tree.items()} for part, tree in leaves.items()}, loss.item()


def test_local_and_global_are_both_trained_with_the_term() -> None:
    """The loss of a batch is the task's and the weighted mean square; both operators feel the term."""
    federation = Federation(anchored(weight=3.0))
    federation.run(1)
    found, loss = gradients(federation)
    batch = federation.task.batch(federation.shards[1], torch.arange(8))
    model = weights_of(federation.deployed(1, 1))
    z = features(federation.task, TARGET, model, batch)
    distance = (z - federation.server["prototypes"][batch["labels"]]).square().mean()
    plain = federation.task.loss(federation.task.forward(TARGET, model, batch), batch)
    assert loss == pytest.approx(float(plain + 3 * distance), rel=1e-5)
    assert float(distance) > 1e-3
    federation.algorithm = anchored(weight=0.0)
    without, _ = gradients(federation)
    for part in ("local", "global"):
        assert all(not torch.allclose(found[part][name], without[part][name]) for name in without[part]), part


def test_class_means_come_nearer_to_the_prototypes() -> None:
    """Not by what one round does, but by what many do that a run without the term does not."""

    def spread(weight: float) -> float:
        federation = Federation(anchored(weight=weight, lr=3e-3, local_lr=3e-3))
        for round in range(1, 13):
            updates = federation.run(round)
        centre = federation.server["prototypes"]
        total = 0.0
        for update in updates:
            held = update.tree["shares"] > 0
            found = update.tree["sums"][held] / update.tree["shares"][held][:, None]
            total += float((found - centre[held]).square().mean())
        return total

    assert spread(3.0) < 0.7 * spread(0.0)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_batch_of_participants_is_one_by_one_to_rounding(rank: int | None) -> None:
    alone, together, tally = *(Federation(anchored(weight=3.0, rank=rank)) for _ in range(2)), Tally()
    for round in (1, 2):
        expected = alone.run(round)
        called = [functools.partial(together.updating, round, client) for client in range(3)]
        found: Any = run_batched(called, tally)
        together.server = together.aggregate(round, found)
        for one, other in zip(expected, found, strict=True):
            assert_close(one.tree, other.tree, atol=1e-4)
    assert (tally.batched, tally.alone) == (9, 0)


@pytest.mark.parametrize("rank", [None, 2])
def test_nothing_private_is_sent(rank: int | None) -> None:
    federation = Federation(anchored(rank=rank))
    (update,) = federation.run(1, [0])
    kept = federation.state(0)
    assert kept.keys() == {"small", "local"}
    private = {tensor.numpy().tobytes() for tensor in flat(kept).values()}
    private |= {tensor.numpy().tobytes() for tensor in weights_of(federation.deployed(1, 0)).values()}
    assert private.isdisjoint(tensor.numpy().tobytes() for tensor in flat(update.tree).values())


@pytest.mark.parametrize("rank", [None, 2])
def test_the_deployed_model_is_a_plain_one(rank: int | None, tmp_path: Path) -> None:
    federation = Federation(anchored(rank=rank))
    federation.run(1)
    model = federation.deployed(1, 0)
    with torch.no_grad():
        logits = model(federation.pixels).logits
    assert torch.equal(logits_of_the_reloaded(model, federation.task.config, federation.pixels, tmp_path / "m"), logits)


def test_fine_tuning_follows_as_in_the_joint_form() -> None:
    federation = Federation(anchored(finetune_after=1))
    federation.run(1)
    before = sha256({name: part for name, part in federation.server.items() if name != "grown"})
    start = federation.model(1, 0)
    assert federation.payload(2, 0).keys() >= {"global"}
    (update,) = federation.run(2, [0])
    assert update.tree == {} and federation.state(0).keys() == {"target"}
    assert sha256({name: part for name, part in federation.server.items() if name != "grown"}) == before
    assert federation.server["grown"].tolist() == [True, False, False]
    assert federation.payload(3, 0) == {}
    assert sha256(federation.model(2, 0)) != sha256(start)


# refusals -------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.weight=-1\.0: must be"):
        FedGrowAnchored(weight=-1.0)
    with pytest.raises(ValueError, match=r"task\.data='lm': must be"):
        anchored().check(Task(TaskConfig(NEXT_TOKEN, "gpt2")), [SMALL], MIDDLE, TARGET)
    with pytest.raises(ValueError, match="intermediate=None"):
        anchored().check(Federation(anchored()).task, [SMALL], None, TARGET)
    assert (anchored().name, anchored().leaves) == ("fedgrow_anchored", "operator")
