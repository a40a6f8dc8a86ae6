"""What the server makes of sub-models: means that a person can check, broadcasts of blocks, and when it is FedAvg."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL, heterofl_clean
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.tree import Tree, sha256
from fedsim.learning.coverage import covered_of, start
from fedsim.learning.server_opt import AVERAGE
from fedsim.learning.task import load_task
from fedsim.models import Form
from tests.support.family_rows import ROWS, examples
from tests.support.sub_models import FEDAVG, LOCAL, METHODS, VIT, Federation, close, local, of_row, shards_of_digits


# when it is FedAvg ----------------------------------------------------------------------------------------------------


EQUAL = {
    "heterofl_clean": heterofl_clean(**LOCAL),
    "heterofl-unmasked-by-examples": HeteroFL(**LOCAL, masks=False, by_examples=True),
    "fjord": FjORD(**local(rates=(1.0,))),
    "federated_dropout": FederatedDropout(**LOCAL),
    "federated_dropout-all": FederatedDropout(**LOCAL, keep=1.0),
    "fedbrb_like": FedBRBLike(**LOCAL),
    "fedbrb_like-all": FedBRBLike(**LOCAL, broadcast=1.0),
    "fedbrb_like-changes": FedBRBLike(**LOCAL, broadcast=0.5, mode="changes", clock="spread", decay=2.0),
}


@functools.cache
def fedavg_after(rounds: int, row: str | None = None) -> Tree:
    federation = Federation(FEDAVG, (1.0,) * 3) if row is None else unequal(row, FEDAVG)
    for round in range(1, rounds + 1):
        federation.run(round, [0, 2] if round == 2 else None)
    return federation.server


def unequal(row: str, algorithm: Algorithm) -> Federation:
    return of_row(row, algorithm, (1.0,) * 3, shards=[examples(ROWS[row].task, size) for size in (2, 3, 5)])


@pytest.mark.parametrize("method", EQUAL)
def test_where_everyone_has_everything_it_is_fedavg_bit_by_bit(method: str) -> None:
    """Also where a round averages some of them: the denominator is theirs."""
    federation = Federation(EQUAL[method], (1.0,) * 3)
    for round in (1, 2):
        federation.run(round, [0, 2] if round == 2 else None)
    assert sha256(federation.model()) == sha256(fedavg_after(2))
    assert all(mask.all() for mask in covered_of(federation.server).values())


@pytest.mark.parametrize("method", ["heterofl_clean", "fjord", "federated_dropout", "fedbrb_like-all"])
def test_it_is_fedavg_where_weights_are_tied_and_fused(method: str) -> None:
    federation = unequal("gpt2-lm", EQUAL[method])
    federation.run(1)
    assert sha256(federation.model()) == sha256(fedavg_after(1, "gpt2-lm"))


def test_full_windows_that_roll_are_fedavg_in_every_round() -> None:
    """Coordinates come in another order, so sums are rounded otherwise; keys' biases have no gradient but rounding."""
    rolling, plain = (Federation(a, (1.0,) * 3) for a in (FedRolex(**LOCAL, by_examples=True), FEDAVG))
    for round in range(1, 5):
        rolling.server = start(plain.server, AVERAGE)
        rolling.run(round)
        plain.run(round)
        assert close(rolling.model(), plain.server, atol=2e-4, but="k_proj.bias"), round


@pytest.mark.parametrize(
    "algorithm, equal",
    [
        (HeteroFL(**LOCAL), False),
        (HeteroFL(**LOCAL, by_examples=True), False),
        (HeteroFL(**LOCAL, masks=False), False),
        (FedRolex(**LOCAL), False),
        (HeteroFL(**LOCAL, masks=False, by_examples=True), True),
    ],
    ids=["as published", "masks", "by participants", "fedrolex", "neither"],
)
def test_as_published_it_is_not_fedavg(algorithm: Algorithm, equal: bool) -> None:
    """Its mean does not count examples, and classes that a participant lacks are left out of it."""
    federation = Federation(algorithm, (1.0,) * 3)
    federation.run(1)
    assert close(federation.model(), fedavg_after(1), atol=1e-6) == equal


@pytest.mark.parametrize("algorithm", [HeteroFL(**LOCAL, masks=False), FedRolex(**LOCAL)], ids=["heterofl", "fedrolex"])
def test_plain_means_are_fedavg_where_all_have_as_many_examples(algorithm: Algorithm) -> None:
    task = load_task(VIT, None)
    shards = [shards_of_digits(task, 3)[2]] * 3
    one, other = (Federation(a, (1.0,) * 3, task, shards=shards) for a in (algorithm, FEDAVG))
    one.run(1)
    other.run(1)
    assert sha256(one.model()) == sha256(other.server)


def test_small_sub_models_are_not_fedavg() -> None:
    """Else what is compared above would not depend on rates at all."""
    for method in ("heterofl_clean", "fjord", "federated_dropout", "fedbrb_like"):
        federation = Federation(METHODS[method])
        federation.run(1)
        assert not close(federation.model(), fedavg_after(1), atol=1e-4), method


# what the server makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, both", [("heterofl", 3.0), ("heterofl_clean", 10 / 3), ("fedrolex", 3.0), ("fjord", 10 / 3)]
)
def test_a_round_that_a_person_can_check(method: str, both: float) -> None:
    """A, who has all and 6 examples, sends twos; B, who has half and 12, fours: 3, or (6 x 2 + 12 x 4) / 18."""
    federation = Federation(METHODS[method], (1.0, 1 / 2))
    fc1 = "vit.layers.0.mlp.fc1.weight"
    before = federation.model()[fc1]
    federation.pretend(1, {0: 2.0, 1: 4.0})
    expected = torch.full((24, 16), 2.0)
    expected[:12, :8] = both
    assert torch.equal(federation.model()[fc1], expected)

    alone = Federation(METHODS[method], (1.0, 1 / 2))
    alone.pretend(1, {1: 4.0})
    expected = before.clone()
    expected[:12, :8] = 4.0
    assert torch.equal(alone.model()[fc1], expected)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_learning_rate_of_0_nothing_changes(method: str) -> None:
    """But for broadcasts, of which the next test tells."""
    algorithm: Any = dataclasses.replace(METHODS[method], lr=0.0)  # type: ignore[type-var]
    if isinstance(algorithm, FedBRBLike):
        algorithm = dataclasses.replace(algorithm, broadcast=0.0)
    federation = Federation(algorithm)
    before = sha256(federation.model())
    federation.run(1)
    federation.run(2, [1, 2])
    assert sha256(federation.model()) == before


@pytest.mark.parametrize("decay", [None, 4.0])
def test_a_broadcast_moves_the_others_towards_the_trained_block(decay: float | None) -> None:
    """One participant with halves, learning rate 0, round 2: in block 1, out block 0; lam_2 = lam / (1 + 2 / 4)."""
    federation = Federation(FedBRBLike(**local(lr=0.0), broadcast=0.3, decay=decay), (1 / 2,))
    lam = 0.3 if decay is None else 0.3 / 1.5
    before = federation.model()
    federation.run(2)
    after = federation.model()
    fc1, norm, bias = "vit.layers.0.mlp.fc1.weight", "vit.layernorm.weight", "classifier.bias"
    block = before[fc1][:12, 8:].double()
    expected = (1 - lam) * before[fc1].double() + lam * block.repeat(2, 2)
    expected[:12, 8:] = block
    assert torch.allclose(after[fc1].double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(after[fc1][:12, 8:], before[fc1][:12, 8:])
    assert torch.equal(after[norm], before[norm]), "its blocks are equal: all ones"
    assert torch.equal(after[bias], before[bias]), "it has no blocks"


def blocks(tree: Mapping[str, Tensor], name: str, n: int) -> list[Tensor]:
    """Blocks of a weight of the MLP."""
    rows, columns = tree[name].shape
    split = [part.split(columns // n, 1) for part in tree[name].split(rows // n, 0)]
    return [block for row in split for block in row]


FC1 = "vit.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize("n", [2, 4])
def test_a_broadcast_of_weight_1_makes_all_blocks_equal(n: int) -> None:
    federation = Federation(FedBRBLike(**local(rates=(1 / n,)), broadcast=1.0), (1 / n, 1 / n))
    federation.run(1)
    for name, tensor in federation.model().items():
        if "mlp.fc" in name and name.endswith("weight"):
            first, *others = blocks(federation.model(), name, n)
            assert all(torch.equal(first, other) for other in others)
            assert first.unique().numel() == first.numel(), "a block is no constant"
        elif "q_proj.weight" in name:  # halves of each head, not of the axis of all heads
            heads = tensor.reshape(2, n, 8 // n, n, 16 // n)
            assert torch.equal(heads, heads[:, :1, :, :1].expand_as(heads))
    before = sha256(federation.model())
    trained = federation.payloads(2)
    updates = [ClientUpdate(id_, tree, 1.0) for id_, tree in trained.items()]
    federation.server = federation.aggregate(2, updates)
    assert sha256(federation.model()) == before, "broadcasting equal blocks changes nothing"


@pytest.mark.parametrize("lam", [0.3, 0.5])
def test_equal_blocks_stay_equal_under_any_broadcast(lam: float) -> None:
    """Bit by bit, and where participants of halves and of quarters broadcast together."""
    made = Federation(FedBRBLike(**LOCAL, broadcast=1.0), (1 / 4,))
    made.run(1)
    federation = Federation(FedBRBLike(**LOCAL, broadcast=lam, clock="spread"), (1 / 4, 1 / 4, 1 / 2, 1 / 4))
    federation.server = made.server
    sent = [ClientUpdate(id_, tree, 1.0) for id_, tree in federation.payloads(3).items()]
    federation.server = federation.aggregate(3, sent)
    assert sha256(federation.model()) == sha256(made.model())


def test_without_a_broadcast_other_blocks_are_untouched() -> None:
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.0), (1 / 2,))
    before = federation.model()
    federation.run(1)
    old, new = blocks(before, FC1, 2), blocks(federation.model(), FC1, 2)
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [False, True, True, True]


def test_blocks_after_a_broadcast_are_the_predicted_mixture() -> None:
    """Two participants on a spread clock train two of nine blocks; the seven others move to the mean of these two."""
    target = Form(24, 1, heads=1, mlp=36, head_dim=6)
    federation = Federation(FedBRBLike(rates=(1 / 3,), broadcast=0.25, clock="spread"), (1 / 3, 1 / 3), target=target)
    name = "vit.layers.0.mlp.fc1.weight"
    before = [block.double() for block in blocks(federation.model(), name, 3)]
    federation.pretend(1, {0: 10.0, 1: 20.0})
    after = [block.double() for block in blocks(federation.model(), name, 3)]
    assert (after[0] == 10.0).all() and (after[1] == 20.0).all()
    for old, new in zip(before[2:], after[2:], strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * 15.0, rtol=0, atol=1e-6)
    mean = (10.0 + 20.0 + sum(0.75 * old.mean() + 0.25 * 15.0 for old in before[2:])) / 9
    assert float(torch.stack(after).mean()) == pytest.approx(float(mean), abs=1e-6)
    bias = "vit.layers.0.mlp.fc1.bias"  # one clock alone: both trained its first block, which counts once
    trained = (6 * 10.0 + 12 * 20.0) / 18
    assert torch.allclose(federation.model()[bias][:12], torch.full((12,), trained))
    assert torch.allclose(federation.model()[bias][12:], torch.full((24,), 0.25 * trained))


def test_a_block_of_a_vector_counts_once_however_many_trained_it() -> None:
    """Of three participants on a spread clock, times 0, 1 and 3: stream blocks 0, 1 and 0."""
    target = Form(24, 1, heads=1, mlp=36, head_dim=6)
    federation = Federation(FedBRBLike(rates=(1 / 3,), broadcast=1.0, clock="spread"), (1 / 3,) * 4, target=target)
    federation.pretend(1, {0: 10.0, 1: 20.0, 3: 10.0})
    assert federation.model()["vit.layernorm.bias"].tolist() == [10.0] * 8 + [20.0] * 8 + [15.0] * 8


def test_a_broadcast_of_changes_adds_how_the_block_changed() -> None:
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.5, mode="changes"), (1 / 2,))
    before = federation.model()
    (update,) = federation.run(1)
    change = update.tree[FC1].double() - blocks(before, FC1, 2)[0].double()
    old, new = blocks(before, FC1, 2), blocks(federation.model(), FC1, 2)
    assert torch.equal(new[0], update.tree[FC1])
    for was, is_ in zip(old[1:], new[1:], strict=True):
        assert torch.allclose(is_.double(), was.double() + 0.5 * change, rtol=0, atol=1e-6)


def test_participants_of_different_blocks_broadcast_the_mean_of_both() -> None:
    """Halves train (0, 0) of four blocks, quarters (0, 0) of sixteen: the last corner is in neither."""
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.4), (1 / 2, 1 / 4))
    before = federation.model()[FC1].double()
    federation.pretend(1, {0: 6.0, 1: 12.0})
    after = federation.model()[FC1].double()
    inside = (6 * 6.0 + 12 * 12.0) / 18
    assert torch.allclose(after[:6, :4], torch.full((6, 4), inside, dtype=torch.float64))
    assert (after[6:12, :8] == 6.0).all() and (after[:6, 4:8] == 6.0).all()
    of_halves = torch.full((12, 8), 6.0, dtype=torch.float64)
    of_halves[:6, :4] = inside
    aim = (of_halves + inside) / 2
    assert torch.allclose(after[12:, 8:], 0.6 * before[12:, 8:] + 0.4 * aim, rtol=0, atol=1e-5)
