"""What training costs, against counts made by other means: FLOPs, bytes, losses and what is counted once."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext
from fedsim.core.tree import clone, sha256
from fedsim.data.dataset import Split
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, Tier
from fedsim.learning.meter import PRETRAIN, Meter, StepCost, Work, step_cost
from fedsim.learning.objectives import Objective, Proximal
from fedsim.learning.task import Batch, Task
from fedsim.models import Form
from tests.support.clients import local_train, objective_of
from tests.support.one_participant import CONFIG, FORM, SETTINGS, Square, loss_in, noted, plain_model


pytestmark = pytest.mark.usefixtures("one_thread")


def test_work_of_several_objectives_by_hand(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    once = loss_in(ctx)
    objectives: list[Objective] = [
        once,
        objective_of(lambda tree, batch: once(tree, {}, batch) + once(tree, {}, batch)),
    ]
    seen: list[tuple[int, Tensor]] = []
    local_train(ctx, noted(objectives, seen), start, **dict(SETTINGS, purpose="several", epochs=2))
    (work,) = ctx.meter.work
    cost, double = (StepCost.measured(ctx, objective, start, {}) for objective in objectives)
    assert double.flops(8) == 2 * cost.flops(8)
    drawn = [number for number, _ in seen]
    assert {*drawn} == {0, 1} and work.steps == 16
    sizes = 2 * ([8] * 7 + [4])
    assert work.flops == sum((cost, double)[number].flops(size) for number, size in zip(drawn, sizes, strict=True))
    assert work.flops_per_step == 1.5 * cost.flops(8), "what a step costs on average"
    assert work.activation_bytes == double.activation_bytes(8), "what it needs at most"
    assert work.trainable == sum(tensor.numel() for tensor in start.values()), "tensors are counted once"


def test_the_loss_in_the_accounts_is_the_objectives(ctx: ClientContext) -> None:
    local_train(ctx, Square("a"), {"a": torch.full((2,), 3.0)}, **dict(SETTINGS, lr=0.0))
    assert ctx.meter.loss == 18.0


def test_memory_is_counted_by_what_the_optimizer_keeps() -> None:
    """Parameters and gradients, and of each scalar two moments, one, or none."""
    tiers = (Tier("only", Form(8, 1, heads=2)),)
    peaks = []
    kept: list[dict[str, Any]] = [{}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "sgd"}]
    for settings in kept:
        algorithm = FedAvg(**settings)
        experiment = Experiment(algorithm, CONFIG, tiers=tiers, intermediate=FORM, target=FORM, participants=1)
        (cost,) = cost_of(experiment, {}).participants
        peaks.append((cost.peak_bytes, cost.trainable_params))
    (adamw, size), (heavy, _), (plain, _) = peaks
    assert (adamw - heavy, heavy - plain) == (4 * size, 4 * size)


def test_steps_in_bf16_are_counted_apart(ctx: ClientContext, bf16: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    full = ctx.meter.cost(ctx, loss_in(ctx), clone(start), {})
    half = bf16.meter.cost(bf16, loss_in(bf16), clone(start), {})
    assert half.flops(8) == full.flops(8)
    assert 0.4 * full.activation_bytes(8) < half.activation_bytes(8) < 0.95 * full.activation_bytes(8)
    again = Meter(ctx.meter.counted).cost(ctx, loss_in(ctx), clone(start), {})
    assert again is full is not half


def test_work_of_a_training_by_hand(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    local_train(ctx, loss_in(ctx), start, **dict(SETTINGS, epochs=3))
    (work,) = ctx.meter.work
    cost = ctx.meter.cost(ctx, loss_in(ctx), clone(start), {})
    assert (work.purpose, work.examples, work.steps) == ("target", 180, 24)
    assert work.trainable == sum(tensor.numel() for tensor in start.values())
    assert work.flops == 3 * (7 * cost.flops(8) + cost.flops(4))
    assert work.flops_per_step == cost.flops(8)
    assert work.activation_bytes == cost.activation_bytes(8)


def test_loss_in_the_accounts_is_the_last_epochs_mean_over_examples(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    local_train(ctx, loss_in(ctx), start, **dict(SETTINGS, lr=0.0, batch_size=50))  # batches of 50 and 10
    batch = ctx.task.batch(ctx.train, torch.arange(60))
    expected = float(ctx.task.loss(ctx.task.forward(FORM, start, batch), batch))
    assert ctx.meter.loss == pytest.approx(expected, rel=1e-6)


def test_own_pretraining_counts_in_flops_but_not_in_trainable() -> None:
    def work(purpose: str, trainable: int, steps: int, flops: int, loss: float) -> Work:
        return Work(purpose, trainable, 10, steps, flops, 1, 1, loss, epochs=1, batch_size=10)

    meter = Meter({})
    assert (meter.trainable, meter.flops, meter.loss) == (0, 0, None)
    meter.work += [work(PRETRAIN, 1000, 5, 7, 0.5), work("local", 30, 5, 11, 0.25), work("global", 4, 5, 13, 0.125)]
    meter.work += [work("global", 4, 0, 0, float("nan"))]  # a purpose twice counts once, and saw no data
    assert (meter.trainable, meter.flops, meter.loss) == (34, 31, 0.125)


def test_step_cost_is_measured_once_a_shape(ctx: ClientContext, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = StepCost.measured

    def noted(*arguments: Any) -> StepCost:
        measured.append("x")
        return real(*arguments)

    monkeypatch.setattr(StepCost, "measured", staticmethod(noted))
    meter = Meter({})
    start = ctx.task.fresh(FORM, 0)
    for _ in range(2):
        meter.cost(ctx, loss_in(ctx), start, {})
    assert len(measured) == 1
    meter.cost(ctx, loss_in(ctx), {name: start[name] for name in list(start)[:-1]}, {})
    assert len(measured) == 2
    meter.cost(ctx, loss_in(ctx), start, {"anchor": start})
    assert len(measured) == 3
    for mu in (0.1, 0.1, 0.2):  # what an objective's fields are cannot be forgotten
        meter.cost(ctx, Proximal(loss_in(ctx), mu), start, {"anchor": start})
    assert len(measured) == 5


@pytest.mark.parametrize("size", [1, 7])
def test_step_cost_of_two_sizes_tells_every_size(ctx: ClientContext, size: int) -> None:
    start = ctx.task.fresh(FORM, 0)
    cost = StepCost.measured(ctx, loss_in(ctx), start, {})
    flops, activations = step_cost(ctx, loss_in(ctx), start, {}, size)
    assert (cost.flops(size), cost.activation_bytes(size)) == (flops, activations)
    assert cost.fixed[0] == 0, "a plain model costs nothing a step but its examples"
    assert flops > 0 < activations


class Linear:
    """A task of two linear layers without bias, 6 -> 5 -> 3, whose FLOPs can be counted on fingers."""

    config = inputs = None

    def example(self, size: int) -> Batch:
        return {"x": torch.zeros(size, 6), "labels": torch.zeros(size, dtype=torch.long)}

    def dropping(self, seed: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits, batch["labels"])


def test_flops_of_linear_layers_by_hand(ctx: ClientContext) -> None:
    linear = dataclasses.replace(ctx, task=Linear())  # type: ignore[arg-type]
    tree = {"a": torch.ones(5, 6), "b": torch.ones(3, 5)}
    loss = objective_of(lambda tree, batch: linear.task.loss(batch["x"] @ tree["a"].T @ tree["b"].T, batch))
    cost = StepCost.measured(linear, loss, tree, {})
    # Forward 2 * (6*5 + 5*3) = 90; backward the weights' gradients, 90, and the hidden units', 2 * 5*3 = 30.
    assert cost.flops(1) == 210
    assert cost.flops(64) == 64 * 210


def test_flops_of_growing_are_paid_once_a_step(ctx: ClientContext) -> None:
    linear = dataclasses.replace(ctx, task=Linear())  # type: ignore[arg-type]
    frozen = torch.ones(3, 4)
    loss = objective_of(lambda tree, batch: linear.task.loss(batch["x"] @ (frozen @ tree["a"]).T, batch))
    cost = StepCost.measured(linear, loss, {"a": torch.ones(4, 6)}, {})
    # Growing: forward 2 * 3*4*6 = 144, backward the same. An example: forward 2 * 3*6 = 36, backward the same.
    assert cost.fixed[0] == 288
    assert cost.per_example[0] == 72


def test_flops_of_a_transformer_are_those_of_torchs_counter_on_the_eager_path(ctx: ClientContext) -> None:
    model = plain_model(FORM)
    model.set_attn_implementation("eager")
    batch = ctx.task.example(7)
    with FlopCounterMode(display=False) as counter:
        logits = model(pixel_values=batch["pixel_values"]).logits
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
    start = ctx.task.fresh(FORM, 0)
    assert step_cost(ctx, loss_in(ctx), start, {}, 7)[0] == counter.get_total_flops()


def test_counting_reads_no_data_and_changes_no_tensor(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    before = sha256(start)
    empty = dataclasses.replace(ctx, train=Split({}, torch.zeros(0, dtype=torch.long)), task=Task(CONFIG))
    local_train(empty, loss_in(empty), start, **SETTINGS)
    (work,) = empty.meter.work
    assert (work.examples, work.steps, work.flops) == (0, 0, 0)
    assert work.flops_per_step > 0
    assert sha256(start) == before
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in start.values())


def test_a_shard_holds_its_own_examples(ctx: ClientContext) -> None:
    chosen = ctx.train.select(torch.tensor([5, 2]).numpy())
    assert torch.equal(chosen.labels, ctx.train.labels[[5, 2]])
    assert torch.equal(chosen.inputs["pixel_values"], ctx.train.inputs["pixel_values"][[5, 2]])
