"""Scores: identities between accuracies that must hold however a model, a split or a batch size is chosen."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.data.config import PER_TOKEN, DataConfig, digits, pydoc
from fedsim.data.dataset import Split
from fedsim.learning.task import IGNORED, Score, Task, TaskConfig, load_task
from fedsim.models import Form


FORM = Form(8, 1, heads=2)
TASKS = {
    "vit/digits": TaskConfig(digits(limit=90), patch_size=4),
    "gpt2/pydoc": TaskConfig(pydoc(limit=20, max_length=12), family="gpt2"),
    "bert/pydoc": TaskConfig(pydoc(limit=20, max_length=12, objective="masked_token"), family="bert"),
}


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(TASKS[request.param], None)


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    """Random and far from its initial values, so that it predicts several classes."""
    generator = torch.Generator().manual_seed(0)
    return task.module(FORM, {n: torch.randn(t.shape, generator=generator) for n, t in task.fresh(FORM, 0).items()})


def held_out(task: Task) -> Split:
    assert task.dataset is not None
    return task.dataset.test


def score(correct: Sequence[int], count: Sequence[int], loss: float = 1.0) -> Score:
    return Score(loss, np.array(correct), np.array(count))


class Says(nn.Module):
    """Answers with the class its input's only pixel names."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        named = ((pixel_values.flatten(1) + 1) * 127.5).round().long()[:, 0]
        return SimpleNamespace(logits=F.one_hot(named, 3).float() * math.log(2))


def test_score_by_hand() -> None:
    task = Task(TaskConfig(DataConfig("digits", image_size=1, num_classes=3), patch_size=1))
    said, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2])
    result = task.score(Says(), Split({"pixel_values": said.to(torch.uint8).reshape(-1, 1, 1, 1)}, labels))
    assert result.correct.tolist() == [1, 1, 2]
    assert result.count.tolist() == [2, 2, 2]
    assert result.accuracy == 4 / 6
    # The softmax of (log 2, 0, 0) is (1/2, 1/4, 1/4): right costs log 2, wrong log 4.
    assert result.loss == pytest.approx((4 * math.log(2) + 2 * math.log(4)) / 6, rel=1e-6)


def test_a_model_that_says_nan_has_no_score() -> None:
    class Lost(Says):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(pixel_values).logits * math.nan)

    task = Task(TaskConfig(DataConfig("digits", image_size=1, num_classes=3), patch_size=1))
    split = Split({"pixel_values": torch.zeros(2, 1, 1, 1, dtype=torch.uint8)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="logits of a model that is scored are NaN"):
        task.score(Lost(), split)


# accuracies -----------------------------------------------------------------------------------------------------------


def test_accuracy_under_a_mix_by_hand() -> None:
    result = score([1, 3, 0], [4, 4, 2])  # per class 1/4, 3/4, 0
    assert result.accuracy == 4 / 10
    assert result.accuracy_under(np.array([1, 1, 0])) == 1 / 2
    assert result.accuracy_under(np.array([3, 1, 0])) == 3 / 8
    assert result.accuracy_under(np.array([0, 0, 7])) == 0
    assert result.accuracy_under(np.array([0, 5, 5])) == 3 / 8


def test_accuracy_under_the_splits_own_mix_is_the_accuracy() -> None:
    result = score([1, 3, 0], [4, 4, 2])
    assert result.accuracy_under(result.count) == pytest.approx(result.accuracy, abs=1e-15)
    assert result.accuracy_under(result.count * 17) == pytest.approx(result.accuracy, abs=1e-15)
    assert result.accuracy_under(np.ones(3)) != pytest.approx(result.accuracy)


def test_classes_without_test_examples_weigh_nothing() -> None:
    result = score([1, 0], [2, 0])
    assert result.accuracy_under(np.array([1, 9])) == 1 / 2
    assert math.isnan(result.accuracy_under(np.array([0, 9])))
    assert math.isnan(result.accuracy_under(np.array([0, 0])))


def test_nothing_scored_has_no_accuracy() -> None:
    assert math.isnan(score([0, 0], [0, 0]).accuracy)


def test_accuracy_of_everything_is_the_mean_over_parts_weighted_by_size(task: Task, model: nn.Module) -> None:
    split = held_out(task)
    if task.inputs.kind == "mlm":  # which tokens are masked depends on the split, unless it is masked before
        whole_batch = task.batch(split, torch.arange(len(split)))
        split = Split(whole_batch, split.labels)
    parts = np.split(np.random.default_rng(0).permutation(len(split)), [len(split) // 7, len(split) // 2])
    scores = [task.score(model, split.select(part)) for part in parts]
    whole = task.score(model, split)
    sizes = [int(part.count.sum()) for part in scores]
    assert sum(sizes) == whole.count.sum() > 0
    weighted = sum(part.accuracy * size for part, size in zip(scores, sizes, strict=True)) / sum(sizes)
    assert weighted == pytest.approx(whole.accuracy, abs=1e-12)
    assert np.array_equal(sum(part.correct for part in scores), whole.correct)
    loss = sum(part.loss * size for part, size in zip(scores, sizes, strict=True)) / sum(sizes)
    assert loss == pytest.approx(whole.loss, rel=1e-6)
    assert min(part.accuracy for part in scores) <= weighted <= max(part.accuracy for part in scores)


# how a model is scored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 19, 1000])
def test_score_does_not_depend_on_the_batch_size(task: Task, model: nn.Module, batch_size: int) -> None:
    reference = task.score(model, held_out(task))
    result = task.score(model, held_out(task), batch_size)
    assert np.array_equal(result.correct, reference.correct)
    assert np.array_equal(result.count, reference.count)
    assert result.loss == pytest.approx(reference.loss, rel=1e-6)
    assert result.count.sum() > 0


def test_score_by_another_road(task: Task, model: nn.Module) -> None:
    split = held_out(task)
    batch = task.batch(split, torch.arange(len(split)))
    with torch.no_grad():
        output = model(**batch)  # transformers computes a loss of its own
        predicted = output.logits.argmax(-1)
    result = task.score(model, split)
    assert result.loss == pytest.approx(float(output.loss), rel=1e-5)
    if task.inputs.kind in PER_TOKEN:
        labels = batch["labels"]
        if task.inputs.kind == "lm":
            predicted, labels = predicted[:, :-1], labels[:, 1:]
        kept = labels != IGNORED
        assert result.count.tolist() == [int(kept.sum())]
        assert result.correct.tolist() == [int((predicted == labels)[kept].sum())]
        return
    assert result.count.tolist() == torch.bincount(split.labels, minlength=10).tolist()
    right = split.labels[predicted == split.labels]
    assert result.correct.tolist() == torch.bincount(right, minlength=10).tolist()


def test_training_loss_is_the_score_of_the_same_examples(task: Task, model: nn.Module) -> None:
    split = held_out(task)
    tree = dict(model.named_parameters())
    batch = task.batch(split, torch.arange(len(split)))
    loss = float(task.loss(task.forward(FORM, tree, batch), batch))
    assert loss == pytest.approx(task.score(model, split).loss, rel=1e-5)


def test_an_empty_split_scores_nothing(task: Task, model: nn.Module) -> None:
    result = task.score(model, held_out(task).select(np.array([], dtype=np.int64)))
    assert result.count.sum() == result.correct.sum() == 0
    assert math.isnan(result.accuracy) and math.isnan(result.loss)


def test_scoring_leaves_the_model_without_gradients(task: Task, model: nn.Module) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    task.score(model, held_out(task))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


# building -------------------------------------------------------------------------------------------------------------


def test_fresh_weights_depend_on_the_seed_alone(task: Task) -> None:
    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), task.fresh(FORM, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = task.fresh(FORM, 7), task.fresh(FORM, 8)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_module_of_a_tree_is_a_module_of_its_own(task: Task) -> None:
    tree = task.fresh(FORM, 0)
    module, other = task.module(FORM, tree), task.module(FORM, task.fresh(FORM, 1))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tree[name])
        assert parameter.data_ptr() != other.get_parameter(name).data_ptr()
        assert parameter.data_ptr() != task.skeleton(FORM).get_parameter(name).data_ptr()
    assert not module.training


def test_pixels_become_numbers_from_minus_one_to_one() -> None:
    task = Task(TASKS["vit/digits"])
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    batch = task.batch(Split({"pixel_values": pixels}, torch.tensor([4, 5, 6])), torch.tensor([2, 0, 1]))
    torch.testing.assert_close(batch["pixel_values"][:, 0, 3, 5], torch.tensor([1.0, -1.0, -0.6]))
    assert batch["labels"].tolist() == [6, 4, 5]


def test_an_example_has_the_shapes_of_a_batch(task: Task) -> None:
    batch, example = task.batch(held_out(task), torch.arange(3)), task.example(3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in batch.items()
    }
