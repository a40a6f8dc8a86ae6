"""Fed-SB: adapters B R A of which R alone is trained, sent and averaged."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.fedavg import FedAvg
from baselines.fedsb import MODEL, FedSB, R, outer_factors, with_inner
from fedsim.algorithm import ClientUpdate
from fedsim.core.tree import Tree, flat, mapped, nbytes, numel, sha256
from fedsim.learning.adapters import HEAD, A, B, adapted, products
from fedsim.learning.exits import tail
from tests.support.small_federation import (
    LOCAL,
    TARGET,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    distance,
    mean,
    weights_of,
)


RANK = 4


def fedsb(**changes: Any) -> FedSB:
    fields: dict[str, Any] = LOCAL | {"rank": RANK} | changes
    return FedSB(**fields)


def change(b: Tree, r: Tree, a: Tree) -> Tensor:
    """B R A of the matrix "w", which its rows write."""
    return products({A: a, B: with_inner(b, r)}, {"w": 0})["w"]


# on paper -------------------------------------------------------------------------------------------------------------


def test_two_clients_on_paper() -> None:
    """B = (1, 0)^T, A = (0, 1); R_1 = 2 and R_2 = 4 of 1 and 3 examples: R = 3.5, and B R A has it at the top right."""
    b, a = {"w": torch.tensor([[1.0], [0.0]])}, {"w": torch.tensor([[0.0, 1.0]])}
    inner = [{"w": torch.tensor([[value]])} for value in (2.0, 4.0)]
    federation = Federation(fedsb())
    federation.server = {R: {"w": torch.zeros(1, 1)}}
    state = federation.aggregate(1, [ClientUpdate(0, {R: inner[0]}, 1), ClientUpdate(1, {R: inner[1]}, 3)])
    assert state[R]["w"].tolist() == [[3.5]]
    assert change(b, state[R], a).tolist() == [[0.0, 3.5], [0.0, 0.0]]
    of_changes = mean([{"w": change(b, each, a)} for each in inner], [1, 3])["w"]
    assert of_changes.tolist() == [[0.0, 3.5], [0.0, 0.0]]


def test_the_change_of_a_mean_is_the_mean_of_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    b, r, a = (
        [{"w": torch.randn(*size, generator=generator, dtype=torch.float64)} for _ in range(3)]
        for size in ((7, 3), (3, 3), (3, 5))
    )
    of_changes = mean([{"w": change(b[0], each, a[0])} for each in r], [6, 12, 18])["w"]
    of_inner = change(b[0], mean(r, [6, 12, 18]), a[0])
    assert float((of_changes - of_inner).abs().max()) < 1e-12
    unlike = mean([{"w": change(b[k], r[k], a[k])} for k in range(3)], [6, 12, 18])["w"]
    assert float((unlike - of_inner).abs().max()) > 0.1, "outer factors of one's own would not do"


def test_a_round_is_the_mean_of_models() -> None:
    """Of trained models, in float64; what is sent is rounded once more, to float32."""
    federation = Federation(fedsb(lr=0.05, epochs=3))
    updates, held = federation.run(1), federation.state(0)
    writes = adapted(federation.task, TARGET)

    def matrices(r: Tree) -> Tree:
        inner, outer = mapped(Tensor.double, r), mapped(Tensor.double, {A: held[A], B: held[B]})
        return products({A: outer[A], B: with_inner(outer[B], inner)}, writes)

    of_models = mean([matrices(update.tree[R]) for update in updates], [6, 12, 18])
    assert_close(matrices(mean([update.tree[R] for update in updates], [6, 12, 18])), of_models, atol=1e-12)
    assert_close(matrices(federation.server[R]), of_models, atol=1e-6)
    assert distance(matrices(updates[0].tree[R]), of_models) > 1e-2


# what is held, and what travels ---------------------------------------------------------------------------------------


def test_outer_factors_are_orthonormal_and_everyones() -> None:
    federation = Federation(fedsb(), UNLIKE)
    held = federation.state(0)
    for name, position in adapted(federation.task, TARGET).items():
        shape, (b, a) = held[MODEL][name].shape, (held[B][name], held[A][name])
        assert (b.shape, a.shape) == ((shape[position], RANK), (RANK, shape[1 - position]))
        torch.testing.assert_close(b.T @ b, torch.eye(RANK), rtol=0, atol=1e-6)
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-6)
    assert sha256(federation.state(1)) == sha256(federation.state(2)) == sha256(held)
    other = outer_factors(held[MODEL], adapted(federation.task, TARGET), RANK, torch.Generator().manual_seed(1))
    assert distance(other[A], held[A]) > 0.1


def test_bytes_are_r_squared_a_matrix_and_the_head() -> None:
    federation = Federation(fedsb())
    task = federation.task
    head = {name: tensor for name, tensor in federation.state(0)[MODEL].items() if name in tail(task, TARGET)}
    updates = federation.run(1)
    for sent in (updates[0].tree, federation.payload(2, 0)):
        assert {*sent} == {R, HEAD} and {*sent[R]} == {*adapted(task, TARGET)}
        assert nbytes(sent) == 4 * RANK**2 * len(adapted(task, TARGET)) + nbytes(head)
    (work,) = federation.work[0].work
    assert work.trainable == numel(updates[0].tree)


def test_before_anything_is_learned_everyone_has_the_base() -> None:
    federation, plain = Federation(fedsb(), UNLIKE), Federation(FedAvg(**LOCAL))
    for model in (federation.served(0), *(federation.deployed(0, client) for client in range(3))):
        assert_same_bits(weights_of(model), plain.server)


def test_a_round_moves_adapted_matrices_and_head_alone() -> None:
    federation = Federation(fedsb(), UNLIKE)
    before, held = weights_of(federation.served(0)), sha256(federation.state(1))
    federation.run(1)
    after = weights_of(federation.served(1))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {*adapted(federation.task, TARGET), *tail(federation.task, TARGET)}
    assert sha256(federation.state(1)) == held
    assert_same_bits(weights_of(federation.deployed(1, 0)), after)


def test_a_step_is_that_of_the_merged_model() -> None:
    """By SGD: dL/dR = B^T (dL/dW) A^T, with the gradient of the matrix itself."""
    federation = Federation(fedsb(optimizer="sgd", lr=0.1, batch_size=64, clip=None))
    federation.run(1)
    task, held, payload = federation.task, federation.state(2), federation.payload(2, 2)
    model = {n: t.clone().requires_grad_() for n, t in weights_of(federation.served(1)).items()}
    batch = task.batch(federation.shards[2], torch.arange(18))
    task.loss(task.forward(TARGET, model, batch), batch).backward()
    sent = federation.update(2, 2).tree
    for name, position in adapted(task, TARGET).items():
        gradient = model[name].grad
        assert gradient is not None
        gradient = gradient if position == 0 else gradient.T
        step = -0.1 * held[B][name].T @ gradient @ held[A][name].T
        torch.testing.assert_close(sent[R][name] - payload[R][name], step, rtol=0, atol=1e-6)
    assert distance(sent[R], payload[R]) > 1e-4
    for name in tail(task, TARGET):
        gradient = model[name].grad
        assert gradient is not None
        torch.testing.assert_close(sent[HEAD][name] - payload[HEAD][name], -0.1 * gradient, rtol=0, atol=1e-6)


def test_every_client_counts() -> None:
    federation = Federation(fedsb())
    updates = federation.run(1)
    found = federation.server
    for client in range(3):
        others = list(updates)
        others[client] = dataclasses.replace(updates[client], tree=mapped(lambda t: t + 1, updates[client].tree))
        changed = flat(federation.aggregate(1, others))
        assert all(float((changed[n] - t).abs().min()) > 0.05 for n, t in flat(found).items()), client


# refusals -------------------------------------------------------------------------------------------------------------


def test_no_inner_factor_is_larger_than_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.rank=17: must be at most 16, the rank of vit\."):
        Federation(fedsb(rank=17))
    assert fedsb(rank=16).leaves == "adapter"
    with pytest.raises(ValueError, match=r"algorithm\.rank=0: must be greater than 0"):
        fedsb(rank=0)
