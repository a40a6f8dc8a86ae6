"""FedProto, FedTGP and FedGH against their papers' steps, written out for two clients; LG-FedAvg against FedAvg."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import baselines.fedavg
from baselines.fedavg import fedavg_small
from baselines.fedgh import FedGH
from baselines.fedproto import FedProto
from baselines.fedtgp import FedTGP, contrastive, generated, widest_gap
from baselines.lg_fedavg import LGFedAvg
from baselines.local_only import LocalOnly
from baselines.private_models import nearest_head
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.tree import Tree, clone, flat, nbytes, sha256
from fedsim.data.config import DataConfig, pydoc
from fedsim.learning.batched import Tally
from fedsim.learning.features import PROJECTION, head_of, logits_and_features
from fedsim.learning.objectives import TaskLoss
from fedsim.learning.steps import run_batched
from fedsim.learning.task import Task, TaskConfig
from fedsim.learning.training import Training
from fedsim.models import Form
from tests.support.clients import local_train
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
    MEDIUM,
    SMALL,
    TARGET,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    mean,
    weights_of,
)


AS_WIDE = (MEDIUM, TARGET, TARGET)  # of 16, in 2 and 4 blocks
CLASSES = 10
FIVE_EPOCHS: dict[str, Any] = LOCAL | {"epochs": 5}
ONE_BATCH: dict[str, Any] = LOCAL | {"batch_size": 64}
EVERY: dict[str, Any] = {"lg_fedavg": LGFedAvg, "fedproto": FedProto, "fedtgp": FedTGP, "fedgh": FedGH}


def private_of(federation: Federation, client: int, round: int) -> Tree:
    """The client's model as it trains it, with features."""
    state = federation.state(client)
    head = head_of(federation.task, federation.clients[client].form)
    return {**state, **{n: t for n, t in federation.payload(round, client).items() if n in head}}


def means_of(federation: Federation, client: int, model: Tree) -> tuple[Tree, dict[str, int]]:
    """Mean features of each class of a shard, one example after another; and their numbers."""
    shard, form, found = federation.shards[client], federation.clients[client].form, dict[str, list[Tensor]]()
    for at, label in enumerate(shard.labels.tolist()):
        batch = federation.task.batch(shard, torch.tensor([at]))
        with torch.no_grad():
            found.setdefault(str(label), []).append(logits_and_features(federation.task, form, model, batch)[1][0])
    return {n: torch.stack(z).mean(0) for n, z in found.items()}, {n: len(z) for n, z in found.items()}


# all four -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "task",
    [
        TaskConfig(pydoc(limit=20, max_length=8), family="gpt2"),
        TaskConfig(pydoc(limit=20, max_length=8, objective="masked_token"), family="bert"),
        TaskConfig(
            DataConfig("t.parquet", text=("w",), label="t", objective="token_classes", num_classes=3, max_length=8),
            family="bert",
        ),
    ],
    ids=["lm", "mlm", "tokens"],
)
def test_data_without_one_class_an_example_are_refused(name: str, task: TaskConfig) -> None:
    kind = Task(task).inputs.kind
    with pytest.raises(ValueError, match=f"task.data='{kind}': must be of kind 'image' or 'text'"):
        EVERY[name](**LOCAL).check(Task(task), [SMALL], None, TARGET)


@pytest.mark.parametrize("name", EVERY)
def test_fields_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm.features=0"):
        EVERY[name](features=0)


@pytest.mark.parametrize("name", EVERY)
def test_no_model_leaves_and_what_is_deployed_is_of_the_clients_form(name: str) -> None:
    algorithm: Algorithm = EVERY[name](**LOCAL)
    federation = Federation(algorithm, UNLIKE)
    assert algorithm.leaves == ("head" if name == "lg_fedavg" else "statistics")
    for round in (1, 2):
        updates = federation.run(round)
    for client, form in enumerate(UNLIKE):
        model = federation.deployed(2, client)
        expected = {n: t.shape for n, t in federation.task.fresh(form, 0).items()}
        assert {n: t.shape for n, t in weights_of(model).items()} == expected
        assert torch.isfinite(model(pixel_values=federation.pixels).logits).all()
        private = {sha256({"t": t}) for t in federation.state(client).values()}
        assert private.isdisjoint(sha256({"t": t}) for u in updates for t in flat(u.tree).values())
        assert (PROJECTION in federation.state(client)) == (form.width < 16)


@pytest.mark.parametrize("name", EVERY)
def test_a_field_says_how_wide_features_are(name: str) -> None:
    federation = Federation(EVERY[name](**LOCAL, features=5), UNLIKE)
    updates = federation.run(1)
    assert {t.shape[-1] for u in updates for t in flat(u.tree).values() if t.dim()} <= {5, CLASSES}
    assert all(federation.state(client)[PROJECTION].shape == (5, form.width) for client, form in enumerate(UNLIKE))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_one_by_one_to_rounding(name: str) -> None:
    """In round 2, when there are prototypes; only the first two clients are of one form."""
    algorithm = EVERY[name](**LOCAL | {"lr": 1e-3})
    by_themselves, in_a_batch = (Federation(algorithm, (SMALL, SMALL, MEDIUM)) for _ in range(2))
    for federation in (by_themselves, in_a_batch):
        federation.run(1)
    tally = Tally()
    found: list[Any] = run_batched([functools.partial(in_a_batch.updating, 2, client) for client in range(3)], tally)
    assert (tally.batched, tally.alone, tally.reasons) == (2, 1, [])
    for client, update in enumerate(found):
        assert_close(update.tree, by_themselves.update(2, client).tree, atol=1e-4)


# FedProto -------------------------------------------------------------------------------------------------------------


def sent(means: dict[int, float], counts: dict[int, int] | None = None) -> dict[str, Any]:
    """What a client of FedProto sends, of eight equal features; of FedTGP, without counts."""
    tree: dict[str, Any] = {"prototypes": {str(n): torch.full((8,), value) for n, value in means.items()}}
    return tree | ({"counts": {str(n): torch.tensor(float(c)) for n, c in counts.items()}} if counts else {})


def test_prototypes_of_two_clients_by_hand() -> None:
    """Class 3: (1 x 2 + 3 x 6) / 4 = 5, not (2 + 6) / 2. Class 7 is one client's. Others are unknown."""
    federation = Federation(FedProto(**LOCAL))
    first, second = sent({3: 2.0}, {3: 1}), sent({3: 6.0, 7: -1.0}, {3: 3, 7: 5})
    federation.server = federation.aggregate(1, [ClientUpdate(0, first, 6), ClientUpdate(1, second, 12)])
    expected = torch.zeros(CLASSES, 8)
    expected[3], expected[7] = 5.0, -1.0
    assert torch.equal(federation.server["prototypes"], expected)
    assert federation.server["known"].nonzero().flatten().tolist() == [3, 7]
    federation.server = federation.aggregate(2, [ClientUpdate(0, sent({3: 1.0}, {3: 9}), 6)])
    expected[3] = 1.0
    assert torch.equal(federation.server["prototypes"], expected), "class 7 keeps what it had"


@pytest.mark.parametrize("forms", [AS_WIDE, UNLIKE], ids=["as wide", "unlike"])
def test_what_is_sent_are_the_means_of_the_trained_models_features(forms: Sequence[Form]) -> None:
    federation = Federation(FedProto(**LOCAL), forms)
    federation.run(1)
    for update in federation.run(2):
        means, counts = means_of(federation, update.client, federation.state(update.client))
        assert_close(update.tree["prototypes"], means, atol=1e-5)
        assert {n: int(count) for n, count in update.tree["counts"].items()} == counts
        assert len(means) < CLASSES or update.client, "of classes that a client does not have it sends nothing"


def test_a_client_is_drawn_to_the_prototypes() -> None:
    """With a large weight, features come closer to them than without."""

    def distances(weight: float) -> float:
        federation = Federation(FedProto(**FIVE_EPOCHS, weight=weight))
        federation.server = {"prototypes": torch.full((CLASSES, 8), 0.5), "known": torch.ones(CLASSES).bool()}
        return sum(float((z - 0.5).square().mean()) for z in federation.update(1, 2).tree["prototypes"].values())

    assert distances(10.0) < 0.7 * distances(0.0)


def test_without_weight_everyone_is_alone_and_with_it_from_the_second_round_on_nobody() -> None:
    algorithms = FedProto(**LOCAL, weight=0.0, predict="head"), FedProto(**LOCAL), LocalOnly(**LOCAL)
    zero, one, alone = (Federation(algorithm, AS_WIDE) for algorithm in algorithms)
    for client in range(3):  # who is alone begins with a model of its own
        assert sha256(alone.state(client)) != sha256(zero.state(client))
        alone.private[client] = clone(zero.state(client))
    for round in (1, 2, 3):
        for federation in (zero, one, alone):
            federation.run(round)
        for client in range(3):
            assert_same_bits(zero.state(client), alone.state(client))
            drawn = sha256(one.state(client)) != sha256(alone.state(client))
            assert drawn == (round > 1), "before the first round nobody knows a prototype"
            assert_same_bits(weights_of(zero.deployed(round, client)), weights_of(alone.deployed(round, client)))


def test_the_nearest_prototype_by_hand() -> None:
    """z = (1, 1) lies 1 from (1, 2), 2 from (1, -1); what nobody knows is never near, though it lies at z itself."""
    prototypes, known = torch.tensor([[1.0, 2.0], [1.0, -1.0], [1.0, 1.0]]), torch.tensor([True, True, False])
    head = nearest_head(prototypes, known)
    z = torch.tensor([1.0, 1.0])
    logits = head["weight"] @ z + head["bias"]
    assert float(logits[0] - logits[1]) == pytest.approx(-1.0 + 4.0)
    assert int(logits.argmax()) == 0
    for z in torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) * 30:
        logits = head["weight"] @ z + head["bias"]
        assert int(logits.argmax()) < 2 and float(logits[2]) == pytest.approx(float(logits[0]) - 20, abs=1e-3)


@pytest.mark.parametrize("algorithm", [FedProto, FedTGP])
@pytest.mark.parametrize("forms", [AS_WIDE, UNLIKE], ids=["as wide", "unlike"])
def test_what_is_deployed_is_the_nearest_prototype(algorithm: type[FedProto | FedTGP], forms: Sequence[Form]) -> None:
    federation = Federation(algorithm(**LOCAL), forms)
    federation.run(1)
    sent = federation.payload(2, 0)
    for client in range(3):
        form, batch = federation.clients[client].form, {"pixel_values": federation.pixels}
        _, z = logits_and_features(federation.task, form, federation.state(client), batch)
        distances = torch.cdist(z.double(), sent["prototypes"].double())
        distances[:, ~sent["known"]] = torch.inf
        said = federation.deployed(2, client).eval()(federation.pixels).logits
        assert torch.equal(said.argmax(-1), distances.argmin(-1))
        own = algorithm(**LOCAL, predict="head")
        deployed = own.client_model(sent, federation.state(client), federation.at_client(2, client))
        assert not torch.allclose(deployed.eval()(federation.pixels).logits, said)


def test_without_a_bias_or_any_prototype_it_is_the_own_head() -> None:
    federation = Federation(FedProto(**LOCAL))
    own = weights_of(federation.deployed(1, 0))
    state = federation.state(0)
    assert all(torch.equal(own[name], state[name]) for name in head_of(federation.task, federation.clients[0].form))


def test_bytes_of_prototypes() -> None:
    federation = Federation(FedProto(**LOCAL), UNLIKE)
    for update in federation.run(1):
        held = len(federation.shards[update.client].labels.unique())
        assert nbytes(update.tree) == held * (16 + 1) * 4
    assert nbytes(federation.payload(2, 0)) == CLASSES * (16 * 4 + 1)
    tgp = Federation(FedTGP(**LOCAL), UNLIKE)
    for update in tgp.run(1):
        assert nbytes(update.tree) == len(tgp.shards[update.client].labels.unique()) * 16 * 4
    assert nbytes(tgp.payload(2, 0)) == CLASSES * (16 * 4 + 1)


# FedTGP ---------------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_by_hand() -> None:
    """Distances 5 and 1, of which the second is its own and taken for 3: log(1 + exp(3 - 5))."""
    point, prototypes = torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    own = torch.tensor([1])
    assert float(contrastive(point, own, prototypes, 2.0)) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-4)
    assert float(contrastive(point, own, prototypes, 0.0)) == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-4)


def test_the_margin_by_hand() -> None:
    """Classes at 0, 1 and 5, the mean of 4 and 6: to the nearest it is 1, 1 and 4."""
    points, labels = torch.tensor([[0.0], [1.0], [4.0], [6.0]]), torch.tensor([2, 0, 1, 1])
    assert widest_gap(points, labels) == pytest.approx(4.0)
    assert widest_gap(points[2:], labels[2:]) == 0.0, "a single class"


def test_a_step_of_the_server_is_written_out() -> None:
    """All prototypes in one batch, one epoch: one step of gradient descent; the margin 3 is the largest."""
    federation = Federation(FedTGP(**ONE_BATCH, server_epochs=1, server_lr=0.1, margin=3.0))
    before = clone(federation.server)["trainable"]
    updates = [ClientUpdate(0, sent({3: 2.0}), 6), ClientUpdate(1, sent({3: 6.0, 7: -9.0}), 12)]
    points = torch.stack([torch.full((8,), value) for value in (2.0, 6.0, -9.0)])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    hidden = (leaves["embedding"] @ leaves["hidden.weight"].T + leaves["hidden.bias"]).relu()
    prototypes = hidden @ leaves["out.weight"].T + leaves["out.bias"]
    losses = []
    for point, label in zip(points, (3, 3, 7), strict=True):
        distances = (prototypes - point).square().sum(-1).sqrt()
        margin = torch.zeros(CLASSES)
        margin[label] = 3.0
        losses.append(-(-distances - margin).log_softmax(-1)[label])
    torch.stack(losses).mean().backward()
    expected = {name: leaf.detach() - 0.1 * leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    federation.server = federation.aggregate(1, updates)
    assert_close(federation.server["trainable"], expected, atol=1e-6)
    payload = federation.payload(2, 0)
    assert_same_bits(payload, {"prototypes": generated(federation.server["trainable"]), "known": torch.ones(10).bool()})


def test_a_servers_training_brings_prototypes_to_their_clients_and_keeps_them_apart() -> None:
    federation = Federation(FedTGP(**LOCAL, server_epochs=300, server_lr=0.1))
    updates = [ClientUpdate(0, sent({3: 1.0, 7: -1.0}), 6)]
    assert not federation.server["known"].any()
    for round in (1, 2):
        federation.server = federation.aggregate(round, updates)
    found = federation.payload(3, 0)["prototypes"]
    points = {3: torch.full((8,), 1.0), 7: torch.full((8,), -1.0)}
    for label, point in points.items():
        assert int((found - point).square().sum(-1).argmin()) == label
    assert_same_bits(federation.aggregate(3, []), federation.server)


# FedGH ----------------------------------------------------------------------------------------------------------------


def test_a_step_of_the_header_by_hand() -> None:
    """From zeros all 10 classes have 0.1: row 3 moves by 0.5 x 0.9 z, the others by -0.5 x 0.1 z; the bias likewise."""
    federation = Federation(FedGH(**LOCAL, server_lr=0.5))
    federation.server = {name: torch.zeros_like(tensor) for name, tensor in federation.server.items()}
    found = federation.aggregate(1, [ClientUpdate(0, {"3": torch.full((8,), 2.0)}, 6)])
    expected = torch.full((CLASSES,), -0.05)
    expected[3] = 0.45
    torch.testing.assert_close(found["classifier.bias"], expected)
    torch.testing.assert_close(found["classifier.weight"], 2 * expected[:, None].expand(-1, 8))


def test_a_header_learns_from_every_client() -> None:
    federation = Federation(FedGH(**LOCAL, server_lr=0.1, server_epochs=50))
    points = {0: torch.eye(8)[0] * 3, 4: torch.eye(8)[1] * 3, 9: torch.eye(8)[2] * 3}
    updates = [ClientUpdate(i, {str(label): z}, 1) for i, (label, z) in enumerate(points.items())]
    header = federation.aggregate(1, updates)
    for label, z in points.items():
        assert int((header["classifier.weight"] @ z + header["classifier.bias"]).argmax()) == label
    assert_same_bits(federation.aggregate(1, updates), header)


def test_clients_begin_with_the_servers_header_and_deploy_it() -> None:
    federation = Federation(FedGH(**LOCAL), UNLIKE)
    for round in (1, 2):
        received = [private_of(federation, client, round) for client in range(3)]
        updates = federation.run(round)
    task, form = federation.task, UNLIKE[2]
    settings: dict[str, Any] = FedGH(**LOCAL).settings()
    trained = local_train(federation.at_client(2, 2), TaskLoss(task, form), received[2], purpose="small", **settings)
    head = head_of(task, form)
    assert_same_bits(federation.state(2), {n: t for n, t in trained.items() if n not in head})
    assert_close(updates[2].tree, means_of(federation, 2, trained)[0], atol=1e-5)
    deployed = weights_of(federation.deployed(2, 2))
    assert_same_bits({n: deployed[n] for n in head}, federation.server)
    assert sha256({n: trained[n] for n in head}) != sha256(federation.server)
    for update in updates:
        assert nbytes(update.tree) == len(federation.shards[update.client].labels.unique()) * 16 * 4
    assert nbytes(federation.payload(1, 0)) == (CLASSES * 16 + CLASSES) * 4


# LG-FedAvg ------------------------------------------------------------------------------------------------------------


def test_with_every_layer_shared_it_is_fedavg(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, once FedAvg's clients meet their examples in the same order."""

    def in_the_same_order(*arguments: Any, **settings: Any) -> Training:
        return Training(*arguments, **settings | {"purpose": "small"})

    monkeypatch.setattr(baselines.fedavg, "Training", in_the_same_order)
    shared = Federation(LGFedAvg(**LOCAL, shared=MEDIUM.depth + 1), (MEDIUM,) * 3)
    averaged = Federation(fedavg_small(**LOCAL), (MEDIUM,) * 3)
    for round in (1, 2, 3):
        shared.run(round)
        averaged.run(round)
        for client in range(3):
            assert shared.state(client) == {}
            assert_same_bits(weights_of(shared.deployed(round, client)), weights_of(averaged.deployed(round, client)))
    less = Federation(LGFedAvg(**LOCAL, shared=MEDIUM.depth), (MEDIUM,) * 3)
    less.run(1)
    embeddings = {n for n, spec in less.task.specs(MEDIUM).items() if spec.layer is None and not spec.after}
    assert {*less.state(0)} == embeddings
    assert nbytes(shared.payload(1, 0)) - nbytes(less.payload(1, 0)) == nbytes(less.state(0))


@pytest.mark.parametrize("forms", [AS_WIDE, UNLIKE], ids=["as wide", "unlike"])
def test_top_layers_are_averaged_by_examples_and_bottom_layers_stay(forms: Sequence[Form]) -> None:
    federation = Federation(LGFedAvg(**LOCAL), forms)
    norm = {"vit.layernorm.weight", "vit.layernorm.bias"} if forms is AS_WIDE else set()
    tail = {"classifier.weight", "classifier.bias"} | norm
    assert {*federation.server} == tail
    updates = federation.run(1)
    for update in updates:
        assert {*update.tree} == tail
        assert tail.isdisjoint(federation.state(update.client))
    assert_close(federation.server, mean([u.tree for u in updates], [6, 12, 18]), atol=1e-6)
    assert nbytes(updates[0].tree) == sum(t.numel() for t in federation.server.values()) * 4
    firsts = {sha256({n: t}) for n, t in federation.state(1).items()}
    assert firsts.isdisjoint({sha256({n: t}) for n, t in federation.state(2).items()})
    deployed = [weights_of(federation.deployed(1, client)) for client in range(3)]
    assert len({sha256({"b": each["classifier.bias"]}) for each in deployed}) == 1


def test_the_last_blocks_are_shared_by_models_of_all_depths() -> None:
    """The last block is number 1 of 2, and 3 of 4."""
    federation = Federation(LGFedAvg(**LOCAL, shared=1), AS_WIDE)
    federation.run(1)
    own = [weights_of(federation.deployed(1, client)) for client in range(3)]
    last = [
        {n.removeprefix(f"vit.layers.{at}."): t for n, t in each.items() if n.startswith(f"vit.layers.{at}.")}
        for each, at in zip(own, (1, 3, 3), strict=True)
    ]
    assert len({sha256(each) for each in last}) == 1
    assert sha256({"t": own[1]["vit.layers.2.mlp.fc1.weight"]}) != sha256({"t": own[2]["vit.layers.2.mlp.fc1.weight"]})


@pytest.mark.parametrize(
    "shared, features, forms, accepted",
    [
        (1, None, UNLIKE, "0, for the head alone, where features of 16 are not as wide as the small form 8x1"),
        (1, 5, ALIKE, "0, for the head alone, where features of 5 are not as wide"),
        (3, None, AS_WIDE, "so few that what is shared is alike in small forms: 16x2 and 16x4 differ in"),
        (
            1,
            None,
            (MEDIUM, dataclasses.replace(MEDIUM, mlp=20), MEDIUM),
            ".*16x2 and 16x2 differ in '1 from",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(shared: int, features: int | None, forms: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"algorithm.shared={shared}: must be {accepted}"):
        Federation(LGFedAvg(**LOCAL, shared=shared, features=features), forms)


def test_what_leaves_goes_by_what_is_shared() -> None:
    assert LGFedAvg().leaves == "head"
    assert LGFedAvg(shared=1).leaves == "sub-model"
