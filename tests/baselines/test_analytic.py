"""Analytic federated learning: its sums, its ridge regression, and that neither knows how examples were dealt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.analytic import Analytic
from fedsim.algorithm import ClientUpdate
from fedsim.core.tree import nbytes
from fedsim.data.config import digits
from fedsim.data.source import Split
from fedsim.learning.features import feature_size, features, head
from fedsim.learning.ridge import linear, random_relu, ridge, sums
from fedsim.learning.task import Task, TaskConfig, load_task
from tests.support.family_rows import NEXT_TOKEN, TAGS, TEXTS
from tests.support.small_federation import MIDDLE, SMALL, TARGET, UNLIKE, Federation, assert_same_bits, weights_of


TASK = load_task(TaskConfig(digits(limit=60), patch_size=4), None)
NARROW = dataclasses.replace(TARGET, depth=1, head_dim=8)
TEXT_FAMILIES = ("bert", "gpt2", "llama", "modernbert", "deberta")


def dealt(parts: Sequence[Tensor], algorithm: Analytic | None = None) -> Federation:
    """The same sixty digits, dealt so."""
    assert TASK.dataset is not None
    shards = [TASK.dataset.train.select(part.numpy()) for part in parts]
    return Federation(algorithm or Analytic(), (SMALL,) * len(parts), task=TASK, shards=shards)


def everything() -> Split:
    assert TASK.dataset is not None
    return TASK.dataset.train


def difference(one: Federation, other: Federation) -> float:
    return float((one.server["w"] - other.server["w"]).abs().max())


# on paper -------------------------------------------------------------------------------------------------------------


def test_two_clients_on_paper() -> None:
    """One feature f and a constant: client 0 has f = 1 of class 0; client 1 has f = 2 and f = 3 of class 1.

    G = [[1 + 4 + 9, 1 + 2 + 3], [6, 3]], H = [[1, 5], [1, 2]]; with gamma = 1, (G + I)^-1 = [[4, -6], [-6, 15]] / 24.
    """
    first = sums(torch.tensor([[1.0]]).double(), torch.tensor([0]), 2)
    second = sums(torch.tensor([[2.0], [3.0]]).double(), torch.tensor([1, 1]), 2)
    assert first[0].tolist() == [[1, 1], [1, 1]] and first[1].tolist() == [[1, 0], [1, 0]]
    assert second[0].tolist() == [[13, 5], [5, 2]] and second[1].tolist() == [[0, 5], [0, 2]]
    w = ridge(first[0] + second[0], first[1] + second[1], 1.0)
    torch.testing.assert_close(w, torch.tensor([[-2.0, 8.0], [9.0, 0.0]]).double() / 24, rtol=0, atol=1e-15)


def test_the_servers_step_is_that_sum() -> None:
    """The same numbers through the algorithm: G and H of one feature, whatever the model."""
    federation = Federation(Analytic(gamma=1.0))
    zero = torch.zeros(1, dtype=torch.float64)
    federation.server = {"g": zero.expand(2, 2), "h": zero.expand(2, 2), "w": zero, "counted": torch.zeros(3).bool()}
    first, second = ({"g": [[1, 1], [1, 1]], "h": [[1, 0], [1, 0]]}, {"g": [[13, 5], [5, 2]], "h": [[0, 5], [0, 2]]})
    sent = [{n: torch.tensor(rows).double() for n, rows in tree.items()} for tree in (first, second)]
    updates = [ClientUpdate(id_, tree, 1 + id_) for id_, tree in enumerate(sent)]
    state = federation.aggregate(1, updates)
    assert state["g"].tolist() == [[14, 6], [6, 3]] and state["h"].tolist() == [[1, 5], [1, 2]]
    assert state["counted"].tolist() == [True, True, False]
    torch.testing.assert_close(state["w"], torch.tensor([[-2.0, 8.0], [9.0, 0.0]]).double() / 24, rtol=0, atol=1e-15)


def test_random_features_are_relu_of_a_line() -> None:
    layer = random_relu(4, 3, torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 4, generator=drawn) / 2, torch.randn(3, 1, generator=drawn)
    f = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    torch.testing.assert_close(layer(f), (f @ weight.T + bias.T).clamp(min=0), rtol=0, atol=1e-6)


# how examples are dealt -----------------------------------------------------------------------------------------------

DEALT = {
    "one has all": [torch.arange(60)],
    "evenly": list(torch.arange(60).split(20)),
    "one class each": [(everything().labels == label).nonzero()[:, 0] for label in range(10)],
    "one example each": list(torch.arange(60).split(1)),
}


@pytest.mark.parametrize("fields", [{}, {"random_features": 24}, {"of": "smallest"}, {"of": "intermediate"}])
def test_the_classifier_does_not_know_how_examples_were_dealt(fields: dict[str, Any]) -> None:
    whole = dealt(DEALT["one has all"], Analytic(**fields))
    whole.run(1)
    assert float(whole.server["w"].abs().max()) > 0.05
    for parts in list(DEALT.values())[1:]:
        federation = dealt(parts, Analytic(**fields))
        federation.run(1)
        assert difference(federation, whole) < 1e-9


def test_it_is_the_ridge_regression_of_all_examples() -> None:
    """Solved here by least squares on stacked rows: `|phi W - Y|^2 + gamma |W|^2`, in float64."""
    federation = dealt(DEALT["evenly"], Analytic(gamma=0.5))
    federation.run(1)
    split = everything()
    batch = TASK.batch(split, torch.arange(60))
    model = {name: tensor.double() for name, tensor in federation.state(0).items()}
    f = features(TASK, TARGET, model, batch | {"pixel_values": batch["pixel_values"].double()})
    phi = torch.cat([f, torch.ones(60, 1)], 1)
    d = phi.shape[1]
    rows = torch.cat([phi, 0.5**0.5 * torch.eye(d).double()])
    wanted = torch.cat([nn.functional.one_hot(split.labels, 10).double(), torch.zeros(d, 10).double()])
    assert d == TARGET.width + 1
    torch.testing.assert_close(federation.server["w"], torch.linalg.lstsq(rows, wanted).solution, rtol=0, atol=1e-9)


def test_another_penalty_gives_another_classifier() -> None:
    """So would a gamma counted once a participant: three times as much is not the same."""
    one, three = (dealt(DEALT["evenly"], Analytic(gamma=gamma)) for gamma in (1.0, 3.0))
    for federation in (one, three):
        federation.run(1)
    assert difference(one, three) > 1e-3


# rounds ---------------------------------------------------------------------------------------------------------------


def test_everyone_counts_once_whenever_they_take_part() -> None:
    whole, staggered = Federation(Analytic()), Federation(Analytic())
    whole.run(1)
    for round, cohort in enumerate(([1], [0, 1], [0], [2, 1]), 1):
        staggered.run(round, cohort)
    assert difference(staggered, whole) < 1e-9
    before = whole.server
    assert [update.tree for update in whole.run(2)] == [{}, {}, {}]
    assert_same_bits(whole.server, before)


def test_who_never_takes_part_is_missing() -> None:
    whole, without = Federation(Analytic()), Federation(Analytic())
    whole.run(1)
    without.run(1, [0, 1])
    assert without.server["counted"].tolist() == [True, True, False]
    assert difference(without, whole) > 1e-3


def test_a_lost_update_is_sent_again_and_one_that_comes_twice_counts_once() -> None:
    lost, whole = Federation(Analytic()), Federation(Analytic())
    whole.run(1)
    lost.update(1, 2)  # and nobody receives it
    lost.run(2)
    assert_same_bits(lost.server, whole.server)
    first = Federation(Analytic())
    update = first.update(1, 0)
    once, twice = first.aggregate(1, [update]), first.aggregate(1, [update, update])
    assert_same_bits(once, twice)


# what travels and what is deployed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, d", [({}, 17), ({"random_features": 24}, 25), ({"of": "smallest"}, 9)])
def test_bytes_are_those_of_two_sums(fields: dict[str, Any], d: int) -> None:
    federation = Federation(Analytic(**fields), UNLIKE)
    (update, *_) = federation.run(1)
    assert {name: tuple(tensor.shape) for name, tensor in update.tree.items()} == {"g": (d, d), "h": (d, 10)}
    assert nbytes(update.tree) == 8 * (d * d + d * 10)
    assert nbytes(federation.payload(1, 0)) == 4 * d * 10 + 1
    assert federation.work[0].work == [], "nothing is trained"


@pytest.mark.parametrize("fields", [{}, {"random_features": 24}])
def test_everyone_deploys_the_frozen_model_with_the_solved_head(fields: dict[str, Any]) -> None:
    federation = Federation(Analytic(**fields))
    before = weights_of(federation.served(0))
    federation.run(1)
    model = federation.served(1)
    f = features(federation.task, TARGET, federation.state(0), {"pixel_values": federation.pixels})
    if fields:
        f = federation.algorithm._random(federation.at_server(1))(f)  # type: ignore[attr-defined]
    w = federation.server["w"].float()
    logits = model(pixel_values=federation.pixels).logits
    torch.testing.assert_close(logits, f @ w[:-1] + w[-1], rtol=0, atol=1e-5)
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    solved = "classifier.2" if fields else "classifier"
    assert changed == {f"{solved}.weight", f"{solved}.bias"}
    for client in range(3):
        assert_same_bits(weights_of(federation.deployed(1, client)), after)


def test_random_features_come_from_the_seed() -> None:
    one, other = (Federation(Analytic(random_features=8), seed=seed) for seed in (0, 1))
    layers = [federation.algorithm._random(federation.at_client(1, 0))[0].weight for federation in (one, other)]  # type: ignore[attr-defined]
    assert not torch.equal(*layers)
    again = one.algorithm._random(one.at_client(7, 2))[0].weight  # type: ignore[attr-defined]
    assert torch.equal(layers[0], again), "the same in every round, for everyone"


def test_one_round_learns() -> None:
    federation = Federation(Analytic(gamma=0.1, random_features=64), sizes=(40, 80, 120))
    dataset = federation.task.dataset
    assert dataset is not None
    assert federation.task.score(federation.served(0), dataset.test).accuracy < 0.2
    federation.run(1)
    assert federation.task.score(federation.served(1), dataset.test).accuracy > 0.5


# features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_features_are_what_the_head_of_any_family_is_given(family: str) -> None:
    task, form = Task(TaskConfig(TEXTS, family)), NARROW
    tree, batch = task.fresh(form, 0), task.example(3)
    batch["input_ids"][:, 0] = torch.tensor([3, 4, 5])
    f, name = features(task, form, tree, batch), head(task, form)
    assert f.shape == (3, feature_size(task, form)) and not torch.equal(f[0], f[1])
    said = nn.functional.linear(f, tree[f"{name}.weight"], tree.get(f"{name}.bias"))
    torch.testing.assert_close(said, task.forward(form, tree, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_texts_are_classified_with_a_bias_even_where_the_family_has_none(family: str) -> None:
    task, form = Task(TaskConfig(TEXTS, family)), NARROW
    tree, batch = task.fresh(form, 0), task.example(3)
    module = task.module(form, tree)
    module.set_submodule(head(task, form), linear(torch.zeros(3, feature_size(task, form)), torch.tensor([1.0, 2, 3])))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert module(**inputs).logits.tolist() == [[1.0, 2.0, 3.0]] * 3


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data, family", [(NEXT_TOKEN, "gpt2"), (TAGS, "bert")], ids=["lm", "tokens"])
def test_only_examples_are_classified(data: Any, family: str) -> None:
    with pytest.raises(ValueError, match=r"task\.data='(lm|tokens)': must be of kind 'image' or 'text'"):
        Analytic().check(Task(TaskConfig(data, family)), [SMALL], MIDDLE, TARGET)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"gamma": 0.0}, "algorithm.gamma=0.0: must be greater than 0"),
        ({"random_features": 0}, "algorithm.random_features=0: must be at least 1"),
        ({"batch_size": 0}, "algorithm.batch_size=0: must be at least 1"),
        ({"of": "largest"}, "algorithm.of='largest'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        Analytic(**fields)
    assert named in str(error.value)


def test_an_intermediate_form_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"intermediate=None: must be a form, where algorithm\.of='intermediate'"):
        Analytic(of="intermediate").check(TASK, [SMALL], None, TARGET)
