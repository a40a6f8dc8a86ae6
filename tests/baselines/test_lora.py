"""The four federated methods that train adapters: what travels, what is averaged, and where a base comes from."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.fedavg import FedAvg
from baselines.flora import HEAD, FLoRA
from baselines.lora import FederatedLoRA, fedit, ffa_lora, hetlora
from fedsim.algorithm import Algorithm, ClientContext, ClientUpdate
from fedsim.core.tree import Tree, clone, flat, mapped, nbytes, numel, sha256, tensors, to
from fedsim.learning.adapters import A, B, adapted, applied, products, rank_of, resized
from fedsim.learning.exits import tail
from fedsim.learning.meter import StepCost
from fedsim.learning.objectives import Frozen, Objective
from fedsim.learning.starts import start_of
from fedsim.models.checkpoint import Checkpoint
from tests.support.clients import client_init, client_update
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
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


RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK


# FedIT, FFA-LoRA and HetLoRA ------------------------------------------------------------------------------------------


def lora(make: Any, **changes: Any) -> FederatedLoRA:
    fields: dict[str, Any] = LOCAL | {"rank": RANK, "alpha": ALPHA} | changes
    return make(**fields)


METHODS = {"fedit": fedit, "ffa_lora": ffa_lora, "hetlora": hetlora}
ABLE = (TARGET,) * 3  # whoever can hold the target has all ranks


def matrices_of(federation: Federation, model: Mapping[str, Tensor]) -> Tree:
    return {name: model[name].double() for name in adapted(federation.task, TARGET)}


def test_averaged_factors_are_no_averaged_product_on_paper() -> None:
    """B1 A1 = diag(1, 0), B2 A2 = diag(0, 1): their mean is I / 2, but mean(B) mean(A) has 1/4 everywhere."""
    trees = [{A: {"w": torch.tensor([a])}, B: {"w": torch.tensor(a)[:, None]}} for a in ([1.0, 0.0], [0.0, 1.0])]
    of_products = mean([products(tree, {"w": 0}) for tree in trees], [1, 1])["w"]
    of_factors = products(mean(trees, [1, 1]), {"w": 0})["w"]
    assert of_products.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert of_factors.tolist() == [[0.25, 0.25], [0.25, 0.25]]


@pytest.mark.parametrize("name", ["fedit", "ffa_lora"])
def test_only_with_one_a_for_all_is_the_mean_of_factors_that_of_models(name: str) -> None:
    """What a server's model becomes, against the mean of its clients' models, after a round of training."""
    federation = Federation(lora(METHODS[name], lr=0.05, epochs=3))
    updates = federation.run(1)
    held = [federation.algorithm._model(federation.state(u.client), u.tree, federation.at_server(1)) for u in updates]  # type: ignore[attr-defined]
    of_models = mean([matrices_of(federation, weights_of(model)) for model in held], [6, 12, 18])
    found = matrices_of(federation, weights_of(federation.served(1)))
    start = matrices_of(federation, start_of(federation.at_server(0), TARGET, None))
    changed = distance(of_models, start)
    assert changed > 0.01
    assert (distance(found, of_models) < 1e-5 * changed + 1e-6) == (name == "ffa_lora")
    assert distance(found, of_models) < changed


@pytest.mark.parametrize("name", METHODS)
def test_every_client_counts(name: str) -> None:
    """A mean that keeps one client's part alone would pass for one: each client in turn sends something else."""
    federation = Federation(lora(METHODS[name]), ABLE)
    updates = federation.run(1)
    found = federation.server
    for client in range(3):
        others = list(updates)
        others[client] = dataclasses.replace(updates[client], tree=mapped(lambda t: t + 1, updates[client].tree))
        changed = flat(federation.aggregate(1, others))
        assert all(float((changed[n] - t).abs().min()) > 0.05 for n, t in flat(found).items()), client


@pytest.mark.parametrize("name", METHODS)
def test_before_anything_is_learned_everyone_has_the_base(name: str) -> None:
    federation = Federation(lora(METHODS[name]), UNLIKE)
    plain = Federation(FedAvg(**LOCAL))
    for model in (federation.served(0), *(federation.deployed(0, client) for client in range(3))):
        assert_same_bits(weights_of(model), plain.server)


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_and_what_stays(name: str) -> None:
    federation = Federation(lora(METHODS[name]), ABLE)
    task = federation.task
    writes, held = adapted(task, TARGET), federation.state(0)
    factors = [B] if name == "ffa_lora" else [A, B]
    expected = {f"{f}.{matrix}" for f in factors for matrix in writes} | {f"head.{n}" for n in tail(task, TARGET)}
    for state in (federation.payload(1, 0), federation.update(1, 0).tree, federation.server):
        assert {*flat(state, ".")} == expected
    kept = {f"a.{matrix}" for matrix in writes} if name == "ffa_lora" else set()
    assert {*flat(held, ".")} == {*task.specs(TARGET)} | kept
    assert sha256(federation.state(0)) == sha256(held) == sha256(federation.state(1)), "alike, and as it was"
    (work,) = federation.work[0].work
    assert work.trainable == numel(federation.server)
    if name == "ffa_lora":
        both = nbytes(Federation(lora(fedit), ABLE).payload(1, 0)) - nbytes(federation.payload(1, 0))
        assert both == nbytes(held[A])


@pytest.mark.parametrize("name", METHODS)
def test_a_round_moves_adapters_and_head_and_no_other_parameter(name: str) -> None:
    federation = Federation(lora(METHODS[name]), UNLIKE)
    before = weights_of(federation.served(0))
    federation.run(1)
    after = weights_of(federation.served(1))
    may_move = {*adapted(federation.task, TARGET), *tail(federation.task, TARGET)}
    assert {n for n in before if not torch.equal(before[n], after[n])} == may_move
    for client in range(3):
        own = weights_of(federation.deployed(1, client))
        assert_same_bits(
            {n: own[n] for n in own if n not in may_move}, {n: before[n] for n in own if n not in may_move}
        )


@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_the_merged_model(name: str) -> None:
    """One step of AdamW moves each scalar by its rate against the sign of its gradient, computed here by merging."""
    federation = Federation(lora(METHODS[name], batch_size=64, clip=None), ABLE)
    federation.run(1)
    payload, state, task = federation.payload(2, 2), federation.state(2), federation.task
    leaves = mapped(lambda t: t.clone().requires_grad_(), payload)
    base = {n: state[n] for n in task.specs(TARGET)}
    model = applied(base, {**state, **leaves}, adapted(task, TARGET), SCALE) | leaves[HEAD]
    batch = task.batch(federation.shards[2], torch.arange(18))
    task.loss(task.forward(TARGET, model, batch), batch).backward()
    sent, received, compared = flat(federation.update(2, 2).tree), flat(payload), 0
    for n, leaf in flat(leaves).items():
        assert leaf.grad is not None
        gradient = leaf.grad[leaf.grad.abs() > 1e-5]  # smaller ones are rounding, or no longer large to AdamW's 1e-8
        step = (sent[n] - received[n])[leaf.grad.abs() > 1e-5]
        torch.testing.assert_close(step, -1e-2 * gradient.sign(), rtol=0, atol=2e-5)
        compared += len(gradient)
    assert compared > 0.5 * numel(leaves)


def test_ranks_go_by_device() -> None:
    federation = Federation(lora(hetlora), UNLIKE)
    task = federation.task
    assert [rank_of(task, TARGET, form, RANK) for form in UNLIKE] == [1, 3, 4]
    for client, rank in enumerate((1, 3, 4)):
        for tree in (federation.payload(1, client), federation.update(1, client).tree):
            assert {len(a) for a in tree[A].values()} == {b.shape[1] for b in tree[B].values()} == {rank}
    for make in (fedit, ffa_lora):
        alike = Federation(lora(make), UNLIKE)
        assert {tuple(t.shape) for t in tensors(alike.payload(1, 0))} == {tuple(t.shape) for t in tensors(alike.server)}


def test_zero_padding_dilutes_by_the_owners_share() -> None:
    """All send ones with weights 1, 1 and 2: rank 1 is everyone's, ranks 2, 3 of 3/4 of the weights, rank 4 of 1/2."""
    federation = Federation(lora(hetlora), UNLIKE)
    updates = [
        ClientUpdate(id_, mapped(torch.ones_like, federation.payload(1, id_)), weight)
        for id_, weight in enumerate((1, 1, 2))
    ]
    expected, state = torch.tensor([1.0, 0.75, 0.75, 0.5]), federation.aggregate(1, updates)
    assert all(torch.equal(a, expected[:, None].expand_as(a)) for a in state[A].values())
    assert all(torch.equal(b, expected.expand_as(b)) for b in state[B].values())
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in state[HEAD].values())


def test_hetlora_weighs_by_the_norm_of_what_was_learned() -> None:
    federation = Federation(lora(hetlora), UNLIKE)
    writes = adapted(federation.task, TARGET)
    updates = federation.run(1)
    for update in updates:
        squares = sum(float((update.tree[B][n] @ update.tree[A][n]).double().square().sum()) for n in writes)
        assert update.weight == pytest.approx(squares**0.5, rel=1e-5)
        assert update.weight > 0
    assert len({round(update.weight, 6) for update in updates}) == 3
    padded = [resized(update.tree, RANK) for update in updates]
    assert_close(federation.server, mean(padded, [update.weight for update in updates]), atol=1e-6)
    by_examples = mean(padded, [6, 12, 18])
    assert distance(federation.server, by_examples) > 1e-4


def test_where_nothing_was_learned_all_adapters_count_alike() -> None:
    federation = Federation(lora(hetlora, lr=0.0), UNLIKE)
    before = federation.server
    updates = federation.run(1)
    assert len({update.weight for update in updates}) == 1 and updates[0].weight > 0
    share = torch.tensor([1.0, 2 / 3, 2 / 3, 1 / 3])[:, None]
    expected = before | {A: {name: a * share for name, a in before[A].items()}}
    assert_close(federation.server, expected, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_in_equal_out_equal(name: str) -> None:
    federation = Federation(lora(METHODS[name]), ABLE)
    same = drawn_like(federation.payload(1, 0), seed=3)
    found = federation.aggregate(1, [ClientUpdate(id_, same, weight) for id_, weight in ((0, 0.3), (2, 1.7))])
    assert_close(found, same, atol=1e-6)
    assert_same_bits(federation.aggregate(1, [ClientUpdate(1, same, 12)]), same)


# where a base comes from ----------------------------------------------------------------------------------------------


def saved(federation: Federation, folder: Path, seed: int = 3) -> Tree:
    """A target on disk, and what is in it."""
    tree = federation.task.fresh(TARGET, seed)
    federation.task.module(TARGET, tree).save_pretrained(folder)  # type: ignore[operator]
    return tree


@pytest.mark.parametrize("make", [fedit, FLoRA])
def test_a_base_may_be_a_checkpoint(make: Any, tmp_path: Path) -> None:
    tree = saved(Federation(FedAvg(**LOCAL)), tmp_path)
    federation = Federation(lora(make, base=Checkpoint(str(tmp_path))))
    for model in (federation.served(0), federation.deployed(0, 1)):
        assert_same_bits(weights_of(model), tree)
    before = sha256(start_of(federation.at_server(0), TARGET, Checkpoint(str(tmp_path))))
    federation.run(1)
    assert sha256(start_of(federation.at_server(0), TARGET, Checkpoint(str(tmp_path)))) == before, "nobody wrote to it"
    others = {n for n in tree if n not in {*adapted(federation.task, TARGET), *tail(federation.task, TARGET)}}
    assert_same_bits({n: weights_of(federation.served(1))[n] for n in others}, {n: tree[n] for n in others})


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path) -> None:
    saved(Federation(FedAvg(**LOCAL)), tmp_path)
    with pytest.raises(ValueError, match=r"form\.depth"):
        Federation(lora(fedit, base=Checkpoint(str(tmp_path))), target=dataclasses.replace(TARGET, depth=3))


def test_without_a_checkpoint_all_begin_with_fedavgs_target() -> None:
    federation = Federation(FedAvg(**LOCAL))
    assert_same_bits(start_of(federation.at_server(0), TARGET, None), federation.server)
    assert sha256(start_of(dataclasses.replace(federation.at_server(0), seed=1), TARGET, None)) != sha256(
        federation.server
    )


# FLoRA ----------------------------------------------------------------------------------------------------------------


def flora(**changes: Any) -> FLoRA:
    fields: dict[str, Any] = LOCAL | {"rank": RANK, "alpha": ALPHA} | changes
    return FLoRA(**fields)


def learned(federation: Federation, updates: Sequence[ClientUpdate], power: int = 1) -> Tree:
    """sum_k p_k^power B_k A_k of each matrix, in double precision."""
    total = sum(update.weight for update in updates)
    return {
        name: sum((u.weight / total) ** power * u.tree[B][name].double() @ u.tree[A][name].double() for u in updates)
        for name in adapted(federation.task, TARGET)
    }  # type: ignore[return-value]


def test_what_is_merged_is_the_sum_of_products() -> None:
    federation = Federation(flora(lr=0.05, epochs=3), UNLIKE)
    start = matrices_of(federation, weights_of(federation.served(0)))
    updates = federation.run(1)
    after = matrices_of(federation, weights_of(federation.served(1)))
    change, twice = learned(federation, updates), learned(federation, updates, power=2)
    assert_close(after, {n: start[n] + SCALE * change[n] for n in start}, atol=1e-6)
    assert distance(after, {n: start[n] + SCALE * twice[n] for n in start}) > 1e-3, "one side alone carries weights"
    factors = [{A: {n: u.tree[A][n][:1] for n in start}, B: {n: u.tree[B][n][:, :1] for n in start}} for u in updates]
    of_means = products(mean(factors, [6, 12, 18]), adapted(federation.task, TARGET))
    assert distance({n: SCALE * c for n, c in change.items()}, {n: SCALE * c for n, c in of_means.items()}) > 1e-3


def test_a_stack_on_paper() -> None:
    """Weights 1 and 3; B1 A1 = 2 everywhere, B2 A2 = 3 * 2 * 6 = 36: W + s (2 / 4 + 108 / 4) = W + 27.5 s."""
    federation = Federation(flora(), UNLIKE)
    start = matrices_of(federation, weights_of(federation.served(0)))
    trees = [federation.update(1, client).tree for client in (0, 1)]
    values = ({A: 1.0, B: 2.0, HEAD: 7.0}, {A: 2.0, B: 6.0, HEAD: 11.0})
    filled = [
        {part: {n: torch.full_like(t, value[part]) for n, t in tree[part].items()} for part in tree}
        for tree, value in zip(trees, values, strict=True)
    ]
    assert [len(filled[k][A][n]) for k in (0, 1) for n in start][:: len(start)] == [1, 3]
    federation.server = federation.aggregate(1, [ClientUpdate(0, filled[0], 1), ClientUpdate(1, filled[1], 3)])
    stack = federation.server["stack"]
    assert {a.shape[0] for a in stack[A].values()} == {b.shape[1] for b in stack[B].values()} == {4}
    after = matrices_of(federation, weights_of(federation.served(1)))
    assert_close(after, {n: t + 27.5 * SCALE for n, t in start.items()}, atol=1e-4)
    for tensor in federation.server[HEAD].values():
        assert torch.equal(tensor, torch.full_like(tensor, 10.0))


def test_one_clients_merge_is_its_own_trained_model() -> None:
    federation = Federation(flora(), UNLIKE)
    (update,) = federation.run(1, cohort=[2])
    own = applied(federation.state(2), update.tree, adapted(federation.task, TARGET), SCALE) | update.tree[HEAD]
    assert_close(weights_of(federation.served(1)), own, atol=1e-6)


def test_adapters_begin_anew_in_every_round_for_everyone() -> None:
    """At a rate of 0 what is sent is what training started from."""
    federation = Federation(flora(lr=0.0))
    first, second = federation.run(1), federation.run(2)
    hashes = {sha256(u.tree[A]) for u in (*first, *second)}
    assert len(hashes) == 6
    assert all(not b.any() for u in first for b in u.tree[B].values())
    assert_same_bits(weights_of(federation.served(2)), start_of(federation.at_server(0), TARGET, None))


COHORTS = [[0, 1], [1, 2], [0], [], [2, 0], [1], [1, 2], [0, 1, 2], [2], [0], [0, 2]]


def test_whoever_missed_rounds_holds_the_servers_model_all_the_same() -> None:
    """Bit by bit, in every round, whether it is sent the last stack or the matrices."""
    federation = Federation(flora(rank=1), ALIKE)
    took: list[set[str]] = []
    for round, cohort in enumerate(COHORTS, start=1):
        federation.run(round, cohort)
        expected = weights_of(federation.served(round))
        for client in range(3):
            assert_same_bits(weights_of(federation.deployed(round, client)), expected)
            took.append({*federation.payload(round + 1, client)} - {HEAD})
    assert took[:3] == [{"stack"}] * 3, "after one stack nobody has missed anything"
    assert {"stack"} in took[3:] and {"w"} in took[3:]
    last = took[-3:]
    assert last == [{"stack"}, {"w"}, {"stack"}], "the second missed the round before"


def test_a_client_that_has_it_all_is_sent_the_stack_and_the_others_the_matrices() -> None:
    federation = Federation(flora(rank=1))
    task = federation.task
    head = nbytes(federation.server[HEAD])
    sides = [task.fresh(TARGET, 0)[name].shape for name in adapted(task, TARGET)]
    matrices, one = 4 * sum(o * i for o, i in sides), 4 * sum(o + i for o, i in sides)
    assert [nbytes(federation.payload(1, client)) for client in range(3)] == [head] * 3
    federation.run(1, cohort=[0, 1])
    assert [nbytes(federation.payload(2, client)) for client in range(3)] == [head + 2 * one] * 3
    federation.run(2, cohort=[0])
    expected = [head + one, head + matrices, head + matrices]
    assert [nbytes(federation.payload(3, client)) for client in range(3)] == expected
    assert nbytes(federation.update(3, 1).tree) == head + one


def test_a_stack_larger_than_the_matrices_is_not_sent() -> None:
    federation = Federation(flora(rank=8))
    federation.clients = [dataclasses.replace(client, form=TARGET) for client in federation.clients]
    federation.run(1)
    stack = nbytes(federation.server["stack"])
    matrices = nbytes(federation.server["w"])
    assert stack > matrices
    for client in range(3):
        assert nbytes(federation.payload(2, client)["w"]) == matrices
        assert "stack" not in federation.payload(2, client)
        assert_same_bits(weights_of(federation.deployed(1, client)), weights_of(federation.served(1)))


def test_the_servers_notes_stay_at_the_server_and_a_lost_round_leaves_them() -> None:
    federation = Federation(flora(rank=1))
    federation.run(1)
    assert "since" not in federation.payload(2, 0)
    assert federation.server["since"].tolist() == [1, 0, 1, 1, 1]
    federation.run(2, cohort=[2])
    assert federation.server["since"].tolist() == [2, 1, 1, 1, 2]
    before = clone(federation.server)
    federation.run(3, cohort=[])
    assert_same_bits(federation.server, before)


# where tensors are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fedit, ffa_lora, hetlora, FLoRA])
def test_what_a_participant_makes_is_on_its_device(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta device has no values, but it shows where tensors are put, and refuses to mix them with others."""

    def run(context: ClientContext, objective: Objective, parameters: Tree, frozen: Frozen) -> StepCost:
        example = {name: tensor.to(context.device) for name, tensor in context.task.example(1).items()}
        objective(parameters, frozen, example)
        return StepCost((0, 0), (1, 1))

    monkeypatch.setattr(StepCost, "measured", staticmethod(run))
    algorithm: Algorithm = lora(make)
    federation = Federation(algorithm, UNLIKE)
    context = federation.at_client(1, 0, device="meta", empty=True)
    state = client_init(algorithm, context)
    assert {tensor.device.type for tensor in tensors(state)} == {"meta"}
    monkeypatch.setattr("fedsim.learning.adapters.norm", lambda *arguments: 1.0)  # a number of a tensor without values
    federation.run(1)
    payload = to(federation.payload(2, 0), "meta")
    update, kept = client_update(algorithm, payload, state, context)
    for tree in (update.tree, kept):
        assert {tensor.device.type for tensor in tensors(tree)} == {"meta"}
