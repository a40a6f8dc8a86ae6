"""Models that are scored: equal ones once a process and round, as many examples at once as their sizes allow."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from baselines.local_only import LocalOnly
from fedsim.data import Split
from fedsim.engine.cost import cost_of
from fedsim.engine.inbox import Inbox
from fedsim.experiment import Experiment
from fedsim.learning.task import MOST_SCORED, SCORING_BYTES, Task, TaskConfig
from fedsim.models import Form
from fedsim.results.tables import load
from tests.support.inline_runs import inline


@pytest.mark.parametrize("algorithm,models", [(FedAvg(), 1), (LocalOnly(), 3)])
def test_equal_models_are_scored_on_the_test_set_once(
    algorithm: Any, models: int, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = Task.score, list[int]()

    def counted(self: Task, model: nn.Module, split: Split, batch_size: int | None = None) -> Any:
        sizes.append(len(split))
        return real(self, model, split, batch_size)

    monkeypatch.setattr(Task, "score", counted)
    experiment = replace(tiny_experiment, algorithm=algorithm, rounds=1, participants=3)
    inline(experiment, tmp_path)
    tested = max(sizes)
    by_aggregator = 2 if algorithm.name == "fedavg" else 0  # its own model, in another process on a cluster
    assert sizes.count(tested) == 2 * models + by_aggregator and len(sizes) == sizes.count(tested) + 6
    accuracies = load(tmp_path).clients.groupby("round").accuracy
    assert (accuracies.count() == 3).all() and (accuracies.nunique() == 1).all() == (models == 1)


def test_models_that_differ_in_a_bit_or_in_an_attribute_are_two() -> None:
    inbox, asked = Inbox(), list[int]()

    def score(number: int) -> Callable[[], Any]:
        return lambda: asked.append(number) or number

    first, same, other, named = (nn.Linear(2, 2) for _ in range(4))
    for each in (same, other, named):
        each.load_state_dict(first.state_dict())
    other.weight.data.view(torch.int32)[0, 0] ^= 1
    vars(named)["scale"] = 2.0
    unpicklable = nn.Linear(2, 2)
    unpicklable.forward = lambda input: input
    models = (first, same, other, named, unpicklable, unpicklable)
    assert [inbox.once(model, score(number)) for number, model in enumerate(models)] == [0, 0, 2, 3, 4, 5]
    inbox.copy_of({}, torch.device("cpu"), ("score", 1))
    assert inbox.once(first, score(6)) == 6, "a round later"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:`torch.jit.script`")
def test_models_that_are_more_than_their_pickled_bits_are_scored_each() -> None:
    """Scales of quantised tensors, what hangs on a parameter, and what cannot be pickled at all."""
    inbox, asked = Inbox(), list[int]()

    def quantised(scale: float) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.quantize_per_tensor(torch.ones(2) * scale, scale, 0, torch.qint8))
        model.load_state_dict(plain.state_dict(), strict=False)
        return model

    def hung(scale: float) -> nn.Module:
        model = copy.deepcopy(plain)
        vars(model.weight)["scale"] = scale
        return model

    plain = nn.Linear(2, 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    models = [quantised(1.0), quantised(2.0), hung(1.0), hung(2.0), normed, normed, torch.jit.script(plain)]
    for number, model in enumerate(models):
        inbox.once(model, lambda number=number: asked.append(number))  # pyright: ignore[reportArgumentType]
    assert asked == [*range(len(models))]


def test_how_many_are_scored_at_once_goes_by_sizes() -> None:
    """256 of what tests use; of a ViT of 224 pixels, 3,072 wide, 2^28 / (4 * 197 * 3072) = 110."""
    small = Task(TaskConfig())
    form = Form(8, 1, heads=2)
    assert small._scored_at_once(small.module(form, small.fresh(form, 0))) == MOST_SCORED == 256
    task = Task(replace(TaskConfig(), data=replace(TaskConfig().data, image_size=224, channels=3), patch_size=16))
    form = Form(768, 1, heads=12, mlp=3072)
    assert task._scored_at_once(task.module(form, task.fresh(form, 0))) == SCORING_BYTES // (4 * 197 * 3072) == 110


def test_what_scoring_takes_is_said_beforehand(tiny_experiment: Experiment) -> None:
    """Three participants after each of the rounds 0 to 2; after every third round, and after the last."""
    assert cost_of(tiny_experiment, {}).as_json(tiny_experiment)["scored_models"] == 9
    seldom = replace(tiny_experiment, eval_every=3)
    figures = cost_of(seldom, {}).as_json(seldom)
    assert figures["scored_models"] == 6 and figures["score_flops_per_example"] > figures["target_params"]
