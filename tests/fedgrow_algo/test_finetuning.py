"""Fine-tuning after growth: when it begins, what it trains, what it sends, and a run that ends in it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedgrow_algo.dual_ligo import operator_between
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedgrow_algo.rounds import aggregated, payloads, stage_of
from fedsim.algorithm import ClientInfo, ClientUpdate
from fedsim.core.tree import State, clone, nbytes, numel, sha256, tensors
from fedsim.experiment import with_settings
from fedsim.learning.server_opt import AVERAGE
from fedsim.learning.task import Task
from fedsim.testing import SMALL
from tests.support.clients import client_update
from tests.support.inline_runs import Cut, Interrupted, inline
from tests.support.procedures import TARGET, Federation, assert_equal, joint, residual, staged
from tests.support.small_federation import assert_close


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

FINETUNED: dict[str, Any] = {"finetune_after": 1, "finetune_lr": 1e-2}
# Each procedure that can be followed by fine-tuning, and the parts of a private state before it.
PROCEDURES = {
    "fedgrow": (staged(**FINETUNED), {"middle"}),
    "fedgrow_joint": (joint(**FINETUNED), {"small", "local"}),
    "fedgrow_no_federation": (staged(**FINETUNED, federate=False), {"middle", "global"}),
    "fedgrow_residual": (residual(**FINETUNED), {"middle", "global"}),
}


@pytest.mark.parametrize(
    "finetune_after, stages",
    [(None, ["federated"] * 3), (0, ["finetune"] * 3), (2, ["federated", "federated", "finetune"])],
)
def test_stage_of_a_round(finetune_after: int | None, stages: list[str]) -> None:
    assert [stage_of(round, finetune_after) for round in (1, 2, 3)] == stages
    for kind in (FedGrow, FedGrowJoint):
        algorithm = kind(finetune_after=finetune_after)
        assert [algorithm.stage(round) for round in (1, 2, 3)] == stages
    assert {algorithm.stage(9) for algorithm in (FedAvg(), FedGrowReleasedCode())} == {"federated"}


@pytest.fixture(params=PROCEDURES)
def finetuned(request: pytest.FixtureRequest) -> Iterator[tuple[Federation, set[str]]]:
    algorithm, parts = PROCEDURES[request.param]
    yield Federation(algorithm), parts


def parts_of(state: State) -> set[str]:
    return {*state}


def test_rounds_before_fine_tuning_are_those_of_a_run_without_it(finetuned: tuple[Federation, set[str]]) -> None:
    federation, parts = finetuned
    plain = Federation(dataclasses.replace(federation.algorithm, finetune_after=None))  # type: ignore[type-var]
    for one in (federation, plain):
        one.run(1)
    assert parts_of(federation.state(0)) == parts
    assert sha256(federation.state(0)) == sha256(plain.state(0))
    assert_equal(federation.payload(1, 0), plain.payload(1, 0))
    assert_equal(federation.model(1, 0), plain.model(1, 0))


def test_fine_tuning_starts_from_the_grown_target_and_moves_it(finetuned: tuple[Federation, set[str]]) -> None:
    federation, _ = finetuned
    federation.run(1)
    still = Federation(dataclasses.replace(federation.algorithm, finetune_lr=0.0))  # type: ignore[type-var]
    still.server, still.private = federation.server, dict(federation.private)
    start = federation.model(1, 0)
    still.run(2, [0])
    assert_equal(still.model(2, 0), start)
    federation.run(2, [0])
    moved = federation.model(2, 0)
    assert all(not torch.equal(moved[name], start[name]) for name in moved if name.endswith("weight"))
    federation.run(3, [0])
    assert sha256(federation.model(3, 0)) != sha256(moved)


def test_fine_tuning_is_plain_training_of_the_target(finetuned: tuple[Federation, set[str]]) -> None:
    federation, _ = finetuned
    whole = dataclasses.replace(federation.algorithm, batch_size=64)  # type: ignore[type-var]
    federation.algorithm = whole
    federation.run(1)
    start = clone(federation.model(1, 1))
    federation.run(2, [1])
    plain = FedAvg(lr=1e-2, epochs=1, batch_size=64)
    trained, _ = client_update(plain, start, {}, federation.at_client(2, 1))
    decided = [name for name in start if not name.endswith("k_proj.bias")]  # others have no gradient but rounding
    ours = federation.model(2, 1)
    assert_close({n: ours[n] for n in decided}, {n: trained.tree[n] for n in decided}, atol=1e-4)


def test_fine_tuning_sends_nothing_and_keeps_the_target_alone(finetuned: tuple[Federation, set[str]]) -> None:
    federation, parts = finetuned
    federation.run(1)
    shared = {name: tensor for name, tensor in federation.server.items() if name != "grown"}
    expected = {} if federation.algorithm.name == "fedgrow_no_federation" else shared
    assert_equal(federation.payload(2, 0), expected)
    for update in federation.run(2, [0, 2]):
        assert update.tree == {}
        assert_equal({n: t for n, t in federation.server.items() if n != "grown"}, shared)
    (work,) = federation.work[2].work
    assert (work.purpose, work.trainable) == ("finetune", numel(federation.task.fresh(TARGET, 0)))
    assert parts_of(federation.state(0)) == {"target"} != parts_of(federation.state(1)) == parts
    assert [nbytes(federation.payload(2, client)) for client in range(3)] == [0, nbytes(expected), 0]
    federation.run(3)
    assert [nbytes(federation.payload(4, client)) for client in range(3)] == [0, 0, 0]


def test_what_fine_tuning_leaves_is_what_a_checkpoint_gives_back(finetuned: tuple[Federation, set[str]]) -> None:
    """Strides are not stored, so a state must have the ones it is read with: a resumed run is the same computation."""
    federation, _ = finetuned
    for round in (1, 2, 3):
        for client in range(2):
            assert all(tensor.is_contiguous() for tensor in tensors(federation.state(client)))
        federation.run(round, [0])


def test_those_who_failed_are_sent_global_again() -> None:
    state = {"w": torch.tensor([2.0]), "grown": torch.tensor([False, True, False])}
    clients = [ClientInfo(id_, "phone", SMALL, 1) for id_ in range(3)]
    sent = payloads(state, clients, "finetune")
    assert [set(sent[id_]) for id_ in range(3)] == [{"w"}, set(), {"w"}]
    assert sent[0] is sent[2], "one payload, however many it is for"
    after = aggregated(state, iter([ClientUpdate(2, {}, 1.0)]), AVERAGE, "finetune")  # client 0 raised
    assert after["grown"].tolist() == [False, True, True]
    assert state["grown"].tolist() == [False, True, False]
    assert set(payloads(after, clients, "finetune")[0]) == {"w"}
    assert all(set(payload) == {"w"} for payload in payloads(after, clients, "federated").values())


def test_nobody_is_noted_in_a_federated_round() -> None:
    state = {"w": torch.tensor([2.0]), "grown": torch.tensor([False, False])}
    after = aggregated(state, iter([ClientUpdate(1, {"w": torch.tensor([4.0])}, 1.0)]), AVERAGE, "federated")
    assert after["w"].tolist() == [4.0]
    assert after["grown"].tolist() == [False, False]
    after["grown"][0] = True
    assert not state["grown"].any()
    nobody = aggregated(state, iter([]), AVERAGE, "federated")
    assert_equal(nobody, state)


def rounds_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "rounds").sort_values("round")


def test_a_run_that_ends_in_fine_tuning(tmp_path: Path, tiny_settings: list[str]) -> None:
    """Two of three participants in each of five rounds, the last three of them fine-tuning."""
    words = ["rounds=5", "cohort=2", "eval_every=5", "algorithm.finetune_after=2", "algorithm.finetune_lr=3e-3"]
    experiment = with_settings(tiny(), [*tiny_settings, *words])
    inline(experiment, tmp_path)
    rounds = rounds_of(tmp_path)
    assert rounds["stage"].tolist() == ["local", "federated", "federated", "finetune", "finetune", "finetune"]
    operator = operator_between("paper", Task(experiment.task), experiment.middle, experiment.target)
    size = 4 * sum(torch.Size(shape).numel() for shape in operator.shapes.values())
    clients = pd.read_parquet(tmp_path / "clients")
    trained = clients[(clients["round"] > 0) & (clients["flops"] > 0)]
    assert rounds["bytes_up"].tolist() == [0, 2 * size, 2 * size, 0, 0, 0]
    met: set[int] = set()
    expected = [0, 2 * size, 2 * size]
    for round in (3, 4, 5):
        cohort = set(trained[trained["round"] == round]["client"])
        assert len(cohort) == 2
        expected.append(size * len(cohort - met))
        met |= cohort
    assert rounds["bytes_down"].tolist() == expected
    assert expected[4:] != [2 * size] * 2, "whoever was sent Global once is not sent it again"

    with pytest.raises(Interrupted):  # in the middle of the fine-tuning, when some have their target and some do not
        inline(experiment, tmp_path / "cut", progress=Cut(after=3))
    inline(experiment, tmp_path / "cut", resume=True)
    resumed = rounds_of(tmp_path / "cut")
    for column in ("state_sha256", "bytes_down"):
        assert resumed[column].tolist() == rounds[column].tolist()
    assert resumed["accuracy_mean"].tolist()[-1] == rounds["accuracy_mean"].tolist()[-1]
    assert len({*rounds["state_sha256"]}) == 6
