"""Trainings of several clients in one batch: the same as one by one, and nothing else than that."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.depthfl import DepthFL
from baselines.fedavg import FedAvg, fedprox
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.fused import FedGrowFused
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.matched import FedGrowMatched
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate
from fedsim.core.tree import Tree, clone, flat
from fedsim.data.config import pydoc
from fedsim.learning.batched import Tally
from fedsim.learning.meter import Meter, StepCost
from fedsim.learning.objectives import Frozen, Objective, Proximal, TaskLoss
from fedsim.learning.steps import Asking, asking, run_alone, run_batched
from fedsim.learning.task import Batch, TaskConfig, load_task
from fedsim.learning.training import Training
from fedsim.models import Form
from tests.support.clients import client_update
from tests.support.family_rows import FAMILIES
from tests.support.small_federation import ALIKE, LOCAL, SIZES, SMALL, TARGET, UNLIKE, Federation, assert_same_bits
from tests.support.small_trainings import SLOW, Slope, Sum, training


pytestmark = pytest.mark.usefixtures("one_thread")


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
    """What three participants send, computed in a batch."""
    found = run_batched([functools.partial(federation.updating, round, client) for client in range(3)], tally)
    return [update for update in found if isinstance(update, ClientUpdate)]


# the same as one by one -----------------------------------------------------------------------------------------------


GROWN = {"lr": 1e-3, "local_lr": 1e-3, "small_lr": 1e-3, "epochs": 2, "batch_size": 4}
BATCHED: dict[str, tuple[Algorithm, Sequence[Form], int]] = {
    "fedavg": (FedAvg(**SLOW), UNLIKE, 3),
    "decay": (FedAvg(**dict(SLOW, batch_size=8), weight_decay=0.1, clip=0.05), UNLIKE, 3),
    "sgd": (FedAvg(**dict(SLOW, lr=0.1), optimizer="sgd", momentum=0.9, weight_decay=0.01), UNLIKE, 3),
    "cosine": (FedAvg(**SLOW, schedule="cosine", lr_warmup=0.3), UNLIKE, 3),
    "fedprox": (fedprox(mu=0.5, **SLOW), UNLIKE, 3),
    "heterofl": (HeteroFL(**SLOW), ALIKE, 3),
    "heterofl_clean": (heterofl_clean(**SLOW), ALIKE, 3),
    "fedrolex": (FedRolex(**SLOW), ALIKE, 3),
    "federated_dropout": (FederatedDropout(**SLOW), ALIKE, 3),
    "depthfl": (DepthFL(**SLOW), ALIKE, 3),
    "fedit": (fedit(**SLOW, rank=2), UNLIKE, 3),
    "ffa_lora": (ffa_lora(**SLOW, rank=2), UNLIKE, 3),
    "fedgrow": (FedGrow(**GROWN, small_epochs=1, local_epochs=1), ALIKE, 9),
    "fedgrow_matched": (FedGrowMatched(**GROWN, small_epochs=1, local_epochs=1), ALIKE, 9),
    "fedgrow_residual": (FedGrowResidual(**GROWN, small_epochs=1, local_epochs=1), ALIKE, 9),
    "fedgrow_joint": (FedGrowJoint(**GROWN, small_epochs=1), ALIKE, 6),
    "fedgrow_fused": (FedGrowFused(**GROWN, small_epochs=1, local_epochs=1), ALIKE, 9),
    # By SGD: where growth only copied, gradients are rounding, which AdamW scales up.
    "fedgrow_core": (FedGrowCore(**dict(SLOW, lr=0.1), optimizer="sgd", rank=2), UNLIKE, 3),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_one_by_one_to_rounding(name: str, uncounted: None) -> None:
    algorithm, forms, trainings = BATCHED[name]
    by_themselves, in_a_batch, tally = Federation(algorithm, forms), Federation(algorithm, forms), Tally()
    starts = [by_themselves.payload(1, client) for client in range(3)]
    expected = [by_themselves.update(1, client) for client in range(3)]
    found = updates(in_a_batch, tally)
    assert (tally.batched, tally.alone, tally.reasons) == (trainings, 0, [])
    assert [(update.client, update.weight) for update in found] == [(u.client, u.weight) for u in expected]
    for client, (one, other) in enumerate(zip(expected, found, strict=True)):
        tree, same = flat(one.tree), flat(other.tree)
        sent = {n: t for n, t in tree.items() if t.is_floating_point()}  # HeteroFL sends which rows it vouches for
        assert apart(sent, {n: same[n] for n in sent}, flat(starts[client])) < 1e-5
        assert tree.keys() == same.keys()
        works = [meter.work for meter in (by_themselves.work[client], in_a_batch.work[client])]
        for alone, batched in zip(*works, strict=True):
            assert batched == dataclasses.replace(alone, loss=batched.loss)
            assert batched.loss == pytest.approx(alone.loss, rel=1e-5)


def test_accounts_are_those_of_each() -> None:
    counted: dict[tuple, StepCost] = {}
    federation = Federation(FedAvg(of="smallest", **SLOW))
    contexts = [dataclasses.replace(federation.at_client(1, c), meter=Meter(counted)) for c in range(3)]
    starts = [federation.payload(1, client) for client in range(3)]
    for client in range(3):
        client_update(federation.algorithm, starts[client], {}, contexts[client])

    def updating(client: int) -> Asking[Any]:
        context = contexts[client]
        return asking(context, federation.algorithm.client_update(starts[client], {}, context))

    tally = Tally()
    run_batched([functools.partial(updating, client) for client in range(3)], tally)
    assert tally.batched == 3
    (cost,) = counted.values()
    for size, context in zip(SIZES, contexts, strict=True):
        alone, batched = context.meter.work
        assert batched == dataclasses.replace(alone, loss=batched.loss)
        assert batched.flops == 2 * cost.flops(size) > 0, "no part of a plain model's cost is the step's own"
        assert batched.steps == 2 * math.ceil(size / 4)


def test_private_state_is_trained_in_a_batch_too(uncounted: None) -> None:
    by_themselves, in_a_batch = (Federation(LocalOnly(**SLOW), ALIKE) for _ in range(2))
    for federation in (by_themselves, in_a_batch):
        for client in range(3):
            federation.state(client)
    starts = dict(by_themselves.private)
    for client in range(3):
        by_themselves.update(1, client)
    tally = Tally()
    updates(in_a_batch, tally)
    assert (tally.batched, tally.alone) == (3, 0)
    for client in range(3):
        assert apart(by_themselves.private[client], in_a_batch.private[client], starts[client]) < 1e-5


def test_bf16_is_in_a_batch_as_far_from_fp32_as_by_itself(federation: Federation) -> None:
    start = federation.payload(1, 0)

    def context(client: int, precision: str) -> ClientContext:
        return dataclasses.replace(federation.at_client(1, client), precision=precision)

    def trained(client: int, precision: str) -> Tree:
        return client_update(federation.algorithm, start, {}, context(client, precision))[0].tree

    def updating(client: int) -> Asking[Any]:
        half = context(client, "bf16")
        return asking(half, federation.algorithm.client_update(start, {}, half))

    tally = Tally()
    found = run_batched([functools.partial(updating, client) for client in range(3)], tally)
    assert tally.batched == 3
    for client, outcome in enumerate(found):
        assert not isinstance(outcome, Exception)
        half = outcome[0].tree
        assert apart(trained(client, "bf16"), half, start) < 0.05
        assert 1e-3 < apart(trained(client, "fp32"), half, start) < 0.05


# steps, by hand -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Silent:
    """Its factor is left out by `==`."""

    factor: float = dataclasses.field(compare=False)

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return self.factor * parameters["x"].square().sum()


@dataclasses.dataclass(frozen=True)
class Present:
    """Reads which names there are, and bits."""

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        sign = 1.0 if "empty" in frozen else -1.0
        return (sign * (~frozen["hidden"]) * parameters["x"]).sum()


def test_everyone_takes_its_own_steps(federation: Federation) -> None:
    """2, 3 and 5 steps of 0.1; frozen slopes differ, and their signs."""
    slopes = [torch.tensor([1.0]), torch.tensor([-2.0]), torch.tensor([0.5])]
    starts = [{"x": torch.tensor([float(client)])} for client in range(3)]
    tally = Tally()
    found = run_batched([training(federation, c, Slope(), starts[c], {"slope": slopes[c]}) for c in range(3)], tally)
    assert (tally.batched, tally.passes) == (3, 3 + 3), "two last batches of two, one of four; and 1, 3 and 4 full ones"
    assert [float(tree["x"]) for tree in found if isinstance(tree, dict)] == pytest.approx([-0.2, 1.3, 1.5], rel=1e-6)


def test_everyone_has_its_own_place_in_a_schedule(federation: Federation) -> None:
    """SGD down a slope of 1, to 0 along a line: n steps go 0.1 (1 + ... + 1/n)."""
    settings: dict[str, Any] = {"optimizer": "sgd", "schedule": "linear"}
    tally, start = Tally(), {"x": torch.zeros(1)}
    found = run_batched([training(federation, c, Slope(), start, **settings) for c in range(3)], tally)
    assert tally.batched == 3
    for steps, tree in zip((2, 3, 5), found, strict=True):
        assert isinstance(tree, dict) and float(tree["x"]) == pytest.approx(-0.1 * (steps + 1) / 2, rel=1e-6)


def test_each_is_clipped_by_its_own_norm(federation: Federation) -> None:
    """A gradient of (3000, 4000) beside one of (3, 4): clipped to 1e-7 they are alike, and AdamW's epsilon shows it."""
    slopes = [torch.tensor([3.0, 4.0]), torch.tensor([3000.0, 4000.0]), torch.tensor([0.03, 0.04])]
    start, tally, settings = {"x": torch.zeros(2)}, Tally(), {"clip": 1e-7, "batch_size": 6}
    found = run_batched(
        [training(federation, c, Slope(), start, {"slope": slopes[c]}, **settings) for c in range(3)], tally
    )
    assert tally.batched == 3
    for steps, tree in zip((1, 2, 3), found, strict=True):
        assert isinstance(tree, dict)
        # A step goes lr g / (|g| + 1e-8) for g = (0.6e-7, 0.8e-7).
        assert tree["x"].tolist() == pytest.approx([-0.1 * steps * 6 / 7, -0.1 * steps * 8 / 9], rel=1e-3)


def test_learning_rates_go_by_name_and_weights_decay(federation: Federation) -> None:
    """x <- x (1 - lr w) - lr, with lr 0.1 and 0.2 and w = 0.5."""
    start = {"b": torch.tensor([2.0]), "fast": {"a": torch.tensor([2.0])}, "c": torch.tensor([2.0])}
    tally, settings = Tally(), {"lr_of": {"fast": 0.2}, "weight_decay": 0.5, "batch_size": 18}
    found = run_batched([training(federation, c, Sum(), start, **settings) for c in (0, 1, 2)], tally)
    assert (tally.batched, tally.passes) == (3, 3), "batches of 6, 12 and 18: none of one size"
    for tree in found:
        assert isinstance(tree, dict)
        assert [(name, pytest.approx(float(tensor), rel=1e-6)) for name, tensor in flat(tree, ".").items()] == [
            ("b", 2 * 0.95 - 0.1),
            ("c", 2 * 0.95 - 0.1),
            ("fast.a", 2 * 0.9 - 0.2),
        ]


def test_what_is_not_read_stays(federation: Federation) -> None:
    start = {"x": torch.ones(1), "y": torch.tensor([0.1])}
    for decay, batched in ((0.0, 3), (0.5, 0)):
        tally = Tally()
        found = run_batched([training(federation, c, Slope(), start, weight_decay=decay) for c in range(3)], tally)
        assert (tally.batched, tally.alone) == (batched, 3 - batched)
        assert all(isinstance(tree, dict) and torch.equal(tree["y"], start["y"]) for tree in found)
    assert "y is not read" in tally.reasons[0]


def test_a_loss_that_is_not_finite_is_one_clients(federation: Federation) -> None:
    starts = [clone(federation.payload(1, client)) for client in range(3)]
    starts[1]["classifier.bias"][0] = float("nan")
    objective, tally = TaskLoss(federation.task, TARGET), Tally()
    calls = [training(federation, c, objective, starts[c], **SLOW) for c in range(3)]
    found = run_batched(calls, tally)
    assert tally.batched == 3
    assert not federation.work[1].work, "as by itself: what failed has no accounts"
    with pytest.raises(FloatingPointError) as alone:
        run_alone(calls[1]())
    assert isinstance(found[1], FloatingPointError) and str(found[1]) == str(alone.value)
    for client in (0, 2):
        tree = found[client]
        assert isinstance(tree, dict)
        assert apart(run_alone(calls[client]()), tree, starts[client]) < 1e-5


# who is not in a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, forms", [(FjORD(**LOCAL), ALIKE), (HeteroFL(**LOCAL), UNLIKE)])
def test_what_is_not_equal_keeps_its_bits(algorithm: Algorithm, forms: Sequence[Form], uncounted: None) -> None:
    """Several objectives, or shapes that differ."""
    by_themselves, in_a_batch, tally = Federation(algorithm, forms), Federation(algorithm, forms), Tally()
    expected = [by_themselves.update(1, client) for client in range(3)]
    found = updates(in_a_batch, tally)
    assert (tally.batched, tally.alone) == (0, 3)
    for one, other in zip(expected, found, strict=True):
        assert_same_bits(one.tree, other.tree)


def test_shapes_do_not_mix(uncounted: None) -> None:
    forms = (SMALL, TARGET, SMALL)
    by_themselves, in_a_batch = (Federation(heterofl_clean(**SLOW), forms) for _ in range(2))
    starts = [by_themselves.payload(1, client) for client in range(3)]
    expected, tally = [by_themselves.update(1, client) for client in range(3)], Tally()
    found = updates(in_a_batch, tally)
    assert (tally.batched, tally.alone) == (2, 1)
    assert_same_bits(expected[1].tree, found[1].tree)
    for client in (0, 2):
        assert apart(expected[client].tree, found[client].tree, starts[client]) < 1e-5


@dataclasses.dataclass(frozen=True)
class AskingForANumber:
    """`vmap` cannot follow what happens to it."""

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return parameters["x"].square().sum() * float(parameters["x"].detach().sum())


@pytest.mark.parametrize(
    "objectives, reason",
    [
        ([Slope(1.0), Slope(2.0), Slope(3.0)], None),
        ([Slope(1), Slope(1.0), Slope(True)], None),
        ([Silent(1.0), Silent(2.0), Silent(3.0)], None),
        ([Slope(), Proximal(Slope(), 0.0), Sum()], None),
        ([AskingForANumber()] * 3, "RuntimeError"),
    ],
)
def test_different_objectives_are_never_merged(
    objectives: list[Objective], reason: str | None, federation: Federation
) -> None:
    """Nor are equal ones that cannot be: each then keeps the bits that it has by itself."""
    start = {"x": torch.ones(2)}
    calls = [training(federation, c, objectives[c], start, {"anchor": {"x": torch.zeros(2)}}) for c in range(3)]
    tally = Tally()
    found = run_batched(calls, tally)
    assert (tally.batched, tally.alone) == (0, 3)
    assert [text.startswith(reason) for text in tally.reasons] == [True] if reason else not tally.reasons
    for tree, call in zip(found, calls, strict=True):
        assert isinstance(tree, dict)
        assert_same_bits(tree, run_alone(call()))


@dataclasses.dataclass(frozen=True)
class Ambiguous:
    """Two numbers are neither true nor false."""

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return parameters["x"].sum() if parameters["x"] else batch["labels"].sum()


def test_an_error_of_an_objective_is_each_ones_own(federation: Federation) -> None:
    tally = Tally()
    found = run_batched([training(federation, c, Ambiguous(), {"x": torch.ones(2)}) for c in range(3)], tally)
    assert (tally.batched, tally.alone) == (0, 3)
    assert ["ambiguous" in str(error) for error in found if isinstance(error, RuntimeError)] == [True] * 3


@pytest.mark.parametrize(
    "other",
    [
        {"lr": 0.2},
        {"clip": 1.0},
        {"weight_decay": 0.1},
        {"batch_size": 3},
        {"optimizer": "sgd"},
        {"schedule": "cosine"},
        {"lr_warmup": 0.5},
        {"frozen": {"slope": torch.ones(1)}},
        {"frozen": {"inner": {"slope": torch.ones(2)}}},
        {"frozen": {"slope": torch.ones(2, dtype=torch.float64)}},
    ],
)
def test_settings_do_not_mix(other: dict[str, Any], federation: Federation) -> None:
    start, tally = {"x": torch.ones(2)}, Tally()
    settings: list[dict[str, Any]] = [{"frozen": {"slope": torch.ones(2)}} | each for each in ({}, other, {})]
    calls = [training(federation, 1, Slope(), start, **each) for each in settings]
    found = run_batched(calls, tally)
    assert (tally.batched, tally.alone) == (2, 1)
    for call, tree in zip(calls, found, strict=True):
        assert isinstance(tree, dict)
        torch.testing.assert_close(tree["x"], run_alone(call())["x"], rtol=1e-6, atol=0)


def test_empty_trees_stay_and_types_do_not_mix(federation: Federation) -> None:
    start, bits, numbers = {"x": torch.ones(2)}, torch.tensor([True, False]), torch.tensor([1, 0])
    trees = [{"empty": {}, "hidden": hidden} for hidden in (bits, numbers, bits)]
    calls, tally = [training(federation, 1, Present(), start, tree) for tree in trees], Tally()
    found = run_batched(calls, tally)
    assert (tally.batched, tally.alone, tally.reasons) == (2, 1, [])
    for tree, call in zip(found, calls, strict=True):
        assert isinstance(tree, dict)
        torch.testing.assert_close(tree["x"], run_alone(call())["x"], rtol=1e-6, atol=0)


# models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name, d in FAMILIES.items() if d.data.keys() & {"lm", "mlm"}])
def test_models_may_ask_whether_a_mask_hides_anything(family: str, uncounted: None) -> None:
    """Of three clients one has padded texts: alone, a model does without a mask where it hides nothing."""
    described = FAMILIES[family]
    data = pydoc(limit=24, max_length=8, objective="next_token" if "lm" in described.data else "masked_token")
    task = load_task(TaskConfig(data, described.module or family, settings=described.settings), None)
    assert task.dataset is not None
    shards = [task.dataset.train.select(torch.arange(start, start + 8).numpy()) for start in (0, 8, 16)]
    for client, shard in enumerate(shards):
        shard.inputs["attention_mask"].fill_(1)[:, 8 - client // 2 * 3 :] = 0
    start, tally = task.fresh(SMALL, 0), Tally()

    def call(client: int) -> Asking[Tree]:
        info, device = ClientInfo(client, "phone", SMALL, 8), torch.device("cpu")
        context = ClientContext(0, 1, task, SMALL, SMALL, info, shards[client], device, Meter({}))
        settings: dict[str, Any] = {"purpose": "target", "lr": 1e-3, "epochs": 1, "batch_size": 4}
        trained = yield context, Training(TaskLoss(task, SMALL), start, **settings)
        return trained.parameters

    found = run_batched([functools.partial(call, client) for client in range(3)], tally)
    assert (tally.batched, tally.passes, tally.reasons) == (3, 2, [])
    for client, tree in enumerate(found):
        assert isinstance(tree, dict)
        assert apart(run_alone(call(client)), tree, start) < 1e-4
