"""Fed-Grow that shares the residual axis alone: what is averaged, what stays, and what a model is grown with."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fedgrow_algo.dual_ligo import grown
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.residual import FedGrowResidual
from fedgrow_algo.rounds import first_global
from fedsim.core.tree import State, flat, sha256
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from fedsim.testing import MIDDLE, SMALL
from tests.support.exported import logits_of_the_reloaded
from tests.support.family_rows import TEXTS
from tests.support.procedures import TARGET, Federation, assert_equal, residual, shared_operator, staged
from tests.support.small_federation import assert_close, mean


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

OWN = {f"width.{group}" for group in ("query", "key", "value", "mlp")}


def split_of(algorithm: FedGrow, task: Task | None = None) -> tuple[set[str], set[str]]:
    """Names of what is sent of Global, and of what is not."""
    context = Federation(algorithm).at_server(0)
    context = dataclasses.replace(context, task=task or context.task)
    shared, own = algorithm.split(first_global(algorithm.preset, context, algorithm.rank), context)
    return set(shared), set(own)


# what is sent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "maps", "own"),
    [
        ("paper", {"width.embed"}, OWN),
        ("ligo", {"width.embed"}, OWN),
        ("preserving", {"width.embed", "width.embed.read"}, OWN),
        ("aki", {"width.embed", "width.embed.next"}, OWN | {f"{name}.next" for name in OWN}),
    ],
)
@pytest.mark.parametrize("rank", [None, 2])
def test_maps_of_the_residual_axis_and_depth_tables_are_sent_and_no_other(
    preset: str, maps: set[str], own: set[str], rank: int | None
) -> None:
    shared, kept = split_of(residual(preset=preset, rank=rank))
    assert kept == own
    assert maps == {name for name in shared if not name.startswith("depth.")} < shared


def test_a_pooler_has_an_axis_of_its_own_and_keeps_its_map() -> None:
    shared, own = split_of(residual(), Task(TaskConfig(TEXTS, "bert")))
    assert own == OWN | {"width.pooled"}
    assert "width.embed" in shared


# a round --------------------------------------------------------------------------------------------------------------


def of_two(algorithm: FedGrow) -> tuple[Federation, list[State]]:
    """A federation after a round of participants 0 and 1, and what they sent."""
    federation = Federation(algorithm)
    updates = federation.run(1, [0, 1])
    assert [update.weight for update in updates] == [6, 12]
    return federation, [update.tree for update in updates]


def test_the_mean_is_of_what_was_sent_and_weighted_by_examples() -> None:
    federation, sent = of_two(residual())
    assert federation.server.keys() == sent[0].keys() == set(shared_operator(federation.task).shapes) - OWN
    for name, tensor in federation.server.items():
        by_hand = (6 * sent[0][name].double() + 12 * sent[1][name].double()) / 18
        torch.testing.assert_close(tensor, by_hand.float())
        plain = (sent[0][name].double() + sent[1][name].double()) / 2
        assert not torch.allclose(tensor.double(), plain, atol=1e-6)


def test_the_maps_that_stay_are_trained_and_each_has_its_own() -> None:
    federation, _ = of_two(residual())
    begun = first_global("paper", federation.at_client(0, 0))
    one, other = (federation.state(client)["global"] for client in (0, 1))
    assert one.keys() == other.keys() == OWN
    for name in OWN:
        assert not torch.equal(one[name], other[name])
        assert not torch.equal(one[name], begun[name])
    assert_equal(federation.state(2)["global"], {name: begun[name] for name in OWN})


def test_first_round_is_fed_grows_and_the_second_is_not() -> None:
    """All maps begin as one draw and are trained together; only then does it matter what is averaged."""
    federation, whole = Federation(residual()), Federation(staged())
    for one, other in zip(federation.run(1), whole.run(1), strict=True):
        assert_close(one.tree, {name: other.tree[name] for name in one.tree}, atol=1e-5)
    assert_close(federation.server, {name: whole.server[name] for name in federation.server}, atol=1e-5)
    for one, other in zip(federation.run(2), whole.run(2), strict=True):
        with pytest.raises(AssertionError):
            assert_close(one.tree, {name: other.tree[name] for name in one.tree}, atol=1e-4)


def test_a_second_round_goes_on_with_its_own_maps_and_the_mean() -> None:
    federation, _ = of_two(residual())
    still = Federation(residual(lr=0.0))
    still.server, still.private = federation.server, dict(federation.private)
    before = sha256(still.state(0))
    (update,) = still.run(2, [0])
    assert_equal(update.tree, federation.server)
    assert sha256(still.state(0)) == before


def test_the_deployed_model_is_grown_with_the_mean_and_its_own_maps(tmp_path: Path) -> None:
    federation, _ = of_two(residual())
    shared, state = shared_operator(federation.task), federation.state(1)
    expected = grown(shared, {**federation.server, **state["global"]}, state["middle"])
    assert_equal(federation.model(1, 1), expected)
    strangers = grown(shared, {**federation.server, **federation.state(0)["global"]}, state["middle"])
    assert sha256(strangers) != sha256(expected)
    model = federation.deployed(1, 1)
    with torch.no_grad():
        logits = model(federation.pixels).logits
    assert torch.equal(logits_of_the_reloaded(model, federation.task.config, federation.pixels, tmp_path / "m"), logits)


def test_nothing_of_the_maps_that_stay_is_in_what_is_sent() -> None:
    federation, sent = of_two(residual(rank=2))
    for client, tree in enumerate(sent):
        kept = federation.state(client)["global"]
        assert kept.keys() == OWN and OWN.isdisjoint(tree)
        values = {tensor.numpy().tobytes() for tensor in kept.values()}
        assert values.isdisjoint(tensor.numpy().tobytes() for tensor in flat(tree).values())


def test_three_rounds_of_a_mean_by_hand() -> None:
    federation = Federation(residual(rank=2, preset="preserving"))
    for round in (1, 2, 3):
        updates = federation.run(round)
        by_hand = mean([update.tree for update in updates], [update.weight for update in updates])
        assert_close(federation.server, by_hand, atol=1e-6)


# refusals and names ---------------------------------------------------------------------------------------------------


def test_what_is_never_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.federate=False: must be True"):
        FedGrowResidual(federate=False)


def test_forms_that_cannot_grow_are_refused_as_ever() -> None:
    federation = Federation(residual())
    with pytest.raises(ValueError, match="intermediate"):
        federation.algorithm.check(federation.task, [SMALL], None, TARGET)
    with pytest.raises(ValueError, match="cannot shrink"):
        federation.algorithm.check(federation.task, [Form(32, 1, heads=2)], MIDDLE, TARGET)


def test_names() -> None:
    assert [residual().name, residual(rank=2).name] == ["fedgrow_residual"] * 2
    assert residual().leaves == "operator"
