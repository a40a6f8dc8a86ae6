"""What people add to a training: smoothed labels, batches that add up to a step, whole batches alone, dropout."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext
from fedsim.core.canonical import canonical, revived
from fedsim.core.tree import Tree, flat, sha256
from fedsim.data.config import digits
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, Tier
from fedsim.learning.augmentation import Augmentation
from fedsim.learning.batched import Tally
from fedsim.learning.meter import Meter
from fedsim.learning.objectives import TaskLoss
from fedsim.learning.steps import Asking, run_batched
from fedsim.learning.task import Batch, Task, TaskConfig, load_task
from fedsim.learning.training import Trained, Training, train
from fedsim.models import get_family
from tests.support.clients import client_update, local_train, objective_of
from tests.support.contract import METHODS
from tests.support.family_rows import ROWS
from tests.support.one_participant import CONFIG, FORM, SETTINGS, Square, loss_in
from tests.support.small_federation import Federation


pytestmark = pytest.mark.usefixtures("one_thread")

SGD: dict[str, Any] = SETTINGS | {"optimizer": "sgd", "lr": 0.1}


def changed(ctx: ClientContext, **fields: Any) -> ClientContext:
    """The same client, whose task differs in some fields."""
    task = Task(dataclasses.replace(CONFIG, **fields), ctx.task.dataset)
    return dataclasses.replace(ctx, task=task, meter=Meter({}))


def training(objective: Any, start: Tree, settings: dict[str, Any], **changes: Any) -> Training:
    return Training(objective, start, **{**settings, **changes})


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# label smoothing ------------------------------------------------------------------------------------------------------


def test_label_smoothing_by_hand() -> None:
    """Two classes with probabilities 0.8 and 0.2, the first is right: 0.9 of the label and half of 0.2 are its own."""
    task = Task(TaskConfig(digits(), label_smoothing=0.2))
    logits, labels = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0])
    expected = -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    assert float(task.loss(logits, {"labels": labels})) == pytest.approx(expected)
    assert float(task.loss(logits, {"labels": torch.tensor([[1.0, 0.0]])})) == pytest.approx(expected)


def test_mixed_labels_by_hand() -> None:
    task, logits = Task(CONFIG), torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()
    batch = {"labels": torch.tensor([[0.75, 0.25], [1.0, 0.0]])}
    expected = -(0.75 * math.log(0.8) + 0.25 * math.log(0.2) + math.log(0.5)) / 2
    assert float(task.loss(logits, batch)) == pytest.approx(expected)
    hard = {"labels": torch.tensor([0, 1])}
    teacher = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    assert task.distillation(logits, teacher, batch) == task.distillation(logits, teacher, hard)


def test_scores_are_the_plain_loss(ctx: ClientContext) -> None:
    smooth = changed(ctx, label_smoothing=0.3, dropout=0.5)
    model = ctx.task.module(FORM, ctx.task.fresh(FORM, 0))
    assert smooth.task.score(model, ctx.train).loss == ctx.task.score(model, ctx.train).loss
    batch = ctx.task.batch(ctx.train, torch.arange(8))
    logits = ctx.task.forward(FORM, ctx.task.fresh(FORM, 0), batch)
    assert smooth.task.loss(logits, batch) != ctx.task.loss(logits, batch)


# accumulation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"clip": 0.05}, {"schedule": "cosine", "momentum": 0.9}])
def test_batches_that_add_up_are_one_batch(ctx: ClientContext, settings: dict[str, Any]) -> None:
    """60 examples, in steps of 16 at once or of four batches of 4; the last step has 12, or three."""
    start = ctx.task.fresh(FORM, 0)
    asked = SGD | settings | {"epochs": 2}
    whole = train(ctx, training(loss_in(ctx), start, asked, batch_size=16))
    parts = train(ctx, training(loss_in(ctx), start, asked, batch_size=4, accumulate=4))
    assert whole.steps == parts.steps == 8
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert apart(whole.parameters, parts.parameters) < 1e-6 < 1e-3 < apart(whole.parameters, start)


def test_a_step_is_the_mean_over_its_examples_by_hand(ctx: ClientContext) -> None:
    """The slope is 1 for batches of 25 examples and 4 for the one of 10: steps of 25 + 25 and of 10."""
    slope = objective_of(lambda tree, batch: tree["a"].sum() * (1.0 if len(batch["labels"]) > 10 else 4.0))
    asked = training(slope, {"a": torch.zeros(1)}, SGD, lr=1.0, batch_size=25, accumulate=2)
    found = train(ctx, asked)
    assert (found.steps, float(found.parameters["a"])) == (2, pytest.approx(-(1 + 4)))
    three = train(ctx, dataclasses.replace(asked, accumulate=3))  # one step, on 25 + 25 + 10
    assert (three.steps, float(three.parameters["a"])) == (1, pytest.approx(-(50 * 1 + 10 * 4) / 60))


def test_schedules_run_over_steps(ctx: ClientContext) -> None:
    """Eight batches of 8 (the last of 4) in four steps along a slope of 1."""
    slope, start = objective_of(lambda tree, batch: tree["a"].sum()), {"a": torch.zeros(1)}
    found = train(ctx, training(slope, start, SGD, lr=1.0, schedule="linear", accumulate=2))
    assert (found.steps, float(found.parameters["a"])) == (4, pytest.approx(-(1 + 3 / 4 + 2 / 4 + 1 / 4)))


def test_a_step_draws_one_objective(ctx: ClientContext) -> None:
    seen: list[int] = []

    def note(number: int):
        def asked(tree: Tree, batch: Batch) -> Tensor:
            if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():
                seen.append(number)
            return tree["a"].sum()

        return objective_of(asked)

    objectives = (note(0), note(1))
    train(ctx, training(objectives, {"a": torch.zeros(1)}, SETTINGS, epochs=8, accumulate=4))
    steps = [seen[at : at + 4] for at in range(0, len(seen), 4)]
    assert len(steps) == 16 and all(len(set(step)) == 1 for step in steps)
    assert {step[0] for step in steps} == {0, 1}


# whole batches alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, accumulate, steps, examples",
    [(8, 1, 7, 56), (8, 2, 4, 56), (59, 1, 1, 59), (60, 1, 1, 60), (61, 1, 1, 60), (100, 3, 1, 60)],
)
def test_what_fills_no_batch_is_left_out(
    ctx: ClientContext, batch_size: int, accumulate: int, steps: int, examples: int
) -> None:
    """Of 60 examples; a shard smaller than a batch is one, for nobody is to train nothing and not be told."""
    ctx = dataclasses.replace(ctx, meter=Meter({}))
    settings = {"batch_size": batch_size, "accumulate": accumulate, "drop_last": True}
    found = train(ctx, training(Square("a"), {"a": torch.ones(1)}, SETTINGS, epochs=2, **settings))
    (work,) = ctx.meter.work
    assert (found.steps, work.steps, work.examples) == (2 * steps, 2 * steps, 2 * examples)
    assert math.isfinite(found.loss)


def test_other_examples_are_left_out_in_each_epoch(ctx: ClientContext) -> None:
    seen: list[Tensor] = []

    def loss(tree: Tree, batch: Batch) -> Tensor:
        if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():
            seen.append(batch["pixel_values"].sum((1, 2, 3)))
        return tree["a"].sum()

    train(ctx, training(objective_of(loss), {"a": torch.ones(1)}, SETTINGS, epochs=2, drop_last=True))
    assert [len(batch) for batch in seen] == 14 * [8]
    first, second = torch.cat(seen[:7]), torch.cat(seen[7:])
    assert set(first.tolist()) != set(second.tolist())


# accounts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, settings",
    [
        ({}, {"accumulate": 3}),
        ({}, {"accumulate": 2, "drop_last": True}),
        ({"dropout": 0.1, "label_smoothing": 0.1, "augmentation": Augmentation(flip=0.5, mixup=1.0)}, {}),
    ],
)
def test_what_is_inspected_is_what_is_then_measured(
    ctx: ClientContext, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    algorithm = FedAvg(epochs=2, batch_size=8, **settings)
    task = dataclasses.replace(CONFIG, **fields)
    experiment = Experiment(algorithm, task, (Tier("phone", FORM),), FORM, FORM, participants=1)
    (predicted,) = cost_of(experiment, counted := {}).participants
    (cost,) = counted.values()
    ctx = dataclasses.replace(changed(ctx, **fields), meter=Meter(counted))
    client_update(algorithm, ctx.task.fresh(FORM, 0), {}, ctx)
    (work,) = ctx.meter.work
    assert predicted.flops_per_step == {"target": work.flops_per_step}
    assert work.flops_per_step == algorithm.accumulate * cost.flops(8)
    sizes = [8] * 7 + ([] if algorithm.drop_last else [4])
    assert work.flops == 2 * sum(cost.flops(size) for size in sizes)
    assert (work.examples, work.steps) == (2 * sum(sizes), 2 * -(-len(sizes) // algorithm.accumulate))
    assert predicted.peak_bytes == (2 + 2) * work.trainable * 4 + work.activation_bytes


def test_what_is_dropped_takes_memory_until_the_backward_pass(ctx: ClientContext) -> None:
    works = []
    for dropout in (0.0, 0.5):
        context = changed(ctx, dropout=dropout)
        local_train(context, loss_in(context), context.task.fresh(FORM, 0), **SETTINGS)
        works += context.meter.work
    plain, dropped = works
    assert plain.flops == dropped.flops and plain.activation_bytes < dropped.activation_bytes


# dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_family_drops_out_in_training_alone(name: str) -> None:
    row = ROWS[name]
    family = get_family(row.config.family)
    if not family.dropouts:
        with pytest.raises(ValueError, match=r"task.dropout=0.1: must be 0"):
            dataclasses.replace(row.config, dropout=0.1)
        return
    task, plain = Task(dataclasses.replace(row.config, dropout=0.3)), row.task
    tree, batch = plain.fresh(row.small, 0), plain.example(3)
    if "pixel_values" in batch:
        batch["pixel_values"] += torch.linspace(-1, 1, batch["pixel_values"].numel()).view_as(batch["pixel_values"])
    expected = plain.forward(row.small, tree, batch)
    assert torch.equal(task.forward(row.small, tree, batch), expected)
    before, found = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with task.dropping(seed):
            found.append(task.forward(row.small, tree, batch))
    assert torch.equal(torch.get_rng_state(), before), "the global stream is as it was"
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], expected)
    assert torch.equal(task.forward(row.small, tree, batch), expected)
    assert not task.module(row.small, tree).training
    with plain.dropping(1):
        assert torch.equal(plain.forward(row.small, tree, batch), expected)
    still = family.with_dropout(row.small, plain.inputs, 0.0)
    assert still.training and {name for name, _ in still.named_parameters()} == {*tree}
    still.load_state_dict(tree, strict=False)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    torch.testing.assert_close(still(**inputs).logits, expected, msg="training differs by dropout alone")


def test_every_field_of_dropout_is_known() -> None:
    """What a family's config calls a dropout is among its `dropouts`, or is for a head that is not built."""
    others = {"classifier_dropout", "summary_first_dropout"}
    for row in ROWS.values():
        family = get_family(row.config.family)
        if family.dropouts:
            config = family.config(row.small, row.task.inputs).to_dict()
            named = {name for name in config if "drop" in name} - others
            assert named <= {*family.dropouts}, row.config.family


def test_a_training_with_dropout_is_its_coordinates(ctx: ClientContext) -> None:
    def trained(context: ClientContext) -> str:
        return sha256(local_train(context, loss_in(context), context.task.fresh(FORM, 0), **SETTINGS))

    dropped = changed(ctx, dropout=0.2)
    torch.manual_seed(1)
    once = trained(dropped)
    torch.manual_seed(2)
    assert trained(dropped) == once != trained(ctx)
    others = [dataclasses.replace(dropped, round=2), dataclasses.replace(dropped, seed=1)]
    others += [dataclasses.replace(dropped, info=dataclasses.replace(dropped.info, id=1))]
    assert len({once, *map(trained, others)}) == 4


def test_every_pass_drops_others(ctx: ClientContext) -> None:
    """Batches of one step, too: what they drop is drawn for each."""
    seen: list[Tensor] = []

    @functools.cache
    def masks() -> nn.Dropout:
        return nn.Dropout(0.5)

    def loss(tree: Tree, batch: Batch) -> Tensor:
        kept = masks()(torch.ones(40))
        if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():
            seen.append(kept)
        return (tree["a"] * kept.mean()).sum()

    dropped = changed(ctx, dropout=0.5)
    train(dropped, training(objective_of(loss), {"a": torch.ones(1)}, SETTINGS, accumulate=4))
    assert len(torch.stack(seen).unique(dim=0)) == 8


# several clients at once ----------------------------------------------------------------------------------------------


RECIPE = Augmentation(crop=(0.5, 1.0), flip=0.5, randaugment=1, erase=0.5, mixup=0.5, cutmix=0.5)


@pytest.mark.parametrize(
    "fields, settings, batched",
    [
        ({"augmentation": RECIPE, "label_smoothing": 0.1}, {"schedule": "cosine", "drop_last": True}, 3),
        ({"dropout": 0.1}, {}, 0),
        ({}, {"accumulate": 2}, 0),
    ],
)
def test_clients_trained_together_take_the_same_batches(
    uncounted: None, fields: dict[str, Any], settings: dict[str, Any], batched: int
) -> None:
    federation = Federation(FedAvg(lr=1e-3, epochs=2, batch_size=4))
    config = dataclasses.replace(federation.task.config, **fields)
    task = Task(config, federation.task.dataset)
    contexts = [dataclasses.replace(federation.at_client(1, client), task=task) for client in range(3)]
    start = task.fresh(FORM, 0)
    asked = Training(TaskLoss(task, FORM), start, purpose="target", lr=1e-3, epochs=2, batch_size=4, **settings)

    def call(client: int) -> Asking[Trained]:
        return (yield contexts[client], asked)

    tally = Tally()
    found = run_batched([functools.partial(call, client) for client in range(3)], tally)
    assert (tally.batched, tally.alone) == (batched, 3 - batched)
    for client, trained in enumerate(found):
        assert isinstance(trained, Trained)
        alone = train(contexts[client], asked)
        assert trained.steps == alone.steps and trained.loss == pytest.approx(alone.loss, rel=1e-4)
        decided = {name: t for name, t in alone.parameters.items() if not name.endswith("k_proj.bias")}
        assert apart(decided, trained.parameters) < 1e-4
    assert isinstance(found[0], Trained) and isinstance(found[1], Trained)
    assert sha256(found[0].parameters) != sha256(found[1].parameters)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.trains])
def test_every_method_trains_with_all_of_it(name: str, uncounted: None) -> None:
    """Losses read shares of classes instead of labels; sub-models, exits and adapters drop out; twice the same bits."""
    config = TaskConfig(digits(limit=36), patch_size=4, augmentation=RECIPE, label_smoothing=0.1, dropout=0.1)
    task, hashes = load_task(config, None), []
    for _ in range(2):
        algorithm: Any = dataclasses.replace(METHODS[name].algorithm, accumulate=2, drop_last=True)  # type: ignore[type-var]
        federation = Federation(algorithm, task=task)
        found = [each for round in (1, 2) for each in federation.run(round)]
        assert all(bool(tensor.isfinite().all()) for each in found for tensor in flat(each.tree).values())
        works = [work for meter in federation.work.values() for work in meter.work]
        assert works and all(math.isfinite(work.loss) for work in works if work.steps)
        hashes.append([sha256(each.tree) for each in found] + [work.loss for work in works])
    assert hashes[0] == hashes[1]


# fields ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value", [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("dropout", 1.0), ("dropout", -0.5)]
)
def test_bad_fields_of_the_task_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"task.{field}={value}: must be at least 0, and below 1"):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_family_that_is_not_there_is_refused_with_or_without_dropout() -> None:
    for dropout in (0.0, 0.1):
        with pytest.raises(ValueError, match="nowhere"):
            dataclasses.replace(CONFIG, family="nowhere", dropout=dropout)


@pytest.mark.parametrize("field, value", [("accumulate", 0), ("accumulate", 1.5), ("drop_last", 1)])
def test_bad_fields_of_training_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{field}={value!r}"):
        FedAvg(**{field: value})


def test_fields_that_came_later_change_no_run_id() -> None:
    later = {"accumulate", "drop_last", "label_smoothing", "dropout", "augmentation"}
    plain = {**canonical(FedAvg()), **canonical(CONFIG)}
    assert not later & plain.keys()
    asked = dataclasses.replace(CONFIG, label_smoothing=0.1, dropout=0.1, augmentation=RECIPE)
    written = canonical(asked)
    assert written.keys() - canonical(CONFIG).keys() == {"label_smoothing", "dropout", "augmentation"}
    assert revived(written) == asked
