"""The local loop against a loop written out in plain PyTorch, and its accounts against counts made by other means."""

import dataclasses
import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.core.canonical import canonical, revived
from fedsim.core.seeding import derive, generator
from fedsim.core.tree import State, Tree, clone, sha256
from fedsim.data.config import Split, digits
from fedsim.data.partition import Partition
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, Tier
from fedsim.learning.meter import PRETRAIN, Meter, StepCost, Work, step_cost
from fedsim.learning.objectives import Frozen, Objective, Proximal, TaskLoss, identity
from fedsim.learning.task import Batch, Task, TaskConfig, load_task, subset
from fedsim.learning.training import Training, train
from fedsim.models import Form
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.storage.checkpoint import Versions
from tests.support.clients import local_train, objective_of


FORM = Form(12, 2, heads=2)
CONFIG = TaskConfig(digits(limit=60), patch_size=4)
SETTINGS: dict[str, Any] = {"purpose": "target", "lr": 1e-2, "epochs": 1, "batch_size": 8}


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


@pytest.fixture(scope="module")
def counted() -> dict[tuple, StepCost]:
    return {}


@pytest.fixture
def ctx(counted: dict[tuple, StepCost]) -> ClientContext:
    task = load_task(CONFIG, None)
    assert task.dataset is not None
    return ClientContext(
        seed=0,
        round=1,
        task=task,
        intermediate=FORM,
        target=FORM,
        info=ClientInfo(0, "phone", FORM, len(task.dataset.train)),
        train=task.dataset.train,
        device=torch.device("cpu"),
        meter=Meter(counted),
    )


def loss_in(ctx: ClientContext) -> TaskLoss:
    return TaskLoss(ctx.task, FORM)


# the same as plain PyTorch --------------------------------------------------------------------------------------------


def plain_model(form: Form) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=form.width,
        num_hidden_layers=form.depth,
        num_attention_heads=form.heads,
        intermediate_size=form.width,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


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


# objectives -----------------------------------------------------------------------------------------------------------


def noted(objectives: Sequence[Objective], seen: list[tuple[int, Tensor]]) -> tuple[Objective, ...]:
    """The same objectives; which one was asked for which batch is noted, counting left out."""

    def note(number: int, objective: Objective) -> Objective:
        def asked(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
            if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():
                seen.append((number, batch["pixel_values"]))
            return objective({**tree}, {}, batch)

        return objective_of(asked)

    return tuple(note(number, objective) for number, objective in enumerate(objectives))


@dataclasses.dataclass(frozen=True)
class Square:
    """Smallest where a tensor is 0."""

    name: str

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return parameters[self.name].square().sum()


def test_one_of_one_is_that_one(ctx: ClientContext) -> None:
    start, loss = ctx.task.fresh(FORM, 0), loss_in(ctx)
    assert sha256(local_train(ctx, (loss,), start, **SETTINGS)) == sha256(local_train(ctx, loss, start, **SETTINGS))


@dataclasses.dataclass(frozen=True)
class Holding:
    """An objective that holds something, and reads another's objective."""

    held: Any = None
    inner: Any = None
    silent: float = dataclasses.field(default=0.0, compare=False)

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return parameters["a"].sum()


@dataclasses.dataclass(eq=False)
class Thawed:
    """Compared by identity, and may change."""

    name: str


def with_more() -> Holding:
    """Something that is no field."""
    held = Holding()
    object.__setattr__(held, "more", 1)
    return held


def of_a_function() -> Any:
    @dataclasses.dataclass(frozen=True)
    class Inner(Holding):
        pass

    return Inner()


@pytest.mark.parametrize(
    "objective, message",
    [
        (lambda tree, frozen, batch: tree["a"].sum(), "must be a frozen dataclass"),
        (Square, "must be a frozen dataclass"),
        (Thawed("a"), "must be a frozen dataclass"),
        (Holding(torch.ones(1)), r"objective\.held is a tensor: pass it in Training\(\.\.\., frozen=\.\.\.\)"),
        ((Square("a"), Holding((1, torch.ones(1)))), r"objective\.held\[1\] is a tensor"),
        (Holding(inner=Holding(torch.ones(1))), r"objective\.inner\.held is a tensor"),
        (Holding([1]), r"objective\.held=\[1\]: must be a number, a text, a tuple or a frozen dataclass"),
        (Holding(len), r"objective\.held=<built-in function len>: must be a number"),
        (with_more(), r"objective\.more must be a field of Holding"),
        (of_a_function(), r"of_a_function\.<locals>\.Inner must be defined at the top of its module"),
    ],
)
def test_objectives_that_cannot_be_compared_are_refused(objective: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Training(objective, {"a": torch.ones(1)}, **SETTINGS)


def test_what_an_objective_is(ctx: ClientContext) -> None:
    """Types count, and fields that `==` leaves out; what data there are does not."""
    loss = loss_in(ctx)
    different = [Holding(1), Holding(1.0), Holding(True), Holding("1"), Holding((1,)), Holding(silent=1.0), Holding()]
    different += [Holding(inner=Square("a")), Holding(inner=Square("b")), loss, Proximal(loss, 0.1), Square("a")]
    assert len({identity(each) for each in different}) == len(different)
    assert identity(TaskLoss(Task(CONFIG), FORM)) == identity(loss)
    assert identity(pickle.loads(pickle.dumps(loss))) == identity(loss) and len(pickle.dumps(loss)) < 2000


@pytest.mark.parametrize(
    "given, message",
    [
        ({"start": torch.ones(1)}, r"Training\.start=.*: must be a tree"),
        ({"frozen": {"mu": 0.1}}, r"Training\.frozen\['mu'\]=0\.1: must be a tree"),
        ({"frozen": {"anchor": {"x": [1.0]}}}, r"Training\.frozen\['anchor'\]\['x'\]=\[1\.0\]: must be a tree"),
    ],
)
def test_what_is_no_tensor_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Training(Square("a"), **({"start": {"a": torch.ones(1)}} | given), **SETTINGS)


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


def test_frozen_parameters_of_modules_stay_as_they_are(ctx: ClientContext) -> None:
    teacher = nn.Linear(2, 2)
    frozen = {"model": {"x": teacher.weight}}
    local_train(ctx, Square("a"), {"a": nn.Parameter(torch.ones(1))}, frozen, **SETTINGS)
    assert teacher.weight.grad is None and teacher.weight.requires_grad


def test_frozen_tensors_are_read_and_stay(ctx: ClientContext) -> None:
    """Of a model whose body is frozen the head alone is trained."""
    start = ctx.task.fresh(FORM, 0)
    head = {name: tensor for name, tensor in start.items() if name.startswith("classifier.")}
    body = {name: tensor for name, tensor in start.items() if name not in head}
    before = sha256(body)
    trained = local_train(ctx, loss_in(ctx), head, {"model": body}, **SETTINGS)
    assert trained.keys() == head.keys() and sha256(trained) != sha256(head)
    assert sha256(body) == before and not any(tensor.requires_grad for tensor in body.values())
    (work,) = ctx.meter.work
    assert work.trainable == sum(tensor.numel() for tensor in head.values())


def test_the_answer_says_what_was_done(ctx: ClientContext) -> None:
    answer = train(ctx, Training(Square("a"), {"a": torch.full((2,), 3.0)}, **SETTINGS | {"lr": 0.0, "epochs": 2}))
    assert (answer.steps, answer.loss, answer.parameters["a"].tolist()) == (16, 18.0, [3.0, 3.0])
    nothing = dataclasses.replace(ctx, train=Split({}, torch.zeros(0, dtype=torch.long)))
    answer = train(nothing, Training(Square("a"), {"a": torch.ones(1)}, **SETTINGS))
    assert answer.steps == 0 and math.isnan(answer.loss) and answer.parameters["a"].tolist() == [1.0]


def test_each_step_draws_one_objective_all_alike(ctx: ClientContext) -> None:
    tree, steps = {name: torch.ones(2) for name in "abc"}, dict(SETTINGS, batch_size=1, epochs=5)
    draws: list[list[int]] = []
    for context in (ctx, ctx, dataclasses.replace(ctx, round=2)):
        seen: list[tuple[int, Tensor]] = []
        local_train(context, noted([Square(name) for name in "abc"], seen), tree, **steps)
        draws.append([number for number, _ in seen])
    assert [len(each) for each in draws] == [300] * 3
    for number in range(3):
        assert 75 <= draws[0].count(number) <= 125, "three standard deviations around 100"
    assert draws[0] == draws[1] != draws[2], "from the stream of purpose, round and client"


def test_what_the_drawn_objective_does_not_read_stays(ctx: ClientContext) -> None:
    """Not even weights decay: a tensor without a gradient is no part of the step."""
    start = {"a": torch.ones(3), "b": torch.ones(3)}
    for objectives in (Square("a"), (Square("a"), Square("a"))):
        trained = local_train(ctx, objectives, start, **SETTINGS, weight_decay=0.1, clip=1.0)
        assert torch.equal(trained["b"], start["b"]) and float(trained["a"].max()) < 0.95
    both = local_train(ctx, (Square("a"), Square("b")), start, **SETTINGS)
    assert float(both["a"].max()) < 1 > float(both["b"].max())


def test_how_many_objectives_there_are_changes_no_order_of_examples(ctx: ClientContext) -> None:
    seen: list[list[tuple[int, Tensor]]] = [[], []]
    for objectives, batches in zip(([Square("a")], [Square("a")] * 4), seen, strict=True):
        local_train(ctx, noted(objectives, batches), {"a": torch.ones(1)}, **dict(SETTINGS, epochs=2))
    assert len(seen[0]) == len(seen[1]) == 16
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(*seen, strict=True))


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


def test_an_objective_that_is_not_finite_is_named(ctx: ClientContext) -> None:
    with pytest.raises(FloatingPointError, match="target: the training loss became"):
        infinite = objective_of(lambda tree, batch: tree["a"].sum() / 0)
        local_train(ctx, (Square("a"), infinite), {"a": torch.ones(1)}, **SETTINGS)


# Arguments of objectives that read no batch.
NOTHING: Batch = {}


def test_a_proximal_term_on_paper() -> None:
    """mu / 2 |(3, 4) - (0, 2)|^2 = 13 for mu = 2, and its gradient is mu ((3, 4) - (0, 2)) = (6, 4)."""
    theta = {"x": torch.tensor([3.0]).requires_grad_(), "y": torch.tensor([4.0]).requires_grad_()}
    anchor = {"x": torch.tensor([0.0]), "y": torch.tensor([2.0])}
    inner = objective_of(lambda tree, batch: 10 * tree["x"].sum())
    value = Proximal(inner, mu=2.0)(theta, {"anchor": anchor}, NOTHING)
    assert float(value.detach()) == 30 + 13
    value.backward()
    assert theta["x"].grad is not None and theta["y"].grad is not None
    assert (float(theta["x"].grad), float(theta["y"].grad)) == (10 + 6, 4)


def test_a_proximal_term_is_nothing_where_training_starts() -> None:
    anchor = {"x": torch.tensor([1.0, -2.0])}
    theta = {"x": anchor["x"].clone().requires_grad_()}
    value = Proximal(Square("x"), mu=100.0)(theta, {"anchor": anchor}, NOTHING)
    value.backward()
    assert float(value.detach()) == 5.0
    assert theta["x"].grad is not None and theta["x"].grad.tolist() == [2.0, -4.0]


def test_a_proximal_term_knows_what_is_anchored_alone() -> None:
    theta = {"x": torch.tensor([5.0]), "frozen": torch.tensor([7.0])}
    anchor = {"x": torch.tensor([4.0])}
    assert float(Proximal(Square("x"), mu=2.0)(theta, {"anchor": anchor}, NOTHING)) == 25 + 1


def test_training_with_a_proximal_term_ends_between_optimum_and_anchor(ctx: ClientContext) -> None:
    """x^2 + mu / 2 (x - 6)^2 is smallest at 6 mu / (2 + mu): at 3 for mu = 2, at 5 for mu = 10."""
    anchor, long = {"x": torch.tensor([6.0])}, dict(SETTINGS, lr=0.05, epochs=60)
    for mu, expected in ((2.0, 3.0), (10.0, 5.0)):
        trained = local_train(ctx, Proximal(Square("x"), mu), anchor, {"anchor": anchor}, **long)
        assert float(trained["x"]) == pytest.approx(expected, abs=0.05)


def test_settings_are_an_algorithms_fields() -> None:
    algorithm = FedAvg(lr=0.25, epochs=3, batch_size=5, weight_decay=0.5, clip=None, optimizer="sgd", momentum=0.9)
    expected = {"lr": 0.25, "epochs": 3, "batch_size": 5, "weight_decay": 0.5, "clip": None, "optimizer": "sgd"}
    expected |= {"momentum": 0.9, "nesterov": False, "schedule": "constant", "lr_warmup": 0.0}
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


@pytest.mark.parametrize(
    "settings, factors",
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "cosine"}, [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
        ({"lr_warmup": 0.5}, [1 / 2, 1, 1, 1]),
        ({"schedule": "linear", "lr_warmup": 0.5}, [1 / 2, 1, 1, 1 / 2]),
        ({"schedule": "cosine", "lr_warmup": 1.0}, [1 / 4, 2 / 4, 3 / 4, 1]),
    ],
)
def test_schedules_by_hand(ctx: ClientContext, settings: dict[str, Any], factors: list[float]) -> None:
    """Four steps of SGD along a slope of 1: each goes its learning rate."""
    slope, start = objective_of(lambda tree, batch: tree["a"].sum()), {"a": torch.zeros(1)}
    asked = Training(slope, start, **SETTINGS | {"lr": 1.0, "batch_size": 15, "optimizer": "sgd"} | settings)
    assert [asked.scheduled(step, 4) for step in range(4)] == pytest.approx(factors)
    assert float(train(ctx, asked).parameters["a"]) == pytest.approx(-sum(factors))


# precision ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bf16(ctx: ClientContext) -> ClientContext:
    return dataclasses.replace(ctx, precision="bf16", meter=Meter(ctx.meter.counted))


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


def test_steps_in_bf16_are_counted_apart(ctx: ClientContext, bf16: ClientContext) -> None:
    start = ctx.task.fresh(FORM, 0)
    full = ctx.meter.cost(ctx, loss_in(ctx), clone(start), {})
    half = bf16.meter.cost(bf16, loss_in(bf16), clone(start), {})
    assert half.flops(8) == full.flops(8)
    assert 0.4 * full.activation_bytes(8) < half.activation_bytes(8) < 0.95 * full.activation_bytes(8)
    again = Meter(ctx.meter.counted).cost(ctx, loss_in(ctx), clone(start), {})
    assert again is full is not half


# the accounts ---------------------------------------------------------------------------------------------------------


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
    meter.cost(ctx, loss_in(ctx), {name: start[name] for name in list(start)[:-1]} | {"x": torch.zeros(1)}, {})
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
    chosen = subset(ctx.train, torch.tensor([5, 2]).numpy())
    assert torch.equal(chosen.labels, ctx.train.labels[[5, 2]])
    assert torch.equal(chosen.inputs["pixel_values"], ctx.train.inputs["pixel_values"][[5, 2]])
