"""SCAFFOLD and FedNova against their papers' updates, written out for two clients, and against FedAvg."""

import dataclasses
from typing import Any

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fednova import FedNova
from baselines.scaffold import Scaffold
from fedsim.core.tree import Tree
from fedsim.learning.objectives import Corrected, TaskLoss
from fedsim.learning.training import Training, train
from fedsim.privacy import Around, ParticipantDP
from tests.support.clients import client_update
from tests.support.small_federation import SIZES, TARGET, Federation, assert_close, assert_same_bits


LOCAL: dict[str, Any] = {"lr": 0.05, "epochs": 1, "batch_size": 6}  # shards of 6, 12 and 18: 1, 2 and 3 steps
ONE_STEP: dict[str, Any] = {"lr": 0.05, "epochs": 1, "batch_size": 18}
SGD: dict[str, Any] = {"optimizer": "sgd", "clip": None}


def plus(left: Tree, right: Tree, factor: float = 1.0) -> Tree:
    return {name: tensor + factor * right[name] for name, tensor in left.items()}


def local_sgd(federation: Federation, round: int, client: int, start: Tree, correction: Tree | None = None) -> Tree:
    """`y` after the client's steps of SGD, with a correction of every gradient."""
    loss: Any = TaskLoss(federation.task, TARGET)
    frozen = {} if correction is None else {"correction": correction}
    objective = loss if correction is None else Corrected(loss)
    context = federation.at_client(round, client)
    return train(context, Training(objective, start, frozen, purpose="target", optimizer="sgd", **LOCAL)).parameters


# SCAFFOLD -------------------------------------------------------------------------------------------------------------


def test_the_correction_is_added_to_the_gradient() -> None:
    federation = Federation(Scaffold(**LOCAL))
    start = federation.payload(1, 0)["model"]
    batch = federation.task.batch(federation.shards[0], torch.arange(4))
    correction = {name: torch.full_like(tensor, 0.25) for name, tensor in start.items()}
    gradients, losses = [], []
    for objective in (TaskLoss(federation.task, TARGET), Corrected(TaskLoss(federation.task, TARGET))):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        loss = objective(leaves, {"correction": correction}, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert_close(plus(gradients[0], correction), gradients[1], atol=1e-6)
    assert losses[0] == losses[1], "what is reported is the task's loss"


def test_two_rounds_of_two_clients_are_the_papers() -> None:
    """Algorithm 1, option II, with clients 1 and 2 of three in the cohort."""
    federation = Federation(Scaffold(**LOCAL))
    x = federation.payload(1, 0)["model"]
    c: Tree = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    own = {1: c, 2: c}
    for round in (1, 2):
        ends, changes = [], []
        for client, steps in ((1, 2), (2, 3)):
            y = local_sgd(federation, round, client, x, plus(c, own[client], -1.0))
            after = {n: own[client][n] - c[n] + (x[n] - y[n]) / (steps * LOCAL["lr"]) for n in x}
            ends.append(y)
            changes.append(plus(after, own[client], -1.0))
            own[client] = after
        x = {name: (ends[0][name] + ends[1][name]) / 2 for name in x}
        c = {name: c[name] + 2 / 3 * (changes[0][name] + changes[1][name]) / 2 for name in c}
        federation.run(round, cohort=[1, 2])
        assert_close(federation.server["model"], x, atol=1e-6)
        assert_close(federation.server["control"], c, atol=1e-5)
        for client in own:
            assert_close(federation.state(client), own[client], atol=1e-5)
    assert max(float(tensor.abs().max()) for tensor in c.values()) > 1e-3


def test_with_variates_of_zero_scaffold_is_fedavg_of_clients_that_count_alike() -> None:
    """In the first round all are zero: what is sent is what FedAvg's clients send, to the bit where they step once."""
    scaffold, fedavg = Federation(Scaffold(**ONE_STEP)), Federation(FedAvg(**ONE_STEP | SGD))
    for client in range(3):
        ours, theirs = scaffold.update(1, client), fedavg.update(1, client)
        assert_close(ours.tree["model"], theirs.tree, atol=1e-7)
        assert ours.weight == 1
    scaffold, fedavg = Federation(Scaffold(**ONE_STEP)), Federation(FedAvg(**ONE_STEP | SGD))
    sent = [dataclasses.replace(fedavg.update(1, client), weight=1) for client in range(3)]
    scaffold.run(1)
    assert_close(scaffold.server["model"], fedavg.aggregate(1, sent), atol=1e-7)
    scaffold.run(2)
    second = [dataclasses.replace(fedavg.update(2, client), weight=1) for client in range(3)]
    with pytest.raises(AssertionError):
        assert_close(scaffold.server["model"], fedavg.aggregate(2, second), atol=1e-4)


def test_a_pair_that_clips_updates_shortens_the_change_of_a_variate_and_not_the_variate() -> None:
    """Taken for what was received, a change would be pulled to c, and c would double in a round."""
    clipped = Federation(Around(Scaffold(**LOCAL), (ParticipantDP(clip=0.05),)))
    for round in range(1, 7):
        clipped.run(round)
    norm = sum(float(tensor.square().sum()) for tensor in clipped.server["control"].values()) ** 0.5
    assert 0 < norm <= 6 * 0.05


def test_whole_batches_of_equal_shards_keep_variates_equal() -> None:
    """Where all clients are one, c_i = c after a round: nothing is corrected."""
    federation = Federation(Scaffold(**ONE_STEP))
    federation.shards = [federation.shards[2]] * 3
    federation.run(1)
    for client in range(3):
        assert_close(federation.state(client), federation.server["control"], atol=1e-5)


@pytest.mark.parametrize(
    "field, value", [("clip", 1.0), ("momentum", 0.9), ("schedule", "cosine"), ("weight_decay", 0.1)]
)
def test_scaffold_is_plain_sgd(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{field}={value!r}.*plain SGD"):
        Scaffold(**{field: value})


# FedNova --------------------------------------------------------------------------------------------------------------


def test_the_norm_of_accumulated_gradients_by_hand() -> None:
    """With momentum 1/2, three steps count their gradients 1 + 1/2 + 1/4, 1 + 1/2 and 1 times."""
    assert FedNova().norm(3) == 3
    assert FedNova(momentum=0.5).norm(1) == 1
    assert FedNova(momentum=0.5).norm(3) == 1.75 + 1.5 + 1
    assert FedNova().norm(0) == 0 == FedNova(momentum=0.5).norm(0)


def test_a_round_of_two_clients_is_the_papers() -> None:
    """Equation 6: of 2 and 3 steps, p = 2/5 and 3/5: tau_eff = 2.6."""
    federation = Federation(FedNova(**LOCAL, clip=None))
    x = federation.payload(1, 1)
    d = {
        client: {n: (t - x[n]) / s for n, t in local_sgd(federation, 1, client, x).items()}
        for client, s in ((1, 2), (2, 3))
    }
    expected = {name: x[name] + 2.6 * (0.4 * d[1][name] + 0.6 * d[2][name]) for name in x}
    federation.run(1, cohort=[1, 2])
    assert_close(federation.server, expected, atol=1e-6)


def test_with_equal_steps_fednova_is_fedavg() -> None:
    nova, fedavg = Federation(FedNova(**ONE_STEP, clip=None)), Federation(FedAvg(**ONE_STEP | SGD))
    for round in (1, 2):
        nova.run(round)
        fedavg.run(round)
    assert_close(nova.server, fedavg.server, atol=1e-6)


def test_with_unequal_steps_it_is_not() -> None:
    nova, fedavg = Federation(FedNova(**LOCAL, clip=None)), Federation(FedAvg(**LOCAL | SGD))
    nova.run(1)
    fedavg.run(1)
    with pytest.raises(AssertionError):
        assert_close(nova.server, fedavg.server, atol=1e-4)


def test_momentum_is_normalised_too() -> None:
    """Alone in the cohort a client goes where its own steps led, whatever its momentum."""
    federation = Federation(FedNova(**LOCAL, momentum=0.9))
    start, update = federation.payload(1, 2), federation.update(1, 2)
    assert float(update.tree["norm"]) == pytest.approx(FedNova(momentum=0.9).norm(3))
    end = plus(start, update.tree["change"], float(update.tree["norm"]))
    assert_close(federation.aggregate(1, [update]), end, atol=1e-7)
    assert update.weight == SIZES[2]


@pytest.mark.parametrize("algorithm", [Scaffold(**LOCAL), FedNova(**LOCAL)], ids=lambda a: a.name)
def test_nobody_came(algorithm: Any) -> None:
    federation = Federation(algorithm)
    assert_same_bits(federation.aggregate(1, []), federation.server)


@pytest.mark.parametrize("algorithm", [Scaffold(**LOCAL), FedNova(**LOCAL)], ids=lambda a: a.name)
def test_a_client_without_steps_changes_nothing(algorithm: Any) -> None:
    federation = Federation(algorithm)
    context = federation.at_client(1, 0, empty=True)
    update, kept = client_update(algorithm, federation.payload(1, 0), federation.state(0), context)
    assert_same_bits(kept, federation.state(0))
    assert_same_bits(federation.aggregate(1, [update]), federation.server)


@pytest.mark.parametrize("field, value", [("nesterov", True), ("schedule", "linear"), ("lr_warmup", 0.5)])
def test_fednova_knows_its_norms(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{field}={value!r}"):
        FedNova(momentum=0.9, **{field: value})
