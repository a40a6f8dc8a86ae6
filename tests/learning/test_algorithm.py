"""Averaging, by hand: what two and three clients give, what must not depend on order or cut, what is refused."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedsim.algorithm import Algorithm, ClientUpdate, Partial, ServerContext, weighted_mean, weighted_sum
from fedsim.core.tree import Tree, sha256


LIKE = {"w": torch.zeros(2), "b": torch.zeros(())}
AVERAGING = [FedAvg(), FedGrow(), FedGrowJoint(), FedGrowReleasedCode()]


def update(client: int, w: Sequence[float], b: float, weight: float) -> ClientUpdate:
    return ClientUpdate(client, {"w": torch.tensor(w), "b": torch.tensor(b)}, weight)


def random_updates(number: int, weights: Sequence[float] | None = None) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(number)
    return [
        ClientUpdate(
            client,
            {"w": torch.randn(7, generator=generator), "b": torch.randn((), generator=generator)},
            weights[client] if weights else 3 + 2 * client,
        )
        for client in range(number)
    ]


def in_chunks(updates: Sequence[ClientUpdate], size: int) -> list[Partial]:
    return [weighted_sum(updates[start : start + size]) for start in range(0, len(updates), size)]


def assert_equal(left: Tree, right: Tree) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def assert_close(left: Tree, right: Tree) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7)


# by hand --------------------------------------------------------------------------------------------------------------


def test_two_clients_by_hand() -> None:
    # (1 * [1, 8] + 3 * [5, 0]) / 4 = [4, 2];  (1 * -2 + 3 * 2) / 4 = 1
    mean = weighted_mean(iter([update(0, [1.0, 8.0], -2.0, 1), update(1, [5.0, 0.0], 2.0, 3)]), LIKE)
    assert mean["w"].tolist() == [4.0, 2.0]
    assert mean["b"].item() == 1.0
    assert mean["w"].dtype == torch.float32


def test_three_clients_by_hand() -> None:
    # (2 * [1, 0] + 3 * [0, 2] + 5 * [2, 4]) / 10 = [1.2, 2.6];  (2 * 5 + 3 * 0 + 5 * -1) / 10 = 0.5
    updates = [update(4, [1.0, 0.0], 5.0, 2), update(0, [0.0, 2.0], 0.0, 3), update(9, [2.0, 4.0], -1.0, 5)]
    mean = weighted_mean(updates, LIKE)
    assert_equal(mean, {"w": torch.tensor([1.2, 2.6]), "b": torch.tensor(0.5)})
    plain = {"w": torch.stack([u.tree["w"] for u in updates]).mean(0)}
    assert not torch.allclose(mean["w"], plain["w"]), "an unweighted mean would be wrong"


def test_weighted_sum_by_hand() -> None:
    partial = weighted_sum([update(0, [1.0, 8.0], -2.0, 1), update(1, [5.0, 0.0], 2.0, 3)])
    assert partial.weight == 4
    assert_equal(partial.tree, {"w": torch.tensor([16.0, 8.0]).double(), "b": torch.tensor(4.0).double()})


def test_how_a_tensor_lies_in_memory_does_not_matter_to_a_sum() -> None:
    """A grown matrix may come out transposed: its strides are not those of the matrix written row by row."""
    rows = torch.arange(6.0).reshape(2, 3)
    columns = rows.t().contiguous().t()
    assert columns.equal(rows)
    assert not columns.is_contiguous()
    for first, second in ((rows, columns), (columns, rows), (columns, columns)):
        partial = weighted_sum([ClientUpdate(0, {"w": first}, 1), ClientUpdate(1, {"w": second}, 2)])
        assert_equal(partial.tree, {"w": 3 * rows.double()})


@pytest.mark.parametrize("algorithm", AVERAGING, ids=lambda algorithm: algorithm.name)
def test_algorithms_that_average_do_so_over_the_cohort(algorithm: Algorithm) -> None:
    updates = [update(0, [1.0, 8.0], -2.0, 1), update(1, [5.0, 0.0], 2.0, 3)]
    expected = {"w": torch.tensor([4.0, 2.0]), "b": torch.tensor(1.0)}
    nothing: Any = None
    context = ServerContext(0, 1, nothing, nothing, nothing, [])  # averaging asks for the round, and nothing else
    assert algorithm.stage(1) == "federated"
    assert_equal(algorithm.server_aggregate(LIKE, iter(updates), context), expected)
    combined = algorithm.combine(updates)
    assert combined is not None
    assert_equal(combined.tree, weighted_sum(updates).tree)
    assert_equal(algorithm.server_aggregate(LIKE, iter([combined]), context), expected)


def test_denominator_is_the_sampled_total() -> None:
    everyone = random_updates(5)
    sampled = [everyone[1], everyone[4]]  # weights 5 and 11
    expected = (5 * sampled[0].tree["w"].double() + 11 * sampled[1].tree["w"].double()) / 16
    assert torch.equal(weighted_mean(sampled, LIKE)["w"], expected.float())
    over_all = (expected * 16 / 35).float()
    assert not torch.allclose(weighted_mean(sampled, LIKE)["w"], over_all)


# identities -----------------------------------------------------------------------------------------------------------


@given(weight=st.integers(1, 10**6))
def test_one_client_gives_bitwise_its_weights(weight: int) -> None:
    (only,) = random_updates(1, [weight])
    assert_equal(weighted_mean([only], LIKE), only.tree)
    assert_equal(weighted_mean([weighted_sum([only])], LIKE), only.tree)


@given(weights=st.lists(st.integers(1, 5000), min_size=1, max_size=9), size=st.integers(1, 9))
def test_equal_trees_give_that_tree_bitwise(weights: list[int], size: int) -> None:
    tree = {"w": torch.randn(7, generator=torch.Generator().manual_seed(0)), "b": torch.tensor(0.1)}
    updates = [ClientUpdate(client, tree, weight) for client, weight in enumerate(weights)]
    assert_equal(weighted_mean(updates, LIKE), tree)
    assert_equal(weighted_mean(in_chunks(updates, size), LIKE), tree)


@given(weights=st.lists(st.integers(1, 5000), min_size=2, max_size=9))
def test_mean_lies_between_the_lowest_and_the_highest(weights: list[int]) -> None:
    updates = random_updates(len(weights), weights)
    mean = weighted_mean(updates, LIKE)
    for name in LIKE:
        values = torch.stack([one.tree[name] for one in updates])
        assert torch.all(values.min(0).values <= mean[name])
        assert torch.all(mean[name] <= values.max(0).values)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_partial_sums_equal_the_plain_path_of_the_same_chunks_bitwise(size: int) -> None:
    updates = random_updates(7)
    chunks = [updates[start : start + size] for start in range(0, 7, size)]
    at_the_hosts = weighted_mean([weighted_sum(chunk) for chunk in chunks], LIKE)
    at_the_server = weighted_mean(map(weighted_sum, chunks), LIKE)
    assert_equal(at_the_hosts, at_the_server)
    assert_close(at_the_hosts, weighted_mean(updates, LIKE))
    if size in (1, 7):  # one after another, or all in one go: the order of additions is the same
        assert_equal(at_the_hosts, weighted_mean(updates, LIKE))


def test_order_of_clients_matters_to_rounding_only() -> None:
    updates = random_updates(7)
    assert_close(weighted_mean(updates, LIKE), weighted_mean(updates[::-1], LIKE))
    assert_close(weighted_mean(updates, LIKE), weighted_mean(updates[3:] + updates[:3], LIKE))


@pytest.mark.parametrize("factor", [2, 1024])
def test_scaling_all_weights_by_a_power_of_two_changes_no_bit(factor: int) -> None:
    updates = random_updates(5)
    scaled = [dataclasses.replace(one, weight=one.weight * factor) for one in updates]
    assert_equal(weighted_mean(scaled, LIKE), weighted_mean(updates, LIKE))


def test_scaling_all_weights_matters_to_rounding_only() -> None:
    updates = random_updates(5)
    scaled = [dataclasses.replace(one, weight=one.weight * 37) for one in updates]
    assert_close(weighted_mean(scaled, LIKE), weighted_mean(updates, LIKE))
    unequal = [dataclasses.replace(updates[0], weight=updates[0].weight * 37), *updates[1:]]
    assert not torch.allclose(weighted_mean(unequal, LIKE)["w"], weighted_mean(updates, LIKE)["w"])


def test_client_split_in_two_halves_counts_the_same() -> None:
    updates = random_updates(3, [4, 10, 6])
    half = dataclasses.replace(updates[1], weight=5)
    split = [updates[0], half, dataclasses.replace(half, client=99), updates[2]]
    assert_close(weighted_mean(split, LIKE), weighted_mean(updates, LIKE))


@pytest.mark.parametrize("a, b", [(2.0, 0.0), (-0.5, 3.0)])
def test_mean_moves_with_an_affine_change_of_all_updates(a: float, b: float) -> None:
    updates = random_updates(4)
    moved = [dataclasses.replace(one, tree={k: a * v + b for k, v in one.tree.items()}) for one in updates]
    expected = {name: a * tensor + b for name, tensor in weighted_mean(updates, LIKE).items()}
    for name, tensor in weighted_mean(moved, LIKE).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_mean_of_parameters_is_start_plus_mean_of_changes() -> None:
    updates, start = random_updates(4), {"w": torch.arange(7.0), "b": torch.tensor(1.0)}
    changes = [dataclasses.replace(one, tree={name: one.tree[name] - start[name] for name in start}) for one in updates]
    expected = {name: start[name] + change for name, change in weighted_mean(changes, LIKE).items()}
    for name, tensor in weighted_mean(updates, LIKE).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


# what is returned and refused -----------------------------------------------------------------------------------------


def test_nobody_leaves_the_state_as_it_is() -> None:
    state = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    assert weighted_mean(iter([]), state) is state


def test_updates_without_tensors_average_to_an_empty_state() -> None:
    updates = [ClientUpdate(client, {}, 10) for client in range(3)]
    assert weighted_mean(updates, {}) == {}
    assert weighted_mean([weighted_sum(updates)], {}) == {}


@pytest.mark.parametrize("broken", [lambda tree: {"w": tree["w"]}, lambda tree: {"w": tree["w"], "c": tree["b"]}])
def test_trees_of_different_names_are_refused(broken: Callable[[Tree], Tree]) -> None:
    updates = random_updates(2)
    strange = dataclasses.replace(updates[1], tree=broken(updates[1].tree))
    with pytest.raises(ValueError, match=r"different names.*'b'"):
        weighted_sum([updates[0], strange])


@pytest.mark.parametrize("broken", [lambda tree: {"w": tree["w"]}, lambda tree: tree | {"c": tree["b"]}])
def test_trees_of_different_names_are_refused_across_chunks(broken: Callable[[Tree], Tree]) -> None:
    updates = random_updates(2)
    strange = dataclasses.replace(updates[1], tree=broken(updates[1].tree))
    with pytest.raises(ValueError, match="different names"):
        weighted_mean([updates[0], strange], LIKE)


def test_a_mean_is_of_the_dtype_of_the_state() -> None:
    tree = {"w": torch.tensor([0.1, 0.2], dtype=torch.float16)}
    mean = weighted_mean([ClientUpdate(0, tree, 3), ClientUpdate(1, tree, 4)], tree)
    assert mean["w"].dtype == torch.float16
    assert torch.equal(mean["w"], tree["w"])


def test_updates_are_neither_written_to_nor_kept() -> None:
    updates = random_updates(3)
    before = [sha256(one.tree) for one in updates]
    mean = weighted_mean(updates, LIKE)
    for tensor in mean.values():
        tensor.add_(1)
    assert [sha256(one.tree) for one in updates] == before


def test_updates_are_consumed_one_at_a_time() -> None:
    arrived: list[weakref.ref] = []

    def arriving() -> Iterator[ClientUpdate]:
        for client in range(5):
            assert all(reference() is None for reference in arrived[:-1]), f"updates are kept until {client} arrives"
            one = ClientUpdate(client, {"w": torch.full((2,), float(client)), "b": torch.tensor(1.0)}, 1)
            arrived.append(weakref.ref(one))
            yield one
            del one

    assert weighted_mean(arriving(), LIKE)["w"].tolist() == [2.0, 2.0]
    assert len(arrived) == 5
