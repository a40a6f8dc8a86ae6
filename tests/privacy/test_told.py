"""What an update tells, of participants small enough to say beforehand what it must be."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import Algorithm
from fedsim.data.config import DataConfig
from fedsim.data.dataset import Split
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from fedsim.privacy import told
from fedsim.privacy.attacks import properties
from fedsim.privacy.attacks.replay import Exchange, Replay, change, without_data
from fedsim.testing import Federation
from tests.support.family_rows import LENGTH, NEXT_TOKEN, TAGS, TEXTS
from tests.support.small_federation import without_counting


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip": None, "epochs": 1, "batch_size": 1}


@pytest.fixture(autouse=True)
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    without_counting(monkeypatch)


def attacked(federation: Federation) -> tuple[Any, Replay]:
    """A federation of one level of knowledge as an audit sees a run, and participant 0's first exchange."""
    exchange = Exchange(1, 0, federation.payload(1, 0), federation.update(1, 0).tree)
    replay = Replay(federation.algorithm, exchange, {}, without_data(federation.at_client(1, 0)))
    run = SimpleNamespace(
        experiment=SimpleNamespace(seed=0, target=federation.target, algorithm=federation.algorithm),
        task=federation.task,
        shard=lambda client: federation.shards[client],
        replays=lambda round, client: {"shared": replay},
    )
    return run, replay


def of_one_text(family: str, data: DataConfig, width: int, algorithm: Algorithm) -> tuple[Any, Replay]:
    """Of a participant with one text of twelve tokens."""
    task = Task(TaskConfig(data, family))
    stream = torch.Generator().manual_seed(1)
    ids = torch.randint(0, task.inputs.vocab_size or 0, (1, LENGTH), generator=stream)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if data is TAGS:
        inputs["labels"] = ids % 3
    shards = [Split(inputs, torch.zeros(1, dtype=torch.long))] * 3
    return attacked(
        Federation(
            algorithm, target=Form(width, 2, heads=2), intermediate=Form(8, 1, heads=2), task=task, shards=shards
        )
    )


@pytest.mark.parametrize(
    ("family", "data", "recall"), [("gpt2", TEXTS, 1), ("bert", TAGS, 1), ("gpt2", NEXT_TOKEN, 11 / 12)]
)
def test_tokens_and_places_of_one_text_are_told_exactly(family: str, data: DataConfig, recall: float) -> None:
    """By a model of more coordinates than tokens. The last token predicts nothing: no gradient goes through it."""
    run, replay = of_one_text(family, data, 32, FedAvg(**SGD))
    asked = replay.asked()
    assert asked is not None
    found = told.tokens_of_step(run, replay, asked)
    assert found is not None
    assert {name: value.value for name, value in found.items()} == {"token_recall": recall, "token_precision": 1.0}


@pytest.mark.parametrize(("family", "data"), [("gpt2", TEXTS), ("bert", TAGS)])
def test_more_tokens_than_coordinates_tell_nothing(family: str, data: DataConfig) -> None:
    """Twelve tokens span all of eight coordinates: every token may have been at every place, one of 258 was."""
    run, replay = of_one_text(family, data, 8, FedAvg(**SGD))
    asked = replay.asked()
    assert asked is not None
    found = told.tokens_of_step(run, replay, asked)
    assert found is not None
    assert found["token_recall"].value == 1 and found["token_precision"].value == pytest.approx(1 / 258, rel=0.2)


def test_the_sign_of_a_gradient_tells_no_token() -> None:
    run, replay = of_one_text("gpt2", TEXTS, 32, FedAvg(**SGD | {"optimizer": "adamw", "lr": 1e-3}))
    asked = replay.asked()
    assert asked is not None
    found = told.tokens_of_step(run, replay, asked)
    assert found is not None and found["token_precision"].value < 0.05


@pytest.mark.parametrize(
    "algorithm", [FedAvg(**SGD), FedGrow(**SGD, local_epochs=0, small_epochs=0)], ids=lambda each: each.name
)
def test_a_mix_of_two_classes_is_told_of_models_and_of_operators(algorithm: Algorithm) -> None:
    """What is sent is a mix of gradients on the test set's own examples. Fed-Grow's maps have no bias of classes."""
    federation = Federation(algorithm)
    update = federation.update(1, 0)
    exchange = Exchange(1, 0, federation.payload(1, 0), update.tree)
    asked = Replay(algorithm, exchange, federation.state(0), without_data(federation.at_client(1, 0))).asked()
    assert asked is not None
    names = sorted(change(asked, update.tree) or {})
    gradients = told.gradients_of_classes(federation.task, asked, names)
    found = properties.mix(gradients, gradients[2] + 3 * gradients[7])
    values = told.labels(found, torch.tensor([2, 7, 7, 7]))
    assert values["distance"].value == pytest.approx(0, abs=1e-4) and values["distance_chance"].value == 0.8
    assert values["correlation"].value == pytest.approx(1)
    elsewhere = told.labels(found, torch.tensor([0, 1, 1, 1]))
    assert elsewhere["distance"].value > 0.99 and elsewhere["correlation"].value < 0
