"""Tasks that label tokens: entities by hand, scores by token and by entity, and what of them reaches the tables."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from fedsim.core.canonical import canonical, revived
from fedsim.core.seeding import derive
from fedsim.data.config import pydoc
from fedsim.data.partition import Partition
from fedsim.data.source import load
from fedsim.experiment import Experiment, Tier, parsed
from fedsim.learning.entities import EntityCounts, EntityTags
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from fedsim.results.tables import read_table
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.tagged_words import BL, BP, IL, IP, NAMES, OO, Knows, both, tag_task


pytestmark = pytest.mark.usefixtures("one_thread", "read_again")


# entities -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ([OO, BP, IP, OO], {(1, 3, "PER")}),
        ([BP, BP], {(0, 1, "PER"), (1, 2, "PER")}),
        ([BP, IP, BP, IP], {(0, 2, "PER"), (2, 4, "PER")}),
        ([OO, IP, IP], {(1, 3, "PER")}),  # begins without a B-
        ([IP, OO, IP], {(0, 1, "PER"), (2, 3, "PER")}),
        ([BP, IL, IL], {(0, 1, "PER"), (1, 3, "LOC")}),  # another kind begins another entity
        ([BL, IL, IP, BP], {(0, 2, "LOC"), (2, 3, "PER"), (3, 4, "PER")}),
        ([OO, OO], set()),
        ([], set()),
    ],
)
def test_entities_by_hand(tags: list[int], entities: set[tuple[int, int, str]]) -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    found = reader.entities(np.array(tags, dtype=np.int64), np.zeros(len(tags), dtype=np.int64))
    assert {(first, last, ("LOC", "PER")[kind]) for first, last, kind in found} == entities


def test_no_entity_goes_on_in_the_next_example() -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    tags = np.array([BP, IP, IP])
    assert reader.entities(tags, np.array([0, 0, 0])) == {(0, 3, 1)}
    assert reader.entities(tags, np.array([0, 0, 1])) == {(0, 2, 1), (2, 3, 1)}
    assert reader.entities(tags, np.array([4, 7, 7])) == {(0, 1, 1), (1, 3, 1)}


def test_an_entity_must_be_found_whole_and_of_its_kind() -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    # In order: found, too short, of the wrong kind, not said, not there, two taken for one.
    true = [BP, IP, OO, BP, IP, IP, OO, BL, IL, OO, BL, OO, OO, OO, BP, BP]
    said = [BP, IP, OO, BP, IP, OO, OO, BP, IP, OO, OO, OO, BL, OO, BP, IP]
    counts = reader.count(np.array(true), np.array(said), np.zeros(16))
    assert counts == EntityCounts(right=1, said=5, true=6)
    assert (counts.precision, counts.recall, counts.f1) == (1 / 5, 1 / 6, 2 / 11)
    assert counts.f1 == pytest.approx(2 / (1 / counts.precision + 1 / counts.recall))
    # A B- said for an I- that begins is the same entity; the tag itself is wrong all the same.
    assert reader.count(np.array([OO, IP]), np.array([OO, BP]), np.zeros(2)) == EntityCounts(1, 1, 1)


@pytest.mark.parametrize(
    "counts", [EntityCounts(), EntityCounts(0, 0, 3), EntityCounts(0, 3, 0), EntityCounts(0, 3, 3)]
)
def test_nothing_right_is_zero_and_no_error(counts: EntityCounts) -> None:
    assert (counts.precision, counts.recall, counts.f1) == (0, 0, 0)


@pytest.mark.parametrize("names", [(), ("NOUN", "VERB"), ("O", "S-PER"), ("O", "PER"), ("O", "B_PER")])
def test_classes_that_are_no_tags_have_no_entities(names: tuple[str, ...]) -> None:
    assert EntityTags.of(names) is None


# scores of token classes ----------------------------------------------------------------------------------------------


def test_token_classes_are_scored_by_token_and_by_entity(tmp_path: Path) -> None:
    words = [["a", "b", "c"], ["b", "x"], ["d", "y", "y"]]
    tags = [[BP, IP, OO], [IP, OO], [BL, OO, OO]]
    task, data = tag_task(both(tmp_path, words, tags))
    model = Knows({ord("a"): BP, ord("b"): IP, ord("c"): OO, ord("x"): IP, ord("d"): BL, ord("y"): OO}, 5)
    result = task.score(model, data.test)
    assert result.count.tolist() == [4, 1, 2, 1, 0]
    assert result.correct.tolist() == [3, 1, 2, 1, 0]
    assert result.accuracy == 7 / 8
    # True: a b | b | d; said: a b | b x | d.
    assert result.entities == EntityCounts(right=2, said=3, true=3)
    assert (result.precision, result.recall, result.f1) == (2 / 3, 2 / 3, 2 / 3)
    # The softmax of (log 3, 0, 0, 0, 0) is 3/7 and 1/7: one of eight is wrong.
    assert result.loss == pytest.approx((7 * math.log(7 / 3) + math.log(7)) / 8, rel=1e-6)
    batch = task.batch(data.test, torch.arange(3))
    assert float(task.loss(model(batch["input_ids"], batch["attention_mask"]).logits, batch)) == pytest.approx(
        result.loss, rel=1e-6
    )
    for batch_size in (1, 2, 100):
        other = task.score(model, data.test, batch_size)
        assert other.entities == result.entities and np.array_equal(other.correct, result.correct)
        assert other.loss == pytest.approx(result.loss, rel=1e-6)
    parts = [task.score(model, data.test.select(np.array(part))) for part in ([2], [0, 1])]
    assert all(part.entities is not None for part in parts)
    assert sum((part.entities for part in parts if part.entities), EntityCounts()) == result.entities


def test_without_names_of_tags_there_is_no_entity_score(tmp_path: Path) -> None:
    task, data = tag_task(replace(both(tmp_path, [["a"], ["b"]], [[BP], [OO]]), class_names=()))
    result = task.score(Knows({}, 5), data.test)
    assert result.entities is None and result.accuracy == 1 / 2
    assert all(math.isnan(value) for value in (result.precision, result.recall, result.f1))


def test_an_empty_split_has_no_entity_score(tmp_path: Path) -> None:
    task, data = tag_task(both(tmp_path, [["a"], ["b"]], [[BP], [OO]]))
    result = task.score(Knows({}, 5), data.test.select(np.array([], dtype=np.int64)))
    assert all(
        math.isnan(value) for value in (result.accuracy, result.loss, result.precision, result.recall, result.f1)
    )


@pytest.mark.parametrize("objective", ["token_classes", "masked_token"])
def test_an_example_has_the_shapes_of_a_batch(tmp_path: Path, objective: Any) -> None:
    task, data = tag_task(both(tmp_path, [["a"], ["longerthanthat"]], [[BP], [OO]]))  # one is as long as can be
    if objective == "masked_token":
        config = pydoc(objective=objective, limit=3, max_length=8)
        data, task = load(config, None), Task(TaskConfig(config, family="bert"))
    batch, example = task.batch(data.train, torch.arange(2)), task.example(2)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in batch.items()
    }
    assert float(task.loss(torch.zeros(2, 8, 300), example)) == pytest.approx(math.log(300))


# settings, and what reaches the tables --------------------------------------------------------------------------------


def test_settings_reach_the_model_and_the_identity_of_a_run() -> None:
    config = TaskConfig(pydoc(), family="gpt2", settings=(("activation_function", "relu"), ("initializer_range", 0.5)))
    assert config.inputs.settings == config.settings
    assert TaskConfig(settings=(("qkv_bias", False),)).inputs.settings == (("qkv_bias", False),)
    assert revived(canonical(config)) == config
    assert canonical(config) != canonical(replace(config, settings=()))
    assert replace(config, settings=parsed("(('rope_theta', 5e5),)")).settings == (("rope_theta", 5e5),)
    for wrong in ((("a", 1), ("a", 2)), (("", 1),), (("a", None),), (("a",),), ("a", 1)):
        with pytest.raises(ValueError, match=r"^task\.settings="):
            TaskConfig(settings=wrong)  # pyright: ignore[reportArgumentType]


def test_entity_scores_reach_the_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [[("abc", "de", "x")[word] for word in rng.integers(3, size=3)] for _ in range(40)]
    tags = [[(BP, IP, OO)[("abc", "de", "x").index(word)] for word in row] for row in words]
    config = replace(both(tmp_path / "data", words, tags), max_length=12)
    form = Form(8, 1, heads=2)
    experiment = Experiment(
        FedAvg(lr=1e-2),
        TaskConfig(config, family="bert"),
        tiers=(Tier("phone", form),),
        intermediate=form,
        target=form,
        partition=Partition("iid"),
        participants=2,
        rounds=1,
    )
    runtime = InlineRuntime()
    run(experiment, runtime=runtime, out=tmp_path / "out")
    runtime.close()
    clients: Any = read_table(tmp_path / "out", "clients")
    rounds: Any = read_table(tmp_path / "out", "rounds")
    task, data = tag_task(config)
    assert list(clients["num_test_examples"]) == [40] * 4 and list(rounds["stage"]) == ["local", "federated"]
    for name in ("precision", "recall", "f1"):
        assert clients[name].between(0, 1).all()
        means = clients.groupby("round")[name].mean()
        assert list(rounds[f"{name}_mean"]) == pytest.approx(list(means))
    for round in (0, 1):  # a global model: everyone's score is the same, but not what each makes of its own part
        of_round = clients[clients["round"] == round]
        assert of_round["f1"].nunique() == 1 and of_round["accuracy"].nunique() == 1
        assert list(of_round["accuracy_local"]) == list(of_round["accuracy_val"])
    fresh = task.fresh(form, derive(experiment.seed, "target", 0))  # where FedAvg starts
    untrained = task.score(task.module(form, fresh), data.test)
    first = rounds.iloc[0]
    assert (first["f1_mean"], first["accuracy_mean"]) == (untrained.f1, untrained.accuracy)
    assert untrained.f1 > 0


def test_other_tasks_have_no_entity_scores(tiny_run: Path) -> None:
    clients, rounds = (read_table(tiny_run, table) for table in ("clients", "rounds"))
    assert clients[["precision", "recall", "f1"]].isna().to_numpy().all()
    assert rounds[["precision_mean", "recall_mean", "f1_mean"]].isna().to_numpy().all()
