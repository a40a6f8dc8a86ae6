"""The local loop against a loop written out in plain PyTorch: optimizers, schedules, parts of a model and precision."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext
from fedsim.core.canonical import canonical, revived
from fedsim.core.seeding import derive, generator
from fedsim.core.tree import State, Tree, sha256
from fedsim.data.config import digits
from fedsim.data.dataset import Split
from fedsim.data.partition import Partition
from fedsim.experiment import Experiment, Tier
from fedsim.learning.objectives import Frozen
from fedsim.learning.task import Batch, Task, TaskConfig, load_task
from fedsim.learning.training import Training, train
from fedsim.models import Form
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.storage.checkpoint import Versions
from tests.support.clients import local_train, objective_of
from tests.support.one_participant import FORM, SETTINGS, Square, loss_in, plain_model


pytestmark = pytest.mark.usefixtures("one_thread")


# the same as plain PyTorch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip, weight_decay", [(1.0, 0.0), (None, 0.1)])
def test_one_participant_with_all_the_data_is_plain_training(tmp_path, clip: float | None, weight_decay: float) -> None:
    algorithm = FedAvg(lr=3e-3, epochs=1, batch_size=16, weight_decay=weight_decay, clip=clip)
    experiment = Experiment(
        algorithm,
        TaskConfig(digits(limit=100), patch_size=4),
        tiers=(Tier("only", Form(8, 1, heads=2)),),
        intermediate=FORM,
        target=FORM,
        partition=Partition("iid"),
        participants=1,
        rounds=1,
        seed=5,
        validation_share=0.0,
    )
    runtime = InlineRuntime()
    run_id = run(experiment, runtime=runtime, out=tmp_path)
    runtime.close()
    found = Versions(tmp_path / "checkpoints" / run_id, "server").load(before=2)
    assert found is not None and found[0] == 1
    simulated = found[1]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(5, "target", 0))
        model = plain_model(FORM)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dataset = load_task(experiment.task, None).dataset
    assert dataset is not None
    images, labels = dataset.train.inputs["pixel_values"], dataset.train.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=weight_decay, fused=False)
    model.train()
    for index in torch.randperm(100, generator=generator(5, "target/order", 1, 0)).split(16):
        logits = model(pixel_values=images[index].float() / 127.5 - 1).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[index]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert simulated.keys() == trained.keys()
    # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding, which AdamW scales up.
    decided = [name for name in trained if not name.endswith("k_proj.bias")]
    assert len(trained) - len(decided) == FORM.depth
    difference = max(float((simulated[name] - trained[name]).abs().max()) for name in decided)
    moved = max(float((start[name] - trained[name]).abs().max()) for name in decided)
    assert difference < 1e-6 < 1e-3 < moved, (difference, moved)

    task = Task(experiment.task)
    tests = task.batch(dataset.test, torch.arange(len(dataset.test)))
    with torch.no_grad():
        logits = model.eval()(pixel_values=tests["pixel_values"]).logits
        torch.testing.assert_close(task.forward(FORM, simulated, tests), logits, rtol=0, atol=1e-6)


# the loop -------------------------------------------------------------------------------------------------------------


def test_its_input_is_not_written_to(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    before = sha256(start)
    trained = local_train(ctx, loss_in(ctx), start, **SETTINGS)
    assert sha256(start) == before != sha256(trained)
    assert not any(tensor.requires_grad for tensor in (*start.values(), *trained.values()))


def test_order_of_names_changes_no_bit(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    backwards = {name: start[name] for name in reversed(start)}
    settings = dict(SETTINGS, clip=0.1)
    ends = [local_train(ctx, loss_in(ctx), tree, **settings) for tree in (start, backwards)]
    assert sha256(ends[0]) == sha256(ends[1])


@pytest.mark.parametrize("batch_size, sizes", [(8, [8] * 7 + [4]), (60, [60]), (100, [60]), (59, [59, 1])])
def test_an_epoch_leaves_no_example_out(ctx: ClientContext, batch_size: int, sizes: list[int]) -> None:
    seen: list[Tensor] = []

    def loss(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():  # else a step is being counted
            seen.append(batch["pixel_values"])
        return ctx.task.loss(ctx.task.forward(FORM, tree, batch), batch)

    start = ctx.task.fresh(FORM, 0)
    local_train(ctx, objective_of(loss), start, **dict(SETTINGS, batch_size=batch_size, epochs=2))
    assert [len(batch) for batch in seen] == 2 * sizes
    everything = ctx.task.batch(ctx.train, torch.arange(60))["pixel_values"]
    epochs = torch.cat(seen).split(60)
    for epoch in epochs:
        assert sorted(image.sum().item() for image in epoch) == sorted(image.sum().item() for image in everything)
    assert not torch.equal(*epochs), "every epoch has an order of its own"
    assert not torch.equal(epochs[0], everything)


def test_purpose_round_and_client_each_have_an_order_of_their_own(ctx: ClientContext) -> None:
    def trained(context: ClientContext, purpose: str = "target") -> str:
        settings = dict(SETTINGS, purpose=purpose)
        return sha256(local_train(context, loss_in(context), context.task.fresh(FORM, 0), **settings))

    base = trained(ctx)
    assert trained(ctx) == base
    others = [
        trained(ctx, "other"),
        trained(dataclasses.replace(ctx, round=2)),
        trained(dataclasses.replace(ctx, seed=1)),
        trained(dataclasses.replace(ctx, info=dataclasses.replace(ctx.info, id=1))),
    ]
    assert len({base, *others}) == 5


def test_clipping_bounds_the_gradient_of_a_step(ctx: ClientContext, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def noted(optimizer: torch.optim.Optimizer, *arguments: Any, **fields: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))

    hook = register_optimizer_step_pre_hook(noted)
    try:
        start = ctx.task.fresh(FORM, 0)
        free = local_train(ctx, loss_in(ctx), start, **SETTINGS)
        unclipped, norms = norms, []
        loose = local_train(ctx, loss_in(ctx), start, **SETTINGS, clip=100.0)
        norms = []
        clipped = local_train(ctx, loss_in(ctx), start, **SETTINGS, clip=0.01)
    finally:
        hook.remove()
    assert len(unclipped) == len(norms) == 8
    assert min(unclipped) > 0.1
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)
    assert sha256(free) == sha256(loose) != sha256(clipped)


@pytest.mark.parametrize("lr", [7e25, 0.25])
def test_loss_that_is_not_finite_is_named(ctx: ClientContext, lr: float) -> None:
    start = ctx.task.fresh(FORM, 0)
    if lr < 1:
        start["classifier.bias"][0] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        local_train(ctx, loss_in(ctx), start, **dict(SETTINGS, lr=lr, epochs=3))
    assert "target" in str(error.value)
    assert f"lr={lr}" in str(error.value)
    assert "nan" in str(error.value) or "inf" in str(error.value)


@dataclasses.dataclass(frozen=True)
class InParts:
    """The loss of a model whose parameters come in parts."""

    loss: Any

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        return self.loss({name: t for part in parameters.values() for name, t in part.items()}, frozen, batch)


def in_parts(tree: Tree) -> State:
    head = {name: tensor for name, tensor in tree.items() if name.startswith("classifier.")}
    return {"body": {name: tensor for name, tensor in tree.items() if name not in head}, "head": head}


def test_a_part_may_have_a_learning_rate_of_its_own(ctx: ClientContext) -> None:
    start, loss = in_parts(ctx.task.fresh(FORM, 0)), InParts(loss_in(ctx))

    def moved(**settings: Any) -> set[str]:
        trained = local_train(ctx, loss, start, **SETTINGS | settings)
        return {part for part in start if sha256(trained[part]) != sha256(start[part])}  # type: ignore[arg-type]

    assert moved() == {"head", "body"}
    assert moved(lr=0.0, lr_of={"head": 1e-2}) == {"head"}
    assert moved(lr_of={"head": 0.0}) == {"body"}
    same = local_train(ctx, loss, start, **SETTINGS, lr_of={"head": SETTINGS["lr"]})
    assert sha256(same) == sha256(local_train(ctx, loss, start, **SETTINGS))
    other = local_train(ctx, loss, start, **SETTINGS, lr_of={"head": 1e-3})
    assert sha256(other) != sha256(same)


@pytest.mark.parametrize(
    "rates, message",
    [
        ({"heads": 0.1}, r"Training\.lr_of='heads': must be a part of the nested start: body, head"),
        ({"head::classifier.bias": 0.1}, r"Training\.lr_of='head::classifier\.bias': must be a part"),
        ({"head": -1.0}, r"Training\.lr_of\['head'\]=-1\.0: must be a finite number, at least 0"),
        ({"head": math.nan}, r"Training\.lr_of\['head'\]=nan"),
        ({"head": "x"}, r"Training\.lr_of\['head'\]='x'"),
    ],
)
def test_rates_of_parts_that_cannot_be_are_refused(ctx: ClientContext, rates: dict[str, Any], message: str) -> None:
    start = in_parts(ctx.task.fresh(FORM, 0))
    with pytest.raises(ValueError, match=message):
        Training(InParts(loss_in(ctx)), start, **SETTINGS, lr_of=rates)


def test_parts_change_nothing_else(ctx: ClientContext) -> None:
    """Nested or flat, the same tensors are trained to the same bits."""
    start, loss = ctx.task.fresh(FORM, 0), loss_in(ctx)
    whole = local_train(ctx, loss, start, **SETTINGS | {"clip": None})
    parts = local_train(ctx, InParts(loss), in_parts(start), **SETTINGS | {"clip": None})
    assert sha256({name: t for part in parts.values() for name, t in part.items()}) == sha256(whole)  # type: ignore[attr-defined]


def test_every_rate_is_named_when_the_loss_is_not_finite(ctx: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    start["classifier.bias"][0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"lr=0\.01, head: 0\.25"):
        local_train(ctx, InParts(loss_in(ctx)), in_parts(start), **SETTINGS, lr_of={"head": 0.25})


# settings and answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer", "SGD"),
        ("schedule", "cosin"),
        ("lr", -1.0),
        ("batch_size", 0),
        ("momentum", 0.9),
        ("nesterov", True),
    ],
)
def test_bad_settings_of_a_training_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Training.{name}={value!r}"):
        Training(Square("a"), {"a": torch.ones(1)}, **SETTINGS | {name: value})


def test_the_answer_says_what_was_done(ctx: ClientContext) -> None:
    answer = train(ctx, Training(Square("a"), {"a": torch.full((2,), 3.0)}, **SETTINGS | {"lr": 0.0, "epochs": 2}))
    assert (answer.steps, answer.loss, answer.parameters["a"].tolist()) == (16, 18.0, [3.0, 3.0])
    nothing = dataclasses.replace(ctx, train=Split({}, torch.zeros(0, dtype=torch.long)))
    answer = train(nothing, Training(Square("a"), {"a": torch.ones(1)}, **SETTINGS))
    assert answer.steps == 0 and math.isnan(answer.loss) and answer.parameters["a"].tolist() == [1.0]


def test_settings_are_an_algorithms_fields() -> None:
    algorithm = FedAvg(lr=0.25, epochs=3, batch_size=5, weight_decay=0.5, clip=None, optimizer="sgd", momentum=0.9)
    expected = {"lr": 0.25, "epochs": 3, "batch_size": 5, "weight_decay": 0.5, "clip": None, "optimizer": "sgd"}
    expected |= {"momentum": 0.9, "nesterov": False, "schedule": "constant", "lr_warmup": 0.0}
    expected |= {"accumulate": 1, "drop_last": False}
    assert algorithm.settings() == expected
    assert algorithm.settings(lr=1.0) == expected | {"lr": 1.0}
    assert {*expected} <= {field.name for field in dataclasses.fields(Training)}


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", -0.1),
        ("weight_decay", -1.0),
        ("epochs", 0),
        ("batch_size", 0),
        ("clip", 0.0),
        ("lr", "fast"),
        ("epochs", 1.5),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("lr_warmup", 1.5),
        ("momentum", 0.9),
        ("nesterov", True),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{field}={value!r}"):
        FedAvg(**{field: value})


def test_settings_that_came_later_change_no_run_id() -> None:
    plain = canonical(FedAvg())
    assert not {"optimizer", "momentum", "nesterov", "schedule", "lr_warmup"} & plain.keys()
    other = canonical(FedAvg(optimizer="sgd"))
    assert other == plain | {"optimizer": "sgd"} and revived(other) == FedAvg(optimizer="sgd")


# optimizers and schedules ---------------------------------------------------------------------------------------------


def test_sgd_by_hand(ctx: ClientContext) -> None:
    """x^2 from 1 with lr 0.1: plain, x <- 0.8 x; with momentum m and weight decay w, v <- m v + (2 + w) x."""
    start, one_epoch = {"a": torch.ones(1)}, dict(SETTINGS, lr=0.1, batch_size=30, optimizer="sgd")  # two steps
    assert float(local_train(ctx, Square("a"), start, **one_epoch)["a"]) == pytest.approx(0.8**2)
    heavy = local_train(ctx, Square("a"), start, **one_epoch, momentum=0.5, weight_decay=1.0)
    assert float(heavy["a"]) == pytest.approx(0.7 - 0.1 * (0.5 * 3 + 3 * 0.7))
    ahead = local_train(ctx, Square("a"), start, **one_epoch, momentum=0.5, nesterov=True)
    first = 1 - 0.1 * (2 + 0.5 * 2)
    velocity = 0.5 * 2 + 2 * first
    assert float(ahead["a"]) == pytest.approx(first - 0.1 * (2 * first + 0.5 * velocity))


@pytest.mark.parametrize(
    "settings, factors",
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "cosine"}, [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
        ({"lr_warmup": 0.5}, [1 / 2, 1, 1, 1]),
        ({"schedule": "linear", "lr_warmup": 0.5}, [1 / 2, 1, 1, 1 / 2]),
        ({"schedule": "cosine", "lr_warmup": 1.0}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"lr_warmup": 0.6}, [1 / 3, 2 / 3, 1, 1]),
        ({"lr_warmup": 0.01}, [1 / 2, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(ctx: ClientContext, settings: dict[str, Any], factors: list[float]) -> None:
    """Four steps of SGD along a slope of 1: each goes its learning rate."""
    slope, start = objective_of(lambda tree, batch: tree["a"].sum()), {"a": torch.zeros(1)}
    asked = Training(slope, start, **SETTINGS | {"lr": 1.0, "batch_size": 15, "optimizer": "sgd"} | settings)
    assert [asked.scheduled(step, 4) for step in range(4)] == pytest.approx(factors)
    assert float(train(ctx, asked).parameters["a"]) == pytest.approx(-sum(factors))


def test_a_share_of_warm_up_is_rounded_up_and_one_step_has_none() -> None:
    settings: dict[str, Any] = SETTINGS | {"lr_warmup": 0.07}
    asked = Training(objective_of(lambda tree, batch: tree["a"].sum()), {}, **settings)
    assert [asked.scheduled(step, 100) for step in range(8)] == pytest.approx(
        [(step + 1) / 7 for step in range(7)] + [1]
    )
    assert asked.scheduled(0, 15) == asked.scheduled(0, 2) == 1 / 2 and asked.scheduled(0, 1) == 1


# precision ------------------------------------------------------------------------------------------------------------


def test_bf16_training_is_close_to_fp32_and_repeatable(ctx: ClientContext, bf16: ClientContext) -> None:
    start, settings = ctx.task.fresh(FORM, 0), dict(SETTINGS, lr=1e-3, epochs=4)
    full = local_train(ctx, loss_in(ctx), start, **settings)
    half = local_train(bf16, loss_in(bf16), start, **settings)
    assert sha256(half) == sha256(local_train(bf16, loss_in(bf16), start, **settings))
    assert sha256(half) != sha256(full)
    assert ctx.meter.loss is not None and bf16.meter.loss is not None
    assert ctx.meter.loss != bf16.meter.loss == pytest.approx(ctx.meter.loss, rel=5e-3)
    decided = [name for name in start if not name.endswith("k_proj.bias")]  # others have no gradient but rounding
    distance = sum(float((half[n] - full[n]).square().sum()) for n in decided) ** 0.5
    moved = sum(float((full[n] - start[n]).square().sum()) for n in decided) ** 0.5
    assert 0 < distance < 0.5 * moved


def test_bf16_is_where_products_are_and_nowhere_else(bf16: ClientContext, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: dict[str, set[torch.dtype]] = {"logits": set(), "loss": set(), "weights": set(), "gradients": set()}
    real, real_forward = Task.loss, Task.forward

    def loss(task: Task, logits: Tensor, batch: Batch) -> Tensor:
        dtypes["loss"] |= {logits.dtype, real(task, logits, batch).dtype}
        return real(task, logits, batch)

    def forward(task: Task, *arguments: Any) -> Tensor:
        logits = real_forward(task, *arguments)
        dtypes["logits"].add(logits.dtype)
        return logits

    def note(optimizer: torch.optim.Optimizer, *arguments: Any, **fields: Any) -> None:
        for leaf in optimizer.param_groups[0]["params"]:
            dtypes["weights"].add(leaf.dtype)
            dtypes["gradients"].add(leaf.grad.dtype)
            dtypes["weights"] |= {t.dtype for t in optimizer.state[leaf].values() if t.ndim}  # the moments

    start = bf16.task.fresh(FORM, 0)
    local_train(bf16, loss_in(bf16), start, **SETTINGS)  # counts, so that only training is seen below
    monkeypatch.setattr(Task, "loss", loss)
    monkeypatch.setattr(Task, "forward", forward)
    hook = register_optimizer_step_pre_hook(note)
    try:
        trained = local_train(bf16, loss_in(bf16), start, **SETTINGS)
    finally:
        hook.remove()
    assert dtypes["logits"] == {torch.bfloat16}
    assert dtypes["loss"] == dtypes["weights"] == dtypes["gradients"] == {torch.float32}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    batch = bf16.task.batch(bf16.train, torch.arange(4))
    assert bf16.task.module(FORM, trained)(pixel_values=batch["pixel_values"]).logits.dtype == torch.float32
