"""Fed-Grow with a solved head: sums that add up, one ridge regression, and an operator that is averaged beside it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from fedgrow_algo.analytic import FedGrowAnalytic
from fedgrow_algo.dual_ligo import of_rank
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import ClientUpdate, whole_sum
from fedsim.core.tree import Tree, flat, mapped
from fedsim.data.config import digits, pydoc
from fedsim.data.source import Split
from fedsim.learning.features import features
from fedsim.learning.ridge import sums
from fedsim.learning.server_opt import ServerOptimizer
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.testing import MIDDLE, SMALL, TARGET, Federation
from tests.support.clients import asked_of
from tests.support.family_rows import TEXTS
from tests.support.procedures import ROUND
from tests.support.small_federation import assert_close, assert_same_bits, distance, mean, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

TASK = load_task(TaskConfig(digits(limit=60), patch_size=4), None)
HEAD = ("classifier.weight", "classifier.bias")
ALIKE: dict[str, Any] = {"init": "common", "small_epochs": 0, "local_epochs": 0}  # equal forms have one M_i


def analytic(**changes: Any) -> FedGrowAnalytic:
    fields: dict[str, Any] = ROUND | {"local_epochs": 1, "preset": "preserving", "rank": 2} | changes
    return FedGrowAnalytic(**fields)


def everything() -> Split:
    assert TASK.dataset is not None
    return TASK.dataset.train


def dealt(parts: Sequence[Tensor], **changes: Any) -> Federation:
    """The same sixty digits, dealt so."""
    shards = [everything().select(part.numpy()) for part in parts]
    return Federation(analytic(**changes), (SMALL,) * len(parts), task=TASK, shards=shards)


def phi_of(model: Tree, shard: Split) -> Tensor:
    """What a head reads of each example, and 1: `(n, D)`, in float64."""
    batch = TASK.batch(shard, torch.arange(len(shard.labels)))
    double = mapped(Tensor.double, model)
    f = features(TASK, TARGET, double, batch | {"pixel_values": batch["pixel_values"].double()})
    return torch.cat([f, torch.ones(len(f), 1)], 1).detach()


def solved(phi: Tensor, labels: Tensor, gamma: float) -> Tree:
    """The regression by least squares on stacked rows, `|phi W - Y|^2 / n + gamma |W|^2`, as a head."""
    n, D = phi.shape
    rows = torch.cat([phi / n**0.5, gamma**0.5 * torch.eye(D).double()])
    wanted = torch.cat([nn.functional.one_hot(labels, 10).double() / n**0.5, torch.zeros(D, 10).double()])
    W = torch.linalg.lstsq(rows, wanted).solution
    return dict(zip(HEAD, (W[:-1].T, W[-1]), strict=True))


# on paper -------------------------------------------------------------------------------------------------------------


def test_two_clients_on_paper() -> None:
    """A feature f and a constant: client 0 has f = 1 of class 0; client 1 has f = 2 and 3 of class 1. With gamma = 1/3,
    G + gamma I is a third of [[15, 6], [6, 4]], whose inverse is [[4, -6], [-6, 15]] / 24: W = [[-2, 8], [9, 0]] / 24.
    """
    federation = Federation(analytic(gamma=1 / 3))
    shapes = dict(federation.algorithm.server_init(federation.at_server(0)))
    assert {name: tuple(t.shape) for name, t in shapes["head"].items()} == {HEAD[0]: (10, 16), HEAD[1]: (10,)}
    padded = nn.functional.pad  # the other fifteen features are 0, the other eight classes nobody's
    updates = []
    for client, (f, labels) in enumerate((([1.0], [0]), ([2.0, 3.0], [1, 1]))):
        g, h = sums(padded(torch.tensor(f).double()[:, None], (0, 15)), torch.tensor(labels), 10)
        n = len(f)
        updates.append(ClientUpdate(client, {"width.embed": torch.full((1,), 3.0 * n), "g": g / n, "h": h / n}, n))
    federation.server = {"width.embed": torch.zeros(1), "head": shapes["head"]}
    state = federation.aggregate(1, updates)
    assert state["width.embed"].tolist() == [5.0]  # (1 * 3 + 2 * 6) / 3
    weight, bias = (state["head"][name] for name in HEAD)
    torch.testing.assert_close(24 * weight[:2, 0], torch.tensor([-2.0, 8.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(24 * bias[:2], torch.tensor([9.0, 0.0]).double(), rtol=0, atol=1e-12)
    assert not weight[2:].any() and not weight[:, 1:].any() and not bias[2:].any()


DEALT = {
    "one has all": [torch.arange(60)],
    "evenly": list(torch.arange(60).split(20)),
    "one class each": [(everything().labels == label).nonzero()[:, 0] for label in range(10)],
    "unevenly": list(torch.arange(60).split([1, 12, 47])),
}


@pytest.mark.parametrize("parts", DEALT.values(), ids=DEALT)
@pytest.mark.parametrize("rank", [None, 2])
def test_with_models_alike_the_head_is_the_regression_of_all_examples(parts: list[Tensor], rank: int | None) -> None:
    federation = dealt(parts, lr=0.0, gamma=0.1, rank=rank, **ALIKE)
    federation.run(1)
    operator = of_rank(rank, "preserving", TASK, MIDDLE, TARGET)
    tensors, middle = (mapped(Tensor.double, tree) for tree in (federation.server, federation.state(0)["middle"]))
    target = operator.grow(tensors, middle)
    assert_close(federation.server["head"], solved(phi_of(target, everything()), everything().labels, 0.1), 1e-9)


def test_models_unlike_give_another_head() -> None:
    """Features of strangers have no coordinates in common: what the test above says is of models alike."""
    alike, unlike = (dealt(DEALT["evenly"], lr=0.0, init=init) for init in ("common", "independent"))
    for federation in (alike, unlike):
        federation.run(1)
    assert distance(alike.server["head"], unlike.server["head"]) > 1e-3


def test_sums_are_of_what_came_and_add_up() -> None:
    federation = Federation(analytic(), task=TASK, shards=[everything().select(p.numpy()) for p in DEALT["evenly"]])
    federation.run(1)
    models = [weights_of(federation.deployed(1, client)) for client in range(3)]
    updates = [federation.update(2, client) for client in range(3)]
    phis = [phi_of(model, shard) for model, shard in zip(models, federation.shards, strict=True)]
    for update, phi in zip(updates, phis, strict=True):
        torch.testing.assert_close(update.weight * update.tree["g"], phi.T @ phi, rtol=0, atol=1e-3)
    total = whole_sum(updates)
    assert total is not None
    torch.testing.assert_close(total.tree["g"], sum(20 * u.tree["g"] for u in updates), rtol=0, atol=1e-12)
    state = federation.aggregate(2, updates)
    labels = torch.cat([shard.labels for shard in federation.shards])
    assert_close(state["head"], solved(torch.cat(phis), labels, 1e-3), 1e-3)
    trained = federation.algorithm.client_model(
        state | updates[0].tree, federation.state(0), federation.at_client(2, 0)
    )
    late = phi_of(weights_of(trained), federation.shards[0])
    assert float((20 * updates[0].tree["g"] - late.T @ late).abs().max()) > 0.01, "not of the Global it trained"


# rounds ---------------------------------------------------------------------------------------------------------------


def test_the_first_round_is_fed_grows_and_the_others_see_the_head() -> None:
    fields = {f.name: getattr(analytic(), f.name) for f in dataclasses.fields(FedGrow)}
    federation, plain = Federation(analytic()), Federation(FedGrow(**fields))
    for one in (federation, plain):
        one.run(1)
    assert_same_bits({n: t for n, t in federation.server.items() if n != "head"}, plain.server)
    algorithm, context = federation.algorithm, federation.at_client(2, 0)
    payload, state = federation.payload(2, 0), federation.state(0)
    asked = asked_of(algorithm, payload, state, context)
    assert_close(asked.frozen["head"], payload["head"], 1e-6)
    assert "head" not in asked.start, "nobody trains it"
    for one in (federation, plain):
        one.run(2)
    assert distance({n: t for n, t in federation.server.items() if n != "head"}, plain.server) > 1e-3


def test_a_round_is_the_mean_of_operators() -> None:
    federation = Federation(analytic())
    federation.run(1)
    updates = federation.run(2)
    wanted = mean([{n: t for n, t in u.tree.items() if n not in ("g", "h")} for u in updates], [6, 12, 18])
    assert_close({n: t for n, t in federation.server.items() if n != "head"}, wanted, 1e-6)


def test_the_server_optimiser_moves_the_operator_alone() -> None:
    federation = Federation(analytic(lr=0.0, server=ServerOptimizer("adam", lr=0.1), **ALIKE))
    plain = Federation(analytic(lr=0.0, **ALIKE))
    assert not {"g", "h", "head"} & {path.split("::")[1] for path in flat(federation.server) if path[:6] == "server"}
    for one in (federation, plain):
        one.run(1)
    assert_same_bits(federation.server["head"], plain.server["head"])


def test_fine_tuning_starts_from_the_solved_head_and_sends_nothing() -> None:
    federation = Federation(analytic(finetune_after=1, finetune_lr=0.0))
    federation.run(1)
    before = weights_of(federation.deployed(1, 0))
    assert_close({n: before[n] for n in HEAD}, federation.server["head"], 1e-6)
    assert all(update.tree == {} for update in federation.run(2))
    assert_same_bits(weights_of(federation.deployed(2, 0)), before)
    assert federation.payload(3, 0) == {}


def test_a_head_without_a_bias_is_solved_without_one() -> None:
    """GPT-2's."""
    federation = Federation(analytic(), task=Task(TaskConfig(TEXTS, family="gpt2")), shards=[texts()] * 3)
    update = federation.run(1)[0]
    assert update.tree["g"].shape == (16, 16) and update.tree["h"].shape == (16, 3)
    assert {name: t.shape for name, t in federation.server["head"].items()} == {"score.weight": (3, 16)}
    solved_head = weights_of(federation.deployed(1, 0))["score.weight"]
    torch.testing.assert_close(solved_head.double(), federation.server["head"]["score.weight"], rtol=0, atol=1e-6)


def texts() -> Split:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (6, 12), generator=generator)
    return Split({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([0, 1, 2, 0, 1, 2]))


# what is deployed -----------------------------------------------------------------------------------------------------


def test_what_is_deployed_reloads_with_plain_transformers(tmp_path: Path) -> None:
    federation = Federation(analytic())
    federation.run(1)
    model: Any = federation.deployed(1, 0)
    assert_close({n: weights_of(model)[n] for n in HEAD}, federation.server["head"], 1e-6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(federation.pixels).logits, model(federation.pixels).logits)


# what it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gamma": 0.0}, r"algorithm\.gamma=0\.0: must be greater than 0"),
        ({"federate": False}, r"algorithm\.federate=False: must be True"),
        ({"rank": 0}, r"algorithm\.rank=0: must be at least 1"),
    ],
)
def test_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        analytic(**changes)


def test_data_without_one_class_an_example_are_refused() -> None:
    with pytest.raises(ValueError, match="one class an example"):
        analytic().check(Task(TaskConfig(pydoc(max_length=8), family="gpt2")), [SMALL], MIDDLE, TARGET)
    analytic().check(TASK, [SMALL], MIDDLE, TARGET)
