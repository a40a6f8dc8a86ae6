"""Features of every family of classifiers, prototypes of them, and what a server trains on those."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.core.tree import Tree
from fedsim.data.config import digits
from fedsim.data.dataset import Split
from fedsim.learning import features
from fedsim.learning.features import (
    PROJECTION,
    PrototypeLoss,
    fitted,
    head_of,
    logits_and_features,
    plain,
    points_of,
    prototypes,
    width_of,
    with_features,
)
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.family_rows import ROWS, Row, batch_of, examples, model_inputs, random_tree
from tests.support.small_federation import SMALL, TARGET


pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIERS = [name for name, row in ROWS.items() if row.task.inputs.kind in ("image", "text")]
SEED = functools.partial(torch.Generator().manual_seed, 0)


def projected(row: Row, form: Form, width: int) -> Tree:
    """A model with features of another width, none of whose numbers is what it starts as."""
    model = with_features(row.task, form, random_tree(row.task, form), width, SEED())
    return {name: tensor.double() for name, tensor in model.items()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_are_what_the_head_reads_and_logits_are_the_models(name: str) -> None:
    row = ROWS[name]
    for form in (row.small, row.wider):
        tree, batch = random_tree(row.task, form), batch_of(row.task)
        logits, z = logits_and_features(row.task, form, tree, batch)
        assert z.shape == (7, form.width)
        torch.testing.assert_close(logits, row.task.forward(form, tree, batch), rtol=0, atol=1e-12)
        head = {name.rpartition(".")[2]: tree[name] for name in head_of(row.task, form)}
        torch.testing.assert_close(z @ head["weight"].T + head.get("bias", 0), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_projected_model_is_deployed_as_one_of_its_form(name: str) -> None:
    """W (P h) + b = (W P) h + b."""
    row, width = ROWS[name], 20
    model, batch = projected(row, row.small, width), batch_of(row.task)
    logits, z = logits_and_features(row.task, row.small, model, batch)
    assert z.shape == (7, width) and model[PROJECTION].shape == (width, row.small.width)
    module = plain(row.task, row.small, model)
    shapes = {n: p.shape for n, p in module.named_parameters()}
    assert shapes == {n: t.shape for n, t in row.task.fresh(row.small, 0).items()}
    with torch.no_grad():
        torch.testing.assert_close(module(**model_inputs(batch)).logits, logits, rtol=0, atol=1e-10)


def test_a_skeleton_is_left_as_it_was() -> None:
    row = ROWS["vit"]
    classifier = row.task.skeleton(row.small).get_submodule("classifier")
    model, batch = projected(row, row.small, 20), batch_of(row.task)
    with pytest.raises(RuntimeError):
        logits_and_features(row.task, row.small, model | {PROJECTION: torch.zeros(20, 3).double()}, batch)
    assert isinstance(classifier, nn.Linear) and "forward" not in vars(classifier)


def test_a_model_that_is_wide_enough_is_left_alone() -> None:
    row = ROWS["vit"]
    tree, stream = random_tree(row.task, row.small), SEED()
    before = stream.get_state()
    assert with_features(row.task, row.small, tree, row.small.width, stream) is tree
    assert torch.equal(stream.get_state(), before)
    assert width_of([SMALL, TARGET], None) == TARGET.width
    assert width_of([SMALL, TARGET], 3) == 3


@dataclasses.dataclass(frozen=True)
class Given:
    """In the place of a forward pass."""

    logits: Tensor
    features: Tensor

    def __call__(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.logits, self.features


def test_the_distance_to_prototypes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares (0, 4), and (8^2, 8^2) of a prototype that nobody has: 4 / 4 numbers. Two classes alike: log 2."""
    given = Given(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    monkeypatch.setattr(features, "logits_and_features", given)
    task = Task(TaskConfig(digits(), patch_size=4))
    frozen = {"prototypes": torch.tensor([[1.0, 0.0], [9.0, 9.0]]), "known": torch.tensor([True, False])}
    batch = {"labels": torch.tensor([0, 1])}
    assert float(PrototypeLoss(task, SMALL, 0.5)({}, frozen, batch)) == pytest.approx(math.log(2) + 0.5 * 1.0)
    known = frozen | {"known": torch.tensor([True, True])}
    assert float(PrototypeLoss(task, SMALL, 0.5)({}, known, batch)) == pytest.approx(math.log(2) + 0.5 * (4 + 128) / 4)
    mixed = {"labels": torch.tensor([[0.5, 0.5], [1.0, 0.0]])}  # prototypes (5, 4.5) and (1, 0)
    expected = math.log(2) + 0.5 * (16 + 6.25 + 0 + 1) / 4
    assert float(PrototypeLoss(task, SMALL, 0.5)({}, known, mixed)) == pytest.approx(expected)


def test_prototypes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples with features 0, 1, 2, 3, ... in batches of 2: class 7 has 0 and 3, class 2 has 1, 2 and 4."""
    task, count = Task(TaskConfig(digits(), patch_size=4)), iter(range(5))

    def given(task: Task, form: Form, model: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), torch.tensor([[float(next(count))] * 8 for _ in batch["labels"]])

    monkeypatch.setattr(features, "logits_and_features", given)
    shard = Split({"pixel_values": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)}, torch.tensor([7, 2, 2, 7, 2]))
    means, counts = prototypes(task, SMALL, {}, shard, 2, torch.device("cpu"))
    assert {label: mean.tolist() for label, mean in means.items()} == {
        "2": [pytest.approx(7 / 3)] * 8,
        "7": [1.5] * 8,
    }
    assert {label: float(count) for label, count in counts.items()} == {"2": 3.0, "7": 2.0}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_prototypes_do_not_depend_on_batches(name: str) -> None:
    row = ROWS[name]
    split, model = examples(row.task), {n: t.float() for n, t in projected(row, row.small, 5).items()}
    found = [prototypes(row.task, row.small, model, split, size, torch.device("cpu"))[0] for size in (2, 100)]
    assert found[0].keys() == found[1].keys() == {str(label) for label in split.labels.tolist()}
    for label, mean in found[0].items():
        assert mean.shape == (5,) and mean.dtype == torch.float32
        torch.testing.assert_close(mean, found[1][label], rtol=0, atol=1e-4)


def test_an_empty_shard_stands_for_one_with_all_classes() -> None:
    row = ROWS["vit"]
    empty = Split({}, torch.zeros(0, dtype=torch.long))
    means, counts = prototypes(row.task, row.small, random_tree(row.task, row.small), empty, 2, torch.device("cpu"))
    assert {label: mean.shape for label, mean in means.items()} == {str(n): (row.small.width,) for n in range(10)}
    assert not any(counts.values())


def test_points_come_client_by_client_and_in_order_of_class() -> None:
    sent: list[Tree] = [{str(n): torch.tensor([float(n)]) for n in (10, 9, 2)}, {"1": torch.tensor([0.5])}]
    points, labels = points_of(iter(sent))
    assert labels.tolist() == [2, 9, 10, 1]
    assert points.tolist() == [[2.0], [9.0], [10.0], [0.5]]
    assert len(points_of([])[1]) == 0


def test_a_server_fits_by_plain_sgd() -> None:
    """x <- x - lr 2 (x - p), of p = 1 and p = 1: 0, 0.5, 0.75."""
    start = {"x": torch.zeros(1)}
    settings: dict[str, Any] = {"lr": 0.25, "epochs": 1, "batch_size": 1, "generator": SEED()}

    def loss(tree: Tree, points: Tensor, labels: Tensor) -> Tensor:
        return (tree["x"] - points).square().sum()

    found = fitted(start, loss, torch.ones(2, 1), torch.tensor([0, 1]), **settings)
    assert found["x"].tolist() == [0.75] and not found["x"].requires_grad
    assert start["x"].tolist() == [0.0]
    assert fitted(start, loss, torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), **settings) is start
