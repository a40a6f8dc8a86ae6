"""Fed-Grow of matched small models: the order that is found, what it leaves as it was, and what M_i is kept near."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrow_algo.dual_ligo import GrownLoss, grown, operator_between
from fedgrow_algo.grown import Grown
from fedgrow_algo.matched import FedGrowMatched, matched, reference_of
from fedgrow_algo.pretrain import common_start
from fedgrow_algo.rounds import local_stream
from fedsim.algorithm import TaskLoss
from fedsim.core.seeding import derive
from fedsim.core.submodel import Cut
from fedsim.core.tree import Tree, clone, sha256
from fedsim.learning.objectives import Proximal
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint
from fedsim.testing import MIDDLE, SMALL
from tests.support.exported import logits_of_the_reloaded, random_model
from tests.support.family_rows import ROWS, TEXTS, Row, examples
from tests.support.procedures import ROUND, TARGET, Federation, assert_equal, staged
from tests.support.small_federation import assert_close, mean, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")


def matching(**changes: Any) -> FedGrowMatched:
    settings: dict[str, Any] = ROUND | {"local_epochs": 1} | changes
    return FedGrowMatched(**settings)


def shuffled(row: Row, tree: Tree) -> Tree:
    """The model with its heads and units in another order, another one in each block."""
    generator = torch.Generator().manual_seed(1)
    lists = {
        f"{axis}.{layer}": torch.randperm(row.small.axes[axis], generator=generator)
        for axis, layer in itertools.product(("head", "kv_head", "group", "mlp"), range(row.small.depth))
    }
    return Cut(row.task.specs(row.small), row.small.axes, lists).extract(tree)


# the order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_matched_model_computes_what_it_did(name: str) -> None:
    row = ROWS[name]
    tree = weights_of(random_model(row))
    reference = row.task.fresh(row.small, 7)
    found = matched(row.task, row.small, tree, reference)
    assert any(not torch.equal(found[name], tree[name]) for name in tree)
    batch = row.task.batch(examples(row.task), torch.arange(7))
    with torch.no_grad():
        before, after = (row.task.forward(row.small, each, batch) for each in (tree, found))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_the_order_of_a_shuffled_model_is_found_to_the_bit(name: str) -> None:
    row = ROWS[name]
    reference = weights_of(random_model(row))
    mixed = shuffled(row, reference)
    assert sha256(mixed) != sha256(reference)
    assert_equal(matched(row.task, row.small, mixed, reference), reference)


def test_no_other_order_of_a_block_is_nearer() -> None:
    """All orders of 2 heads and 4 units, tried one by one."""
    row = dataclasses.replace(ROWS["vit"], small=Form(8, 1, heads=2, mlp=4))
    tree, reference = weights_of(random_model(row)), row.task.fresh(row.small, 7)

    def distance(one: Tree) -> float:
        return sum(float((one[name].double() - reference[name].double()).square().sum()) for name in one)

    specs, axes = row.task.specs(row.small), row.small.axes
    tried = [
        distance(Cut(specs, axes, {"head.0": torch.tensor(heads), "mlp.0": torch.tensor(units)}).extract(tree))
        for heads, units in itertools.product(itertools.permutations(range(2)), itertools.permutations(range(4)))
    ]
    assert len({round(each, 6) for each in tried}) == 48
    assert distance(matched(row.task, row.small, tree, reference)) == pytest.approx(min(tried))


# the reference --------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_public_model_or_else_a_corner_of_one_draw() -> None:
    federation = Federation(matching())
    context = federation.at_client(0, 1)
    drawn = common_start(federation.task, SMALL, MIDDLE, derive(0, "small"))
    assert_equal(reference_of(context), drawn)
    assert_equal(reference_of(federation.at_client(0, 2)), drawn)
    public = Grown((Checkpoint("benchmarks:public/digits-24x1"),))
    form = Form(24, 1)
    context = dataclasses.replace(context, start=public, info=dataclasses.replace(context.info, form=form))
    assert_equal(reference_of(context), public.parameters(federation.task, form, derive(0, "small", 0)))


# a participant and a round --------------------------------------------------------------------------------------------


def test_local_is_trained_on_the_matched_model_near_the_references() -> None:
    federation = Federation(matching(mu=0.5))
    context, task = federation.at_client(0, 0), federation.task
    small, reference = task.fresh(SMALL, 3), reference_of(context)
    given, objective, frozen = federation.algorithm.begun(small, context)  # type: ignore[attr-defined]
    assert_equal(given, matched(task, SMALL, small, reference))
    local = operator_between("paper", task, SMALL, MIDDLE)
    anchor = grown(local, local.init(local_stream("common", context)), local.stack(reference))
    assert_equal(frozen["anchor"], anchor)
    assert objective == Proximal(TaskLoss(task, MIDDLE), 0.5)

    batch = task.batch(federation.shards[0], torch.arange(4))
    tensors, stacked = local.init(torch.Generator().manual_seed(5)), local.stack(given)
    loss, plain = (GrownLoss(task, "paper", SMALL, MIDDLE, objective=each) for each in (objective, None))
    middle = local.grow(tensors, stacked)
    distance = sum(float((middle[name] - anchor[name]).square().sum()) for name in middle)
    assert distance > 1
    found = float(loss(tensors, {"small": stacked, **frozen}, batch))
    assert found == pytest.approx(float(plain(tensors, {"small": stacked}, batch)) + 0.25 * distance, rel=1e-5)


def test_a_table_of_which_a_step_grows_a_few_rows_has_no_distance() -> None:
    """Rows that a batch does not use are zeros then, which are no part of M_i."""
    federation = Federation(matching())
    for length, left_out in ((12, set()), (2, {"bert.embeddings.word_embeddings.weight"})):  # 257 rows, of a batch 128
        task = Task(TaskConfig(dataclasses.replace(TEXTS, max_length=length), "bert"))
        context = dataclasses.replace(federation.at_client(0, 0), task=task)
        _, _, frozen = federation.algorithm.begun(task.fresh(SMALL, 3), context)  # type: ignore[attr-defined]
        assert task.specs(MIDDLE).keys() - frozen["anchor"].keys() == left_out


def test_the_term_keeps_what_grows_near_the_reference() -> None:
    """Far from where the task's loss alone would take it; what is matched is no longer S_i as it was trained."""

    def distance(mu: float) -> float:
        federation = Federation(matching(mu=mu, local_epochs=20))
        context = federation.at_client(0, 0)
        local = operator_between("paper", federation.task, SMALL, MIDDLE)
        reference = local.stack(reference_of(context))
        anchor = grown(local, local.init(local_stream("common", context)), reference)
        shared = operator_between("paper", federation.task, MIDDLE, TARGET)
        held, public = federation.state(0)["middle"], shared.stack(anchor)
        return sum(float((held[name] - public[name]).square().sum()) for name in held)

    assert distance(10.0) < 0.9 * distance(0.0)


def test_what_is_sent_is_the_operator_and_its_mean_is_weighted_by_examples() -> None:
    federation = Federation(matching(rank=2, preset="preserving"))
    updates = federation.run(1, [0, 1])
    assert [update.weight for update in updates] == [6, 12]
    assert_close(federation.server, mean([update.tree for update in updates], [6, 12]), atol=1e-6)
    plain = mean([update.tree for update in updates], [1, 1])
    with pytest.raises(AssertionError):
        assert_close(federation.server, plain, atol=1e-6)
    private = {tensor.numpy().tobytes() for term in federation.state(0)["middle"].values() for tensor in term.values()}
    assert private.isdisjoint(tensor.numpy().tobytes() for tensor in updates[0].tree.values())


def test_it_is_not_fed_grow_from_the_first_round_on() -> None:
    one, other = Federation(matching(mu=0.0)), Federation(staged())
    assert sha256(one.state(0)) != sha256(other.state(0)), "what S_i was matched to shows in M_i"
    assert_equal(one.server, other.server)
    assert sha256(one.run(1)[0].tree) != sha256(other.run(1)[0].tree)


def test_the_deployed_model_is_a_plain_one(tmp_path: Path) -> None:
    federation = Federation(matching())
    federation.run(1)
    model = federation.deployed(1, 0)
    with torch.no_grad():
        logits = model(federation.pixels).logits
    assert torch.equal(logits_of_the_reloaded(model, federation.task.config, federation.pixels, tmp_path / "m"), logits)


def test_nothing_that_is_public_is_written_to() -> None:
    federation = Federation(matching())
    context = federation.at_client(0, 0)
    small, reference = federation.task.fresh(SMALL, 3), reference_of(context)
    before = sha256(clone(small)), sha256(reference)
    matched(federation.task, SMALL, small, reference)
    assert (sha256(small), sha256(reference)) == before


# refusals -------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.mu=-1\.0: must be"):
        FedGrowMatched(mu=-1.0)
    with pytest.raises(ValueError, match=r"algorithm\.federate=False: must be True"):
        FedGrowMatched(federate=False)
    federation = Federation(matching())
    with pytest.raises(ValueError, match=r"intermediate=.*corner, no axis larger.*axis 'head' is larger"):
        federation.algorithm.check(federation.task, [Form(8, 1, heads=4)], MIDDLE, TARGET)
    assert [matching().name, matching(rank=2).name, matching().leaves] == [
        *("fedgrow_matched", "fedgrow_matched"),
        "operator",
    ]
