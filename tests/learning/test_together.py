"""Participants computed together: the same as one by one, and nothing else than that."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as drawing
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from baselines.depthfl import DepthFL
from baselines.fedavg import FedAvg, fedprox
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate
from fedsim.core.seeding import torch_seeded
from fedsim.core.tree import Tree, clone
from fedsim.data.config import pydoc
from fedsim.learning.alike import Lift, Unlike, alike, filled, lifts
from fedsim.learning.stacked import attention
from fedsim.learning.task import Batch, TaskConfig, load_task, subset
from fedsim.learning.together import Tally, together
from fedsim.learning.training import Meter, Objective, StepCost, local_train, minimise
from fedsim.models import Form
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
    SIZES,
    SMALL,
    TARGET,
    UNLIKE,
    Federation,
    assert_same_bits,
    without_counting,
)


SLOW: dict[str, Any] = {"lr": 1e-3, "epochs": 2, "batch_size": 4}  # shards of 6, 12 and 18: 4, 6 and 10 steps
STEPS: dict[str, Any] = {"purpose": "target", "lr": 0.1, "epochs": 1, "batch_size": 4}  # 2, 3 and 5 steps


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


@pytest.fixture(autouse=True)
def _nobody_left_behind() -> Iterator[None]:
    before = {*threading.enumerate()}
    yield
    assert {*threading.enumerate()} <= before


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    without_counting(monkeypatch)


@pytest.fixture
def federation(uncounted: None) -> Federation:
    return Federation(FedAvg(**SLOW))


def apart(one: Tree, other: Tree, start: Mapping[str, Tensor]) -> float:
    """How far two trained trees lie apart, as a share of the way they came.

    A key's bias moves all scores of a query alike: its gradient is rounding, and AdamW scales it up.
    """
    assert list(one) == list(other)
    names = [name for name in one if not name.endswith("k_proj.bias")]
    between = math.sqrt(sum(float((one[n].double() - other[n].double()).square().sum()) for n in names))
    moved = math.sqrt(sum(float((one[n].double() - start[n].double()).square().sum()) for n in names))
    assert moved > 0
    return between / moved


def updates(federation: Federation, tally: Tally, round: int = 1) -> list[ClientUpdate]:
    """What three participants send, computed together."""
    found = together([functools.partial(federation.update, round, client) for client in range(3)], tally)
    return [update for update in found if isinstance(update, ClientUpdate)]


# the same as one by one -----------------------------------------------------------------------------------------------

GROWN = {"lr": 1e-3, "local_lr": 1e-3, "small_lr": 1e-3, "epochs": 2, "batch_size": 4}
STACKED: dict[str, tuple[Algorithm, Sequence[Form], int]] = {
    "fedavg": (FedAvg(**SLOW), UNLIKE, 3),
    "decay": (FedAvg(**dict(SLOW, batch_size=8), weight_decay=0.1, clip=0.05), UNLIKE, 3),
    "fedprox": (fedprox(mu=0.5, **SLOW), UNLIKE, 3),
    "heterofl": (HeteroFL(**SLOW), ALIKE, 3),
    "heterofl_clean": (heterofl_clean(**SLOW), ALIKE, 3),
    "fedrolex": (FedRolex(**SLOW), ALIKE, 3),
    "depthfl": (DepthFL(**SLOW), ALIKE, 3),
    "fedit": (fedit(**SLOW, rank=2), UNLIKE, 3),
    "ffa_lora": (ffa_lora(**SLOW, rank=2), UNLIKE, 3),
    "fedgrow": (FedGrow(**GROWN, small_epochs=1, local_epochs=1), ALIKE, 9),
    "fedgrow_joint": (FedGrowJoint(**GROWN, small_epochs=1), ALIKE, 6),
}


@pytest.mark.parametrize("name", STACKED)
def test_together_is_one_by_one_to_rounding(name: str, uncounted: None) -> None:
    algorithm, forms, trainings = STACKED[name]
    by_themselves, side_by_side, tally = Federation(algorithm, forms), Federation(algorithm, forms), Tally()
    starts = [by_themselves.payload(1, client) for client in range(3)]
    expected = [by_themselves.update(1, client) for client in range(3)]
    found = updates(side_by_side, tally)
    assert (tally.stacked, tally.alone, tally.reasons) == (trainings, 0, [])
    assert [(update.client, update.weight) for update in found] == [(u.client, u.weight) for u in expected]
    for client, (one, other) in enumerate(zip(expected, found, strict=True)):
        sent = {n: t for n, t in one.tree.items() if t.is_floating_point()}  # HeteroFL sends which rows it vouches for
        assert apart(sent, {n: other.tree[n] for n in sent}, starts[client]) < 1e-5
        assert one.tree.keys() == other.tree.keys()
        works = [meter.work for meter in (by_themselves.work[client], side_by_side.work[client])]
        for alone, stacked in zip(*works, strict=True):
            assert stacked == dataclasses.replace(alone, loss=stacked.loss)
            assert stacked.loss == pytest.approx(alone.loss, rel=1e-5)


def test_accounts_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[tuple, StepCost] = {}
    federation = Federation(FedAvg(of="smallest", **SLOW))
    contexts = [dataclasses.replace(federation.at_client(1, c), meter=Meter("", counted)) for c in range(3)]

    def trained(client: int) -> ClientUpdate:
        return federation.algorithm.client_update(federation.payload(1, client), {}, contexts[client])[0]

    for client in range(3):
        trained(client)
    tally = Tally()
    together([functools.partial(trained, client) for client in range(3)], tally)
    assert tally.stacked == 3
    (cost,) = counted.values()
    for size, context in zip(SIZES, contexts, strict=True):
        alone, stacked = context.meter.work
        assert stacked == dataclasses.replace(alone, loss=stacked.loss)
        assert stacked.flops == 2 * cost.flops(size) > 0, "no part of a plain model's cost is the step's own"
        assert stacked.steps == 2 * math.ceil(size / 4)


def test_private_state_is_trained_together_too(uncounted: None) -> None:
    """What it reads of its context, its form, is each participant's own, and here the same."""
    by_themselves, side_by_side = (Federation(LocalOnly(**SLOW), ALIKE) for _ in range(2))
    for federation in (by_themselves, side_by_side):
        for client in range(3):
            federation.state(client)
    starts = dict(by_themselves.private)
    for client in range(3):
        by_themselves.update(1, client)
    tally = Tally()
    updates(side_by_side, tally)
    assert (tally.stacked, tally.alone) == (3, 0)
    for client in range(3):
        assert apart(by_themselves.private[client], side_by_side.private[client], starts[client]) < 1e-5


def test_bf16_is_together_as_far_from_fp32_as_by_itself(federation: Federation) -> None:
    start = federation.payload(1, 0)

    def trained(client: int, precision: str) -> Tree:
        context = dataclasses.replace(federation.at_client(1, client), precision=precision)
        return federation.algorithm.client_update(start, {}, context)[0].tree

    tally = Tally()
    found = together([functools.partial(trained, client, "bf16") for client in range(3)], tally)
    assert tally.stacked == 3
    for client, half in enumerate(found):
        assert not isinstance(half, Exception)
        assert apart(trained(client, "bf16"), half, start) < 0.05
        assert 1e-3 < apart(trained(client, "fp32"), half, start) < 0.05


# steps, by hand -------------------------------------------------------------------------------------------------------


def slope(steepness: float | Tensor) -> Objective:
    """Falls by `steepness` a unit: AdamW goes `lr` a step."""
    return lambda tree, batch: (steepness * tree["x"]).sum()


def trained_by(
    federation: Federation, client: int, objective: Objective, start: Mapping[str, Tensor], **settings: Any
) -> Callable[[], Tree]:
    """A call that is one training."""
    return lambda: minimise(federation.at_client(1, client), [objective], start, **STEPS | settings)


def test_everyone_takes_its_own_steps(federation: Federation) -> None:
    """2, 3 and 5 steps of 0.1; captured slopes differ, and their signs."""
    slopes = [torch.tensor([1.0]), torch.tensor([-2.0]), torch.tensor([0.5])]
    starts = [{"x": torch.tensor([float(client)])} for client in range(3)]
    tally = Tally()
    found = together([trained_by(federation, c, slope(slopes[c]), starts[c]) for c in range(3)], tally)
    assert (tally.stacked, tally.passes) == (3, 3 + 3), "two last batches of two, one of four; and 1, 3 and 4 full ones"
    assert [float(tree["x"]) for tree in found if isinstance(tree, dict)] == pytest.approx([-0.2, 1.3, 1.5], rel=1e-6)


def test_each_is_clipped_by_its_own_norm(federation: Federation) -> None:
    """A gradient of (3000, 4000) beside one of (3, 4): clipped to 1e-7 they are alike, and AdamW's epsilon shows it."""
    slopes = [torch.tensor([3.0, 4.0]), torch.tensor([3000.0, 4000.0]), torch.tensor([0.03, 0.04])]
    start, tally = {"x": torch.zeros(2)}, Tally()
    calls = [trained_by(federation, c, slope(slopes[c]), start, clip=1e-7, batch_size=6) for c in range(3)]
    found = together(calls, tally)
    assert tally.stacked == 3
    for steps, tree in zip((1, 2, 3), found, strict=True):
        assert isinstance(tree, dict)
        # A step goes lr g / (|g| + 1e-8) for g = (0.6e-7, 0.8e-7).
        assert tree["x"].tolist() == pytest.approx([-0.1 * steps * 6 / 7, -0.1 * steps * 8 / 9], rel=1e-3)


def test_learning_rates_go_by_name_and_weights_decay(federation: Federation) -> None:
    """x <- x (1 - lr w) - lr, with lr 0.1 and 0.2 and w = 0.5."""
    start = {"b": torch.tensor([2.0]), "a": torch.tensor([2.0]), "c": torch.tensor([2.0])}
    objective: Objective = lambda tree, batch: torch.cat([*tree.values()]).sum()  # noqa: E731
    tally, settings = Tally(), {"lr_under": {"a": 0.2}, "weight_decay": 0.5, "batch_size": 18}
    found = together([trained_by(federation, c, objective, start, **settings) for c in (0, 1, 2)], tally)
    assert (tally.stacked, tally.passes) == (3, 3), "batches of 6, 12 and 18: none of one size"
    for tree in found:
        assert isinstance(tree, dict)
        assert [(name, pytest.approx(float(tensor), rel=1e-6)) for name, tensor in tree.items()] == [
            ("a", 2 * 0.9 - 0.2),
            ("b", 2 * 0.95 - 0.1),
            ("c", 2 * 0.95 - 0.1),
        ]


def test_what_is_not_read_stays(federation: Federation) -> None:
    start = {"x": torch.ones(1), "y": torch.tensor([0.1])}
    for decay, stacked in ((0.0, 3), (0.5, 0)):
        tally = Tally()
        calls = [trained_by(federation, c, slope(torch.ones(1)), start, weight_decay=decay) for c in range(3)]
        found = together(calls, tally)
        assert (tally.stacked, tally.alone) == (stacked, 3 - stacked)
        assert all(isinstance(tree, dict) and torch.equal(tree["y"], start["y"]) for tree in found)
    assert "y is not read" in tally.reasons[0]


def test_a_loss_that_is_not_finite_is_one_participants(federation: Federation) -> None:
    starts = [clone(federation.payload(1, client)) for client in range(3)]
    starts[1]["classifier.bias"][0] = float("nan")
    tally = Tally()

    def trained(client: int) -> ClientUpdate:
        return federation.algorithm.client_update(starts[client], {}, federation.at_client(1, client))[0]

    found = together([functools.partial(trained, client) for client in range(3)], tally)
    assert tally.stacked == 3
    assert not federation.work[1].work, "as by itself: what failed has no accounts"
    with pytest.raises(FloatingPointError) as alone:
        trained(1)
    assert isinstance(found[1], FloatingPointError) and str(found[1]) == str(alone.value)
    for client in (0, 2):
        update = found[client]
        assert isinstance(update, ClientUpdate)
        assert apart(trained(client).tree, update.tree, starts[client]) < 1e-5


# who is not stacked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, forms", [(FjORD(**LOCAL), ALIKE), (HeteroFL(**LOCAL), UNLIKE)])
def test_what_cannot_be_stacked_keeps_its_bits(algorithm: Algorithm, forms: Sequence[Form], uncounted: None) -> None:
    """Several objectives, or shapes that differ."""
    by_themselves, side_by_side, tally = Federation(algorithm, forms), Federation(algorithm, forms), Tally()
    expected = [by_themselves.update(1, client) for client in range(3)]
    found = updates(side_by_side, tally)
    assert (tally.stacked, tally.alone) == (0, 3)
    for one, other in zip(expected, found, strict=True):
        assert_same_bits(one.tree, other.tree)


def test_shapes_do_not_mix(uncounted: None) -> None:
    forms = (SMALL, TARGET, SMALL)
    by_themselves, side_by_side = (Federation(heterofl_clean(**SLOW), forms) for _ in range(2))
    starts = [by_themselves.payload(1, client) for client in range(3)]
    expected, tally = [by_themselves.update(1, client) for client in range(3)], Tally()
    found = updates(side_by_side, tally)
    assert (tally.stacked, tally.alone) == (2, 1)
    assert_same_bits(expected[1].tree, found[1].tree)
    for client in (0, 2):
        assert apart(expected[client].tree, found[client].tree, starts[client]) < 1e-5


def of_its_own(context: ClientContext) -> Objective:
    return lambda tree, batch: (tree["x"] * (1 + context.info.id)).sum()


def asking_for_a_number(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
    return tree["x"].square().sum() * float(tree["x"].detach().sum())


@pytest.mark.parametrize(
    "objectives, reason",
    [
        (lambda contexts: [slope(1.0 + context.info.id) for context in contexts], None),
        (lambda contexts: [of_its_own(context) for context in contexts], "Unlike: ClientInfo.id"),
        (lambda contexts: [asking_for_a_number] * 3, "RuntimeError"),
    ],
)
def test_objectives_that_are_not_one_function(
    objectives: Callable[[Sequence[ClientContext]], list[Objective]], reason: str | None, federation: Federation
) -> None:
    """They captured different numbers, or read what differs, or `vmap` cannot follow them."""
    chosen, start = objectives([federation.at_client(1, client) for client in range(3)]), {"x": torch.ones(2)}
    calls = [trained_by(federation, client, chosen[client], start) for client in range(3)]
    tally = Tally()
    found = together(calls, tally)
    assert (tally.stacked, tally.alone) == (0, 3)
    assert [text.startswith(reason) for text in tally.reasons] == [True] if reason else not tally.reasons
    for tree, call in zip(found, calls, strict=True):
        assert isinstance(tree, dict)
        assert_same_bits(tree, call())


def test_an_error_of_an_objective_is_each_ones_own(federation: Federation) -> None:
    """Two numbers are neither true nor false, though all participants have the same two."""
    objective: Objective = lambda tree, batch: tree["x"].sum() if tree["x"] else batch["labels"].sum()  # noqa: E731
    tally = Tally()
    found = together([trained_by(federation, c, objective, {"x": torch.ones(2)}) for c in range(3)], tally)
    assert (tally.stacked, tally.alone) == (0, 3)
    assert ["ambiguous" in str(error) for error in found if isinstance(error, RuntimeError)] == [True] * 3


def test_settings_do_not_mix(federation: Federation) -> None:
    start, tally = {"x": torch.ones(2)}, Tally()
    settings: list[dict[str, Any]] = [{}, {"lr": 0.2}, {"clip": 1.0}, {"weight_decay": 0.1}, {"batch_size": 3}, {}]
    found = together([trained_by(federation, 1, slope(torch.ones(2)), start, **each) for each in settings], tally)
    assert (tally.stacked, tally.alone) == (2, 4)
    for each, tree in zip(settings, found, strict=True):
        assert isinstance(tree, dict)
        alone = trained_by(federation, 1, slope(torch.ones(2)), start, **each)()
        torch.testing.assert_close(tree["x"], alone["x"], rtol=1e-6, atol=0)


# branches -------------------------------------------------------------------------------------------------------------


def test_models_may_ask_whether_a_mask_hides_anything(uncounted: None) -> None:
    """Of three participants one has padded texts: the ways of the three part in every step."""
    task = load_task(TaskConfig(pydoc(limit=24, max_length=8), family="gpt2"), None)
    assert task.dataset is not None
    shards = [subset(task.dataset.train, torch.arange(start, start + 8).numpy()) for start in (0, 8, 16)]
    for client, shard in enumerate(shards):
        shard.inputs["attention_mask"].fill_(1)[:, 8 - client // 2 * 3 :] = 0
    start, tally = task.fresh(SMALL, 0), Tally()

    def trained(client: int) -> Tree:
        info, shard = ClientInfo(client, "phone", SMALL, 8), shards[client]
        device, meter = torch.device("cpu"), Meter("", {})
        context = ClientContext(0, 1, task, SMALL, SMALL, info, shard, device, meter)
        forward = lambda tree, batch: context.task.forward(SMALL, tree, batch)  # noqa: E731
        return local_train(context, forward, start, purpose="target", lr=1e-3, epochs=1, batch_size=4)

    found = together([functools.partial(trained, client) for client in range(3)], tally)
    assert (tally.stacked, tally.passes) == (3, 4), "two steps, each in two parts"
    for client, tree in enumerate(found):
        assert isinstance(tree, dict)
        assert apart(trained(client), tree, start) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"enable_gqa": True},
        {"attn_mask": torch.tensor([[True, False, True], [True, True, False], [False, True, True]])},
    ],
)
def test_attention_is_torchs(fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 3, 5, generator=generator) for heads in (4, 2, 2))
    if "enable_gqa" not in fields:
        key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
    expected = F.scaled_dot_product_attention(query, key, value, **fields)
    torch.testing.assert_close(attention(query, key, value, **fields), expected)


# the baton ------------------------------------------------------------------------------------------------------------


@drawing(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trainings=st.lists(st.integers(0, 3), max_size=5))
def test_one_runs_at_a_time_in_order(trainings: list[int], federation: Federation) -> None:
    """Between two meetings each call runs once, in the order of the calls; results keep it too."""
    seen: list[tuple[int, int]] = []
    running: list[int] = []

    def call(number: int) -> int:
        for done in range(trainings[number] + 1):
            assert not running
            running.append(number)
            seen.append((done, number))
            running.clear()
            if done < trainings[number]:
                minimise(federation.at_client(1, 0), [slope(1.0)], {"x": torch.ones(1)}, **dict(STEPS, epochs=0))
        return number

    assert together([functools.partial(call, number) for number in range(len(trainings))]) == [*range(len(trainings))]
    assert seen == sorted(seen)
    assert len(seen) == sum(trainings) + len(trainings)


def test_a_call_that_raises_ends_alone(federation: Federation) -> None:
    start = {"x": torch.zeros(1)}

    def call(client: int) -> Tree:
        if client == 0:
            raise ValueError("before")
        trained = trained_by(federation, client, slope(torch.ones(1)), start)()
        if client == 1:
            raise KeyError("after")
        return trained

    tally = Tally()
    first, second, third = together([functools.partial(call, client) for client in range(3)], tally)
    assert isinstance(first, ValueError) and str(first) == "before"
    assert isinstance(second, KeyError)
    assert isinstance(third, dict) and float(third["x"]) == pytest.approx(-0.5)
    assert (tally.stacked, tally.alone) == (2, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["before", "after", "objective"])
def test_what_is_no_exception_ends_all(kind: type[BaseException], when: str, federation: Federation) -> None:
    ended: list[int] = []

    def interrupting(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
        raise kind

    def call(client: int) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(ended.append, client)
            if client == 1 and when == "before":
                raise kind
            objective = interrupting if client == 1 and when == "objective" else slope(1.0)
            trained_by(federation, client, objective, {"x": torch.ones(1)})()
            if client == 1 and when == "after":
                raise kind

    with pytest.raises(kind):
        together([functools.partial(call, client) for client in range(3)])
    begun = {"before": [1, 0], "after": [0, 1, 2], "objective": [0, 1, 2]}[when]
    assert ended == begun, "who has begun is unwound, one after another"


def test_an_interrupted_wait_leaves_nobody_running(federation: Federation) -> None:
    """Signals arrive in the thread that waits, while a call holds the baton."""
    ended: list[int] = []

    def call(client: int) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(ended.append, client)
            if client == 1:
                signal.raise_signal(signal.SIGINT)
            trained_by(federation, client, slope(1.0), {"x": torch.ones(1)})()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            together([functools.partial(call, client) for client in range(3)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [1, 0]


def test_the_global_stream_is_each_calls_own(federation: Federation) -> None:
    def call(client: int) -> list[float]:
        with torch_seeded(client):
            first = float(torch.rand(()))
            trained_by(federation, client, slope(1.0), {"x": torch.ones(1)})()
            return [first, float(torch.rand(()))]

    expected, calls = [call(client) for client in range(3)], [functools.partial(call, client) for client in range(3)]
    before = torch.get_rng_state()
    assert together(calls) == expected
    assert torch.equal(torch.get_rng_state(), before)


# what is alike --------------------------------------------------------------------------------------------------------


def both(one: Any, other: Any) -> Any:
    return alike([one, other])


def test_equal_values_are_the_first() -> None:
    one, other = ({"a": [1, (2.0, None)], "b": Form(8, 1, heads=2)} for _ in range(2))
    assert both(one, other) is one
    assert not lifts(both(one, other))


@pytest.mark.parametrize(
    "one, other",
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        ("a", "b"),
        ([1], [1, 1]),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1}, {1}),
        (float("nan"), float("nan")),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)),
        (None, torch.zeros(2)),
        (slope(1.0), slope(2.0)),
        (slope(1.0), lambda tree, batch: (1.0 * tree["x"]).sum()),
        (functools.partial(slope, 1.0), functools.partial(slope, steepness=1.0)),
    ],
)
def test_what_differs_is_unlike(one: Any, other: Any) -> None:
    if isinstance(one, float):
        one, other = float("nan"), -float("nan")  # two objects: what is one object is equal
    with pytest.raises(Unlike):
        both(one, other)


def test_a_value_that_holds_itself_is_unlike() -> None:
    one, other = [], []
    one.append(one)
    other.append(other)
    with pytest.raises(Unlike, match="holds itself"):
        both(one, other)


def test_tensors_get_a_place_each() -> None:
    """One tensor in two places is one; functions, methods and arguments are looked into."""

    def captured(a: Tensor, b: Tensor, factor: float) -> Callable[[Tensor], list[Tensor]]:
        def inner(x: Tensor, *, more: Tensor = b) -> Tensor:
            return factor * x * a + more

        return lambda x: [inner(x), inner(a), functools.partial(torch.add, b)(x)]

    (a, c), (b, d) = (torch.tensor([1.0]), torch.tensor([2.0])), (torch.tensor([10.0]), torch.tensor([20.0]))
    merged = both(captured(a, b, 3.0), captured(c, d, 3.0))
    places = lifts(merged)
    assert [[float(t) for t in lift.tensors] for lift in places] == [[1.0, 2.0], [10.0, 20.0]]
    for at, (one, two) in enumerate(((a, b), (c, d))):
        function = filled(merged, {lift: lift.tensors[at] for lift in places})
        x = torch.tensor([5.0])
        assert [float(t) for t in function(x)] == [float(t) for t in captured(one, two, 3.0)(x)]


@dataclasses.dataclass(frozen=True)
class Held:
    """Something that a closure may hold."""

    number: int
    tensor: Tensor
    name: str = "nobody"

    def scaled(self) -> Tensor:
        return self.number * self.tensor


def test_fields_may_differ_as_long_as_nobody_reads_them() -> None:
    one, other = Held(3, torch.tensor(1.0), "one"), Held(3, torch.tensor(2.0), "other")
    merged = both(one.scaled, other.scaled)
    (lift,) = lifts(merged)
    method = filled(merged, {lift: torch.tensor(7.0)})
    assert float(method()) == 21.0
    held = method.__self__
    assert isinstance(held, Held) and held.number == 3
    with pytest.raises(Unlike, match=r"Held\.name: 'one' is not the same"):
        held.name  # noqa: B018
    assert (one.name, other.name) == ("one", "other")


def test_some_types_are_never_looked_into() -> None:
    one, other = {"held": Held(1, torch.zeros(1))}, {"held": Held(1, torch.zeros(1))}
    assert isinstance(lifts(both(one, other))[0], Lift)
    with pytest.raises(Unlike, match="each participant's own"):
        alike([one, other], (Held,))
