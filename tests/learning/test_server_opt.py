"""Server optimisers against steps computed on paper, and what they must leave alone."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines.depthfl import DepthFL
from baselines.ensemble_small import EnsembleSmall
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.lora import fedit, ffa_lora, hetlora
from baselines.progfed import ProgFed
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.canonical import canonical, revived
from fedsim.core.tree import State, Tree, clone, flat, nbytes, ordered, tensors
from fedsim.learning.server_opt import M, ServerOptimizer, V, model_of
from fedsim.models import Form
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    distance,
    drawn_like,
)


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")


def scalar(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


# Differences between the mean and the model in three rounds, and the model after each, from Reddi et al.'s Algorithm 2.
# They are chosen so that every square root is a fraction. The model starts at 1.
STEPS: dict[str, tuple[ServerOptimizer, list[float], list[float]]] = {
    # m = 1, 1/2 + 1/2 = 1, 1/2 - 1 = -1/2;  x = 1 + 2, 3 + 2, 5 - 1
    "avgm": (ServerOptimizer("avgm", lr=2.0, beta1=0.5), [1.0, 0.5, -1.0], [3.0, 5.0, 4.0]),
    # v = 1 + 9/16 = (5/4)^2, (5/4)^2 + 3^2 = (13/4)^2, (13/4)^2 + 7.8^2 = 8.45^2;  steps 2 d / (sqrt(v) + 1)
    "adagrad": (
        ServerOptimizer("adagrad", lr=2.0, tau=1.0),
        [0.75, 3.0, 7.8],
        [1 + 2 / 3, 1 + 2 / 3 + 24 / 17, 1 + 2 / 3 + 24 / 17 + 104 / 63],
    ),
    # m = 1/2, 13/8, 39/64;  v = 3/4 + 1/4 = 1, 3/4 + 121/64 = (13/8)^2, (91/64)^2;  steps 2 m / (sqrt(v) + 1)
    "adam": (
        ServerOptimizer("adam", lr=2.0, beta1=0.5, beta2=0.75, tau=1.0),
        [1.0, 2.75, -13 / 32],
        [1.5, 1.5 + 26 / 21, 1.5 + 26 / 21 + 78 / 155],
    ),
    # d^2 = 2.25 > v = 1, so v = 1 + 2.25/4 = 1.25^2;  0.49 < v, so v = 1.5625 - 0.49/4 = 1.2^2;
    # 3.24 > v, so v = 1.44 + 3.24/4 = 1.5^2;  m = 0.75, 0.725, 1.2625
    "yogi": (
        ServerOptimizer("yogi", lr=2.0, beta1=0.5, beta2=0.75, tau=1.0),
        [1.5, 0.7, 1.8],
        [1 + 2 / 3, 1 + 2 / 3 + 29 / 44, 1 + 2 / 3 + 29 / 44 + 1.01],
    ),
}
ADAPTIVE = ("adagrad", "adam", "yogi")


@pytest.mark.parametrize("kind", STEPS)
def test_three_steps_on_paper(kind: str) -> None:
    optimizer, differences, expected = STEPS[kind]
    assert optimizer.kind == kind
    state = optimizer.start({"x": scalar(1.0)})
    for difference, after in zip(differences, expected, strict=True):
        state = ordered(optimizer.step(state, {"x": state["x"] + difference}))
        assert float(state["x"]) == pytest.approx(after, rel=1e-12)


def test_second_moments_of_adam_and_yogi_part_where_a_difference_is_small() -> None:
    """Yogi forgets additively: a v of 1 that meets d = 1/2 loses d^2 / 4 = 1/16 and not (1 - d^2) / 4 = 3/16."""
    for kind, v in (("adam", 13 / 16), ("yogi", 15 / 16)):
        optimizer = ServerOptimizer(kind, beta1=0.0, beta2=0.75, tau=1.0)  # type: ignore[arg-type]
        state = optimizer.step(optimizer.start({"x": scalar(0.0)}), {"x": scalar(0.5)})
        assert float(state[V]["x"]) == v


def test_first_moments_are_damped_but_for_avgm() -> None:
    for kind, m in (("avgm", 1.0), ("adam", 0.25), ("yogi", 0.25)):
        optimizer = ServerOptimizer(kind, beta1=0.75)  # type: ignore[arg-type]
        state = optimizer.step(optimizer.start({"x": scalar(0.0)}), {"x": scalar(1.0)})
        assert float(state[M]["x"]) == m


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_what_a_state_starts_as(kind: str, tau: float) -> None:
    model = {"x": scalar(3.0), "y": torch.ones(2, 3)}
    state = ServerOptimizer(kind, tau=tau).start(model)  # type: ignore[arg-type]
    assert_same_bits(model_of(state), model)
    assert {*state} - {*model} == ({V} if kind == "adagrad" else {M, V})
    assert all({*state[part]} == {"x", "y"} for part in {*state} - {*model})
    assert float(state[V]["x"]) == tau**2
    assert state[V]["y"].shape == (2, 3) and state[V]["y"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["average", *STEPS])
def test_a_mean_that_is_the_model_leaves_it_as_it_is(kind: str) -> None:
    optimizer = ServerOptimizer(kind)  # type: ignore[arg-type]
    model = drawn_like({"x": torch.zeros(3, 4), "y": torch.zeros(5)}, seed=0)
    assert_same_bits(model_of(optimizer.step(optimizer.start(model), model)), model)


def test_momentum_goes_on_where_the_mean_stays() -> None:
    """After d = 1 and then 0: m = 1, 1/2, so the model goes on to 1 + 1/2."""
    optimizer = ServerOptimizer("avgm", beta1=0.5)
    state = optimizer.step(optimizer.start({"x": scalar(0.0)}), {"x": scalar(1.0)})
    assert float(optimizer.step(state, model_of(state))["x"]) == 1.5


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.sampled_from(ADAPTIVE))
def test_no_scalar_moves_further_than_the_rate_allows(differences: list[float], kind: str) -> None:
    """Without a first moment m is d, and v is at least (1 - beta2) d^2 once it has met d: a step is at most 2 lr."""
    optimizer = ServerOptimizer(kind, lr=0.1, beta1=0.0, beta2=0.75, tau=1e-3)  # type: ignore[arg-type]
    state = optimizer.start({"x": scalar(0.0)})
    for difference in differences:
        before = state["x"]
        state = optimizer.step(state, {"x": before + difference})
        assert float((state["x"] - before).abs()) <= 0.2 + 1e-12
        assert float(state[V]["x"]) > 0


@pytest.mark.parametrize("kind", STEPS)
def test_scalars_do_not_know_each_other(kind: str) -> None:
    optimizer = STEPS[kind][0]
    model = drawn_like({"x": torch.zeros(2, 3, dtype=torch.float64), "y": torch.zeros(4, dtype=torch.float64)}, seed=1)
    means = [drawn_like(model, seed) for seed in (2, 3, 4)]
    state, alone = optimizer.start(model), optimizer.start({"x": model["x"][1, 2:]})
    for drawn in means:
        state = optimizer.step(state, drawn)
        alone = optimizer.step(alone, {"x": drawn["x"][1, 2:]})
    assert torch.equal(state["x"][1, 2:], alone["x"])


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_writes_into_nothing(kind: str) -> None:
    optimizer = STEPS[kind][0]
    state = optimizer.start({"x": scalar(1.0)})
    state = optimizer.step(state, {"x": scalar(2.0)})
    before, target = clone(state), {"x": scalar(5.0)}
    after = optimizer.step(state, target)
    for tensor in tensors(after):
        tensor.fill_(7.0)
    assert_same_bits(state, before)
    assert float(target["x"]) == 5.0


# in a federation ------------------------------------------------------------------------------------------------------


def fedavg(**server: Any) -> FedAvg:
    return FedAvg(**LOCAL, server=ServerOptimizer(**server))


def after_rounds(algorithm: FedAvg, rounds: int = 2) -> Tree:
    federation = Federation(algorithm)
    for round in range(1, rounds + 1):
        federation.run(round)
    return federation.server


def test_average_is_fedavg_bit_by_bit() -> None:
    assert_same_bits(after_rounds(fedavg(kind="average")), after_rounds(FedAvg(**LOCAL)))


def test_momentum_of_none_at_rate_one_is_fedavg() -> None:
    plain = after_rounds(FedAvg(**LOCAL), rounds=1)
    without = model_of(after_rounds(fedavg(kind="avgm", beta1=0.0, lr=1.0), rounds=1))
    assert_close(without, plain, atol=1e-6)
    half = model_of(after_rounds(fedavg(kind="avgm", beta1=0.0, lr=0.5), rounds=1))
    with pytest.raises(AssertionError):
        assert_close(half, plain, atol=1e-4)


def test_momentum_shows_from_the_second_round_on() -> None:
    for rounds, same in ((1, True), (2, False)):
        plain = model_of(after_rounds(fedavg(kind="avgm", beta1=0.0), rounds))
        heavy = model_of(after_rounds(fedavg(kind="avgm", beta1=0.9), rounds))
        assert all(torch.equal(plain[name], heavy[name]) for name in plain) == same


@pytest.mark.parametrize("kind", STEPS)
def test_a_round_is_the_step_of_the_mean(kind: str) -> None:
    optimizer = dataclasses.replace(STEPS[kind][0], lr=0.1)
    federation = Federation(FedAvg(**LOCAL, server=optimizer))
    model = model_of(federation.server)
    trees = [drawn_like(model, seed) for seed in (1, 2)]
    for _ in range(2):
        before = federation.server
        mean = {name: (trees[0][name].double() + 3 * trees[1][name].double()) / 4 for name in model}
        federation.server = federation.aggregate(
            1, [ClientUpdate(id_, tree, weight) for id_, tree, weight in zip((0, 1), trees, (1, 3), strict=True)]
        )
        expected = optimizer.step(before, {name: tensor.float() for name, tensor in mean.items()})
        assert_same_bits(federation.server, expected)


@pytest.mark.parametrize("kind", STEPS)
def test_moments_stay_at_the_server(kind: str) -> None:
    federation = Federation(fedavg(kind=kind, lr=0.1))
    federation.run(1)
    plain = Federation(FedAvg(**LOCAL))
    assert not [name for name in federation.payload(2, 0) if name in (M, V)]
    assert nbytes(federation.payload(2, 0)) == nbytes(plain.payload(2, 0)) < nbytes(federation.server)
    assert {name for name, _ in federation.served(1).named_parameters()} == {*plain.server}


@pytest.mark.parametrize("kind", ["average", *STEPS])
def test_where_nobody_arrives_not_even_momentum_goes_on(kind: str) -> None:
    federation = Federation(fedavg(kind=kind))
    federation.run(1)
    assert_same_bits(federation.aggregate(2, []), federation.server)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"kind": "sgd"}, "algorithm.server.kind='sgd'"),
        ({"kind": "average", "lr": 0.5}, "algorithm.server.lr=0.5"),
        ({"kind": "adam", "lr": 0.0}, "algorithm.server.lr=0.0"),
        ({"kind": "adam", "beta1": 1.0}, "algorithm.server.beta1=1.0: must be less than 1"),
        ({"kind": "yogi", "beta2": -0.1}, "algorithm.server.beta2=-0.1"),
        ({"kind": "adagrad", "tau": 0.0}, "algorithm.server.tau=0.0"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerOptimizer(**fields)
    assert named in str(error.value)


# in every method that averages ----------------------------------------------------------------------------------------

METHODS: dict[str, Algorithm] = {
    "fedavg": FedAvg(**LOCAL),
    "exclusive": Exclusive(**LOCAL, share=0.3, small_epochs=1),
    "ensemble_small": EnsembleSmall(**LOCAL, members=2),
    "grow_then_fedavg": GrowThenFedAvg(**LOCAL, small_rounds=1),
    "progfed": ProgFed(**LOCAL, stages=2, stage_rounds=1),
    "depthfl": DepthFL(**LOCAL, exits=2),
    "heterofl": HeteroFL(**LOCAL),
    "heterofl_clean": heterofl_clean(**LOCAL),
    "fedrolex": FedRolex(**LOCAL),
    "fjord": FjORD(**LOCAL),
    "federated_dropout": FederatedDropout(**LOCAL),
    "fedbrb_like": FedBRBLike(**LOCAL, broadcast=0.0),
    "fedit": fedit(**LOCAL, rank=2),
    "ffa_lora": ffa_lora(**LOCAL, rank=2),
    "hetlora": hetlora(**LOCAL, rank=4),
    "fedgrow": FedGrow(**LOCAL, small_epochs=1, local_epochs=1),
    "fedgrow_residual": FedGrowResidual(**LOCAL, small_epochs=1, local_epochs=1),
    "fedgrow_joint": FedGrowJoint(**LOCAL, small_epochs=1, local_lr=1e-2),
}
ROLLS = ("fedrolex", "federated_dropout", "fedbrb_like")  # what is sent in round 2 is not what was in round 1


def forms_of(name: str) -> tuple[Form, ...]:
    return ALIKE if name.startswith("fedgrow") else UNLIKE


def served_by(name: str, rounds: int, **server: Any) -> Federation:
    algorithm = dataclasses.replace(METHODS[name], server=ServerOptimizer(**server))  # type: ignore[call-arg]
    federation = Federation(algorithm, forms_of(name))
    for round in range(1, rounds + 1):
        federation.run(round)
    return federation


def floats(state: State) -> Tree:
    """What a server holds beside its moments and its notes."""
    held = {name: t for name, t in flat(state, ".").items() if "server_m." not in name and "server_v." not in name}
    return {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_averages_may_have_one(name: str) -> None:
    """Without momentum and at a rate of 1 FedAvgM is the method as it is; at half the rate it goes half the way."""
    start, plain = floats(served_by(name, 0).server), floats(served_by(name, 1).server)
    assert_close(floats(served_by(name, 1, kind="avgm", beta1=0.0).server), plain, atol=1e-6)
    half = {key: (start[key] + plain[key]) / 2 for key in plain}
    assert_close(floats(served_by(name, 1, kind="avgm", beta1=0.0, lr=0.5).server), half, atol=1e-6)
    assert distance(half, plain) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_moments_last_and_are_never_sent(name: str) -> None:
    """Two rounds, in which models grow and windows roll."""
    heavy, light = (served_by(name, 2, kind="adam", lr=0.01, beta1=beta1) for beta1 in (0.9, 0.0))
    held = flat(heavy.server, ".")
    assert [key for key in held if "server_m." in key] and [key for key in held if "server_v." in key]
    assert distance(floats(heavy.server), floats(light.server)) > 1e-4
    for client in range(3):
        sent = flat(heavy.payload(3, client), ".")
        plain = flat(Federation(METHODS[name], forms_of(name)).payload(3, client), ".")
        assert not [key for key in sent if "server_" in key]
        assert {k: v.shape for k, v in sent.items()} == {k: v.shape for k, v in plain.items()}
    if not name.startswith("fedgrow"):
        plain = {key for key, _ in served_by(name, 2).served(2).named_parameters()}
        assert {key for key, _ in heavy.served(2).named_parameters()} == plain


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*ROLLS, "hetlora")])
def test_momentum_moves_on_without_a_difference(name: str) -> None:
    """A round that brings back what was sent: the model goes on by beta1 m. (HetLoRA's zeros are a difference.)"""
    federation = served_by(name, 2, kind="avgm", beta1=0.5)
    before = floats(federation.server)
    moments = {k: v for k, v in flat(federation.server, ".").items() if "server_m." in k}
    sent = [ClientUpdate(client, federation.payload(2, client), 1.0) for client in range(3)]
    after = flat(federation.aggregate(2, [one for one in sent if one.tree]), ".")
    assert moments
    for key, m in moments.items():
        model = key.replace("server_m.", "")
        assert torch.allclose(after[model], before[model] + 0.5 * m, atol=1e-5), model


@pytest.mark.parametrize("name", ROLLS)
def test_coordinates_that_nobody_has_stay_with_their_moments(name: str) -> None:
    federation = served_by(name, 1, kind="adam", lr=0.01)
    before = flat(federation.server, ".")
    weakest = federation.payload(2, 0)
    federation.run(2, [0])
    after, moved = flat(federation.server, "."), 0
    for key in floats(before):
        if key.startswith("model."):
            x = key.removeprefix("model.")
            same = after[key] == before[key]
            moved += int((~same).sum())
            for moment in (f"model.server_m.{x}", f"model.server_v.{x}"):
                assert torch.equal(after[moment][same], before[moment][same])
    assert 0 < moved <= sum(tensor.numel() for tensor in tensors(weakest))


def test_a_server_that_averages_nothing_has_none() -> None:
    with pytest.raises(
        ValueError, match=r"algorithm\.server\.kind='adam': must be 'average' where algorithm\.federate"
    ):
        FedGrow(federate=False, server=ServerOptimizer("adam"))


def test_an_experiments_json_brings_it_back() -> None:
    algorithm = fedavg(kind="yogi", lr=0.01)
    assert revived(canonical(algorithm)) == algorithm
