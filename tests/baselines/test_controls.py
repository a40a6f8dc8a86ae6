"""Means over participants, and the controls: FedAvg of other forms, FedProx, exclusive, ensemble, local only."""

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from baselines.ensemble_small import EnsembleSmall
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg, fedavg_mid, fedavg_small, fedprox
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora
from baselines.progfed import ProgFed
from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.tree import Tree, flat, mapped, nbytes, nested, numel, sha256, tensors
from fedsim.learning.ensemble import Ensemble
from fedsim.learning.rates import parameter_count
from fedsim.learning.server_opt import ServerOptimizer
from fedsim.learning.steps import run_client
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint
from tests.support.clients import client_init, client_update
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
    MEDIUM,
    MIDDLE,
    SMALL,
    TARGET,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    distance,
    drawn_like,
    mean,
    weights_of,
)


ALONE: dict[str, Any] = {"small_lr": 1e-2, "small_epochs": 1}
ABLE = 0.5  # a share that MEDIUM and TARGET have, and SMALL has not


def updates_of(trees: list[Tree], weights: list[float]) -> list[ClientUpdate]:
    return [ClientUpdate(id_, tree, weight) for id_, (tree, weight) in enumerate(zip(trees, weights, strict=True))]


# means ----------------------------------------------------------------------------------------------------------------

# Every method whose server takes the mean of what all participants send, weighted by examples.
MEANS: dict[str, Algorithm] = {
    "fedavg": FedAvg(**LOCAL),
    "fedprox": fedprox(**LOCAL),
    "exclusive": Exclusive(share=0.01, **LOCAL),
    "ensemble_small": EnsembleSmall(members=2, **LOCAL),
    "progfed": ProgFed(**LOCAL),
    "grow_then_fedavg": GrowThenFedAvg(**LOCAL),
    "fedit": fedit(rank=2, **LOCAL),
    "ffa_lora": ffa_lora(rank=2, **LOCAL),
}


@pytest.fixture(params=MEANS)
def federation(request: pytest.FixtureRequest) -> Federation:
    return Federation(MEANS[request.param])


def averaged(federation: Federation, trees: list[Tree], weights: list[float], chunk: int = 2) -> Tree:
    return federation.aggregate(1, updates_of(trees, weights), chunk)


def sent(federation: Federation, count: int = 3) -> list[Tree]:
    return [drawn_like(federation.server, seed) for seed in range(count)]


def test_a_mean_on_paper(federation: Federation) -> None:
    """(1*1 + 2*2 + 3*9) / 6 = 16/3; weights 1 and 3 alone: (1 + 27) / 4 = 7, over those who took part."""
    ones, twos, nines = (
        mapped(functools.partial(torch.full_like, fill_value=x), federation.server) for x in (1.0, 2.0, 9.0)
    )
    for tensor in tensors(averaged(federation, [ones, twos, nines], [1, 2, 3])):
        assert torch.equal(tensor, torch.full_like(tensor, 16 / 3))
    for tensor in tensors(averaged(federation, [ones, nines], [1, 3])):
        assert torch.equal(tensor, torch.full_like(tensor, 7.0))


def test_of_one_participant_the_mean_is_its_weights_bit_by_bit(federation: Federation) -> None:
    (only,) = sent(federation, 1)
    assert_same_bits(averaged(federation, [only], [7]), only)


def test_of_equal_participants_the_mean_is_theirs_bit_by_bit(federation: Federation) -> None:
    (same,) = sent(federation, 1)
    assert_same_bits(averaged(federation, [same] * 3, [6, 12, 18]), same)


def test_the_mean_lies_between_the_least_and_the_greatest(federation: Federation) -> None:
    trees = [flat(state) for state in sent(federation)]
    found = averaged(federation, [nested(tree) for tree in trees], [6, 12, 18])
    for name, tensor in flat(found).items():
        stacked = torch.stack([tree[name] for tree in trees])
        assert (stacked.amin(0) <= tensor).all() and (tensor <= stacked.amax(0)).all()
        assert (stacked.amin(0) < tensor).any() and (tensor < stacked.amax(0)).any()


def test_neither_order_nor_unit_of_the_weights_matters(federation: Federation) -> None:
    trees = sent(federation)
    found = averaged(federation, trees, [6, 12, 18])
    assert_close(averaged(federation, trees[::-1], [18, 12, 6]), found, atol=1e-6)
    assert_same_bits(averaged(federation, trees, [12, 24, 36]), found)
    assert_close(averaged(federation, trees, [1, 2, 3]), found, atol=1e-6)
    assert distance(averaged(federation, trees, [1, 1, 1]), found) > 0.01, "but the weights do"


def test_sums_in_chunks_are_sums(federation: Federation) -> None:
    trees = sent(federation)
    found = averaged(federation, trees, [6, 12, 18], chunk=3)
    assert_close(averaged(federation, trees, [6, 12, 18], chunk=1), found, atol=1e-6)
    plain = federation.algorithm.server_aggregate(
        federation.server, iter(updates_of(trees, [6, 12, 18])), federation.at_server(1)
    )
    assert_close(plain, found, atol=1e-6)


def test_the_mean_of_scaled_and_shifted_weights_is_scaled_and_shifted(federation: Federation) -> None:
    trees = sent(federation)
    moved = [mapped(lambda tensor: 3 * tensor + 2, tree) for tree in trees]
    found = averaged(federation, trees, [6, 12, 18])
    expected = mapped(lambda tensor: 3 * tensor + 2, found)
    assert_close(averaged(federation, moved, [6, 12, 18]), expected, atol=1e-5)


def test_the_mean_of_weights_is_the_model_and_the_mean_of_differences(federation: Federation) -> None:
    trees, model = [flat(state) for state in sent(federation)], flat(federation.server)
    differences = [{name: tree[name].double() - model[name] for name in model} for tree in trees]
    moved = flat(mean([nested(each) for each in differences], [6, 12, 18]))
    expected = nested({name: model[name] + moved[name] for name in model})
    assert_close(averaged(federation, [nested(tree) for tree in trees], [6, 12, 18]), expected, atol=1e-6)


def test_a_participant_cut_in_two_counts_as_before(federation: Federation) -> None:
    trees = sent(federation, 2)
    whole = averaged(federation, trees, [6, 12])
    halves = [trees[0], trees[1], trees[1]]
    assert_close(averaged(federation, halves, [6, 6, 6]), whole, atol=1e-6)
    assert distance(averaged(federation, halves, [6, 12, 12]), whole) > 0.01


def test_a_round_is_the_mean_of_what_was_sent_by_examples(federation: Federation) -> None:
    before = federation.server
    updates = federation.run(1)
    assert [update.weight for update in updates] == [6, 12, 18]
    assert_close(federation.server, mean([update.tree for update in updates], [6, 12, 18]), atol=1e-7)
    assert distance(federation.server, before) > 1e-3


def test_the_sum_of_weights_runs_over_those_who_took_part(federation: Federation) -> None:
    updates = federation.run(1, cohort=[0, 2])
    assert_close(federation.server, mean([update.tree for update in updates], [6, 18]), atol=1e-7)


def test_where_nobody_arrives_the_server_stays(federation: Federation) -> None:
    assert_same_bits(federation.aggregate(1, []), federation.server)


def test_a_rate_of_zero_moves_nobody(federation: Federation) -> None:
    still = Federation(dataclasses.replace(federation.algorithm, lr=0.0))  # type: ignore[type-var]
    before = still.server
    for update in still.run(1):
        assert_same_bits(update.tree, before)
    assert_same_bits(still.server, before)


numbers = st.floats(-8, 8, width=32)


@given(st.lists(st.tuples(numbers, st.integers(1, 1000)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_a_mean_of_any_numbers_is_theirs(participants: list[tuple[float, int]]) -> None:
    updates = [ClientUpdate(i, {"x": torch.tensor([x])}, weight) for i, (x, weight) in enumerate(participants)]
    found = float(FedAvg().server_aggregate({"x": torch.zeros(1)}, iter(updates), None)["x"])  # type: ignore[arg-type]
    expected = sum(x * weight for x, weight in participants) / sum(weight for _, weight in participants)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert min(x for x, _ in participants) <= found <= max(x for x, _ in participants)


# FedAvg of other forms, and FedProx -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm, name, form",
    [
        (FedAvg(**LOCAL), "fedavg", TARGET),
        (fedavg_mid(**LOCAL), "fedavg_mid", MIDDLE),
        (fedavg_small(**LOCAL), "fedavg_small", SMALL),
        (fedprox(**LOCAL), "fedprox", TARGET),
    ],
)
def test_whose_form_is_averaged(algorithm: FedAvg, name: str, form: Form) -> None:
    federation = Federation(algorithm, UNLIKE[::-1])
    assert algorithm.name == name
    shapes = {name: tensor.shape for name, tensor in federation.task.fresh(form, 0).items()}
    federation.run(1)
    assert {n: t.shape for n, t in federation.server.items()} == shapes
    for model in (federation.served(1), *(federation.deployed(1, client) for client in range(3))):
        assert_same_bits(weights_of(model), federation.server)


def test_the_smallest_form_has_the_fewest_parameters_and_not_the_least_width() -> None:
    wide, deep = Form(10, 1, heads=2), Form(8, 6, heads=2)
    federation = Federation(fedavg_small(**LOCAL), (deep, wide, deep))
    assert parameter_count(federation.task, wide) < parameter_count(federation.task, deep)
    assert numel(federation.server) == parameter_count(federation.task, wide)
    assert numel(federation.update(1, 0).tree) == parameter_count(federation.task, wide)


def test_fedavg_by_another_form_is_fedavg_of_that_target() -> None:
    mid, as_target = Federation(fedavg_mid(**LOCAL)), Federation(FedAvg(**LOCAL), target=MIDDLE)
    for round in (1, 2):
        mid.run(round)
        as_target.run(round)
    assert_same_bits(mid.server, as_target.server)


def test_fedprox_without_its_term_is_fedavg_bit_by_bit() -> None:
    plain, near = Federation(FedAvg(**LOCAL)), Federation(fedprox(mu=0.0, **LOCAL))
    for round in (1, 2):
        plain.run(round, cohort=[0, 1])
        near.run(round, cohort=[0, 1])
    assert_same_bits(near.server, plain.server)


def test_fedprox_keeps_clients_near_what_they_received() -> None:
    """One step cannot tell: where training starts, the term is 0 and so is its gradient. Ten steps can."""
    moved: dict[float, float] = {}
    for mu in (0.0, 1.0, 100.0):
        federation = Federation(fedprox(mu=mu, **LOCAL | {"epochs": 10, "lr": 3e-3, "clip": None}))
        before = federation.server
        update = federation.update(1, 0)
        moved[mu] = sum(float((update.tree[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert moved[0.0] > moved[1.0] > moved[100.0]
    assert moved[100.0] < 0.5 * moved[0.0]
    first = [Federation(fedprox(mu=mu, **LOCAL | {"batch_size": 64})).update(1, 0).tree for mu in (0.0, 100.0)]
    assert_same_bits(*first)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"mu": -1.0}, "algorithm.mu=-1.0"),
        ({"mu": 0.1, "of": "smallest"}, "algorithm.mu=0.1"),
        ({"of": "largest"}, "algorithm.of='largest'"),
        ({"server": None}, "algorithm.server=None"),
        ({"epochs": 0}, "algorithm.epochs=0"),
        ({"clip": 0.0}, "algorithm.clip=0.0"),
    ],
)
def test_fedavg_refuses_what_cannot_be(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        FedAvg(**fields)
    assert named in str(error.value)


# exclusive ------------------------------------------------------------------------------------------------------------


def exclusive(**changes: Any) -> Exclusive:
    fields: dict[str, Any] = LOCAL | ALONE | {"share": ABLE} | changes
    return Exclusive(**fields)


def test_weak_participants_receive_and_send_nothing() -> None:
    federation = Federation(exclusive(), UNLIKE)
    assert federation.payload(1, 0) == {}
    whole = 4 * parameter_count(federation.task, TARGET)
    assert [nbytes(federation.payload(1, client)) for client in range(3)] == [0, whole, whole]
    updates = federation.run(1)
    assert [nbytes(update.tree) for update in updates] == [0, whole, whole]
    assert updates[0].weight == 0
    assert federation.work[0].work == [], "nor do they compute"
    able = updates[1:]
    assert_close(federation.server, mean([update.tree for update in able], [12, 18]), atol=1e-7)


def test_weak_participants_deploy_the_small_model_they_trained_alone() -> None:
    federation = Federation(exclusive(), UNLIKE)
    context = federation.at_client(0, 0)
    algorithm = federation.algorithm
    assert isinstance(algorithm, Exclusive)
    alone = run_client(context, trained_on_own_shard(context, **algorithm.settings(lr=1e-2, epochs=1)))
    assert context.meter.trainable == 0 < context.meter.flops, "as a participant's own training counts"
    assert_same_bits(weights_of(federation.deployed(0, 0)), alone)
    federation.run(1)
    assert_same_bits(weights_of(federation.deployed(1, 0)), alone)
    assert federation.state(1) == federation.state(2) == {}
    for client in (1, 2):
        assert_same_bits(weights_of(federation.deployed(1, client)), federation.server)


def test_exclusive_is_fedavg_of_the_able() -> None:
    one, other = Federation(exclusive(), UNLIKE), Federation(FedAvg(**LOCAL), UNLIKE)
    for round in (1, 2):
        one.run(round)
        other.run(round, cohort=[1, 2])
    assert_close(one.server, other.server, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_who_is_added_up_with_whom_makes_no_difference(chunk: int) -> None:
    """A chunk may hold weak participants alone, both kinds, or able ones alone."""
    federation = Federation(exclusive(), UNLIKE)
    trees = [{}, drawn_like(federation.server, 1), drawn_like(federation.server, 2)]
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        updates = [ClientUpdate(id_, trees[id_], [0, 12, 18][id_]) for id_ in order]
        assert_close(federation.aggregate(1, updates, chunk), mean(trees[1:], [12, 18]), atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "avgm", "adam"])
def test_a_cohort_without_anyone_able_changes_nothing(kind: Any) -> None:
    federation = Federation(exclusive(server=ServerOptimizer(kind)), UNLIKE)
    federation.run(1)
    before = federation.server
    federation.run(2, cohort=[0])
    assert_same_bits(federation.server, before)


def test_exclusive_where_all_are_able_is_fedavg() -> None:
    one, other = Federation(exclusive(share=0.01), UNLIKE), Federation(FedAvg(**LOCAL), UNLIKE)
    one.run(1)
    other.run(1)
    assert_same_bits(one.server, other.server)


def test_where_nobody_is_able_it_is_refused_with_a_share_that_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.share=1\.0: must be at most 0\.\d+, the share") as error:
        Federation(exclusive(share=1.0), (SMALL, MEDIUM, SMALL))
    said = float(str(error.value).partition("at most ")[2].partition(",")[0])
    task = Federation(FedAvg(**LOCAL)).task
    assert 0 <= parameter_count(task, MEDIUM) / parameter_count(task, TARGET) - said < 1e-4
    Federation(exclusive(share=said), (SMALL, MEDIUM, SMALL))
    Federation(exclusive(share=1.0), UNLIKE)


# ensemble -------------------------------------------------------------------------------------------------------------


def test_members_fit_into_the_targets_parameters() -> None:
    federation = Federation(EnsembleSmall(**LOCAL), UNLIKE)
    small, target = (parameter_count(federation.task, form) for form in (SMALL, TARGET))
    members = len({name.partition(".")[0] for name in federation.server})
    assert members == target // small > 2
    assert numel(federation.server) == members * small <= target < (members + 1) * small
    assert nbytes(federation.update(1, 2).tree) == nbytes(federation.payload(1, 2)) == 4 * members * small


def test_a_small_form_larger_than_the_target_has_one_member() -> None:
    federation = Federation(EnsembleSmall(**LOCAL), (TARGET,) * 3, target=SMALL)
    assert {name.partition(".")[0] for name in federation.server} == {"0"}


def test_members_begin_apart_and_each_is_a_fedavg_of_its_own() -> None:
    federation = Federation(EnsembleSmall(members=3, **LOCAL), UNLIKE)
    start = [federation.server[str(member)] for member in range(3)]
    assert len({sha256(tree) for tree in start}) == 3
    updates = federation.run(1)
    assert [work.purpose for work in federation.work[0].work] == ["member 0", "member 1", "member 2"]
    alone = Federation(EnsembleSmall(members=1, **LOCAL), UNLIKE)
    alone.server = {"0": start[0]}
    alone.run(1)
    assert_same_bits(federation.server["0"], alone.server["0"])
    for member in range(3):
        trees = [update.tree[str(member)] for update in updates]
        assert_close(federation.server[str(member)], mean(trees, [6, 12, 18]), atol=1e-7)


class Says(nn.Module):
    """A model that gives everyone the same probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([probabilities]).log() + 5.0)  # probabilities do not know of the 5

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(len(x), -1))


def test_an_ensemble_says_the_mean_of_probabilities_on_paper() -> None:
    """(0.9 + 0.3) / 2 = 0.6 and (0.1 + 0.7) / 2 = 0.4; the mean of logits would say that both are about even."""
    said = Ensemble([Says(0.9, 0.1), Says(0.3, 0.7)])(x=torch.zeros(4)).logits
    torch.testing.assert_close(said.exp(), torch.tensor([[0.6, 0.4]]).expand(4, 2))
    of_logits = (math.log(0.9 / 0.1) + math.log(0.3 / 0.7)) / 2
    assert abs(1 / (1 + math.exp(-of_logits)) - 0.6) > 0.05


def test_what_is_deployed_says_the_mean_of_its_members() -> None:
    federation = Federation(EnsembleSmall(members=2, **LOCAL), UNLIKE)
    federation.run(1)
    members = [federation.server[str(member)] for member in range(2)]
    said = [federation.task.forward(SMALL, tree, {"pixel_values": federation.pixels}) for tree in members]
    expected = torch.stack([logits.softmax(-1) for logits in said]).mean(0)
    for model in (federation.served(1), federation.deployed(1, 2)):
        assert not model.training
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values=federation.pixels).logits.exp(), expected)


def test_of_one_member_the_ensemble_is_that_model() -> None:
    federation = Federation(EnsembleSmall(members=1, **LOCAL))
    said = federation.served(0)(pixel_values=federation.pixels).logits
    own = federation.task.forward(SMALL, federation.server["0"], {"pixel_values": federation.pixels})
    torch.testing.assert_close(said, own.log_softmax(-1))


def test_an_ensemble_is_scored_like_any_model() -> None:
    federation = Federation(EnsembleSmall(members=2, **LOCAL))
    assert federation.task.dataset is not None
    score = federation.task.score(federation.served(0), federation.task.dataset.test)
    assert score.count.sum() == len(federation.task.dataset.test.labels)
    assert 0 < score.loss < 5


# local only -----------------------------------------------------------------------------------------------------------


def test_local_only_sends_and_receives_nothing_and_goes_on_from_where_it_was() -> None:
    federation = Federation(LocalOnly(**LOCAL), UNLIKE)
    start = federation.state(0)
    assert federation.server == federation.payload(1, 0) == {}
    updates = federation.run(1)
    assert [nbytes(update.tree) for update in updates] == [0, 0, 0]
    assert federation.server == {}
    first = federation.state(0)
    federation.run(2)
    assert len({sha256(start), sha256(first), sha256(federation.state(0))}) == 3
    for client, form in enumerate(UNLIKE):
        model = federation.deployed(2, client)
        assert_same_bits(weights_of(model), federation.state(client))
        assert numel(federation.state(client)) == parameter_count(federation.task, form)


def test_local_only_never_hears_of_the_others() -> None:
    together, alone = Federation(LocalOnly(**LOCAL), ALIKE), Federation(LocalOnly(**LOCAL), ALIKE)
    for round in (1, 2):
        together.run(round)
        alone.run(round, cohort=[1])
    assert_same_bits(together.state(1), alone.state(1))
    assert sha256(together.state(0)) != sha256(together.state(1))


def test_local_only_is_local_training() -> None:
    whole: dict[str, Any] = LOCAL | {"batch_size": 64}
    federation = Federation(LocalOnly(**whole))
    start = federation.state(2)
    federation.update(1, 2)
    (work,) = federation.work[2].work
    assert (work.purpose, work.trainable) == ("small", parameter_count(federation.task, SMALL))
    plain = FedAvg(**whole)
    context = dataclasses.replace(federation.at_client(1, 2), target=SMALL)
    trained = client_update(plain, start, {}, context)[0].tree
    # A key's bias has no gradient but rounding. Whole shards as batches: orders differ.
    decided = [name for name in start if not name.endswith("k_proj.bias")]
    after = federation.state(2)
    assert_close({n: after[n] for n in decided}, {n: trained[n] for n in decided}, atol=1e-4)


def test_local_only_begins_with_the_tiers_checkpoint(tmp_path: Path) -> None:
    federation = Federation(LocalOnly(**LOCAL))
    small = federation.task.fresh(SMALL, seed=3)
    federation.task.module(SMALL, small).save_pretrained(tmp_path)  # type: ignore[operator]
    federation.clients = [dataclasses.replace(c, checkpoint=Checkpoint(str(tmp_path))) for c in federation.clients]
    assert_same_bits(weights_of(federation.deployed(0, 1)), small)


# where tensors are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [exclusive(small_epochs=0), LocalOnly(**LOCAL)], ids=lambda a: a.name)
def test_what_a_participant_makes_is_on_its_device(algorithm: Algorithm) -> None:
    """A meta device has no values, but it shows where tensors are put."""
    federation = Federation(algorithm, (SMALL, SMALL, TARGET))
    state = client_init(algorithm, federation.at_client(0, 0, device="meta", empty=True))
    assert {tensor.device.type for tensor in tensors(state)} == {"meta"}
