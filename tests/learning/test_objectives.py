"""Objectives: which can be compared, how one of several is drawn, what is frozen, and the proximal term."""

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.algorithm import ClientContext
from fedsim.core.tree import Tree, sha256
from fedsim.learning.objectives import Frozen, Proximal, TaskLoss, identity
from fedsim.learning.task import Batch, Task
from fedsim.learning.training import Training
from tests.support.clients import local_train, objective_of
from tests.support.one_participant import CONFIG, FORM, SETTINGS, Square, loss_in, noted


pytestmark = pytest.mark.usefixtures("one_thread")


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
