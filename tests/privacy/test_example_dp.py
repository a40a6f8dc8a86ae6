"""DP-SGD in local training: clipping of single examples, noise, coins, and who may ask for it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.analytic import Analytic
from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import TaskLoss, Training, Trainings
from fedsim.core.tree import Tree
from fedsim.data.config import digits
from fedsim.experiment import Experiment, Tier
from fedsim.learning.augmentation import Augmentation
from fedsim.learning.batched import Tally, train_batched
from fedsim.learning.per_example import PerExample
from fedsim.learning.task import TaskConfig
from fedsim.learning.training import LocalSteps, Trained, train
from fedsim.models import Form
from fedsim.privacy import Around, ExampleDP, ParticipantDP, epsilon
from fedsim.results.tables import load
from tests.privacy.test_participant_dp import assert_standard_deviation
from tests.support.inline_runs import Cut, Interrupted, inline
from tests.support.small_federation import LOCAL, SMALL, Federation, assert_close, distance, without_counting


CLIENT, SHARD = 1, 12
SGD: dict[str, Any] = {"purpose": "target", "lr": 1.0, "epochs": 1, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation(FedAvg(**LOCAL))


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    without_counting(monkeypatch)


def asked(federation: Federation, per_example: PerExample | None, **changes: Any) -> Training:
    start = federation.task.fresh(SMALL, 0)
    objective = TaskLoss(federation.task, SMALL)
    fields: dict[str, Any] = {"batch_size": SHARD} | SGD | changes
    return Training(objective, start, **fields, per_example=per_example)


def stepped(federation: Federation, per_example: PerExample | None, round: int = 1, **changes: Any) -> Trained:
    return train(federation.at_client(round, CLIENT), asked(federation, per_example, **changes))


def gradients(federation: Federation) -> list[Tree]:
    """Of each example by itself."""
    ctx, found = federation.at_client(1, CLIENT), []
    for number in range(SHARD):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in federation.task.fresh(SMALL, 0).items()}
        batch = ctx.task.batch(ctx.train, torch.tensor([number]))
        loss = TaskLoss(federation.task, SMALL)(leaves, {}, batch)
        found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    return found


# a step ---------------------------------------------------------------------------------------------------------------


def test_a_step_takes_the_mean_of_gradients_that_are_each_clipped(federation: Federation) -> None:
    each = gradients(federation)
    norms = [sum(float(g.square().sum()) for g in one.values()) ** 0.5 for one in each]
    clip = sorted(norms)[SHARD // 2]  # some are longer, some are not
    expected = {}
    for name, start in federation.task.fresh(SMALL, 0).items():
        total = sum(one[name] * min(1.0, clip / norm) for one, norm in zip(each, norms, strict=True))
        expected[name] = start - total / SHARD
    found = stepped(federation, PerExample(clip, 0.0))
    assert found.steps == 1
    assert_close(found.parameters, expected, atol=1e-5)
    unclipped = stepped(federation, PerExample(1e6, 0.0))
    assert_close(unclipped.parameters, stepped(federation, None).parameters, atol=1e-5)
    assert distance(unclipped.parameters, found.parameters) > 1e-2
    assert unclipped.loss == pytest.approx(stepped(federation, None).loss, rel=1e-5)


def test_noise_of_sigma_c_is_added_to_the_sum_once_a_step(federation: Federation) -> None:
    quiet = stepped(federation, PerExample(0.5, 0.0)).parameters
    noisy, again, later = (stepped(federation, PerExample(0.5, 4.0), round=round).parameters for round in (1, 1, 2))
    draws = torch.cat([(found[name] - quiet[name]).flatten() for found in (noisy, later) for name in quiet])
    assert len(draws) > 1000
    assert_standard_deviation(draws * SHARD, 4.0 * 0.5)
    assert distance(again, noisy) == 0 and distance(later, noisy) > 0.1
    deployed = [stepped(federation, PerExample(0.5, 4.0, deployable=True)).parameters for _ in range(2)]
    assert distance(*deployed) > 0.1


# coins ----------------------------------------------------------------------------------------------------------------


def sizes(federation: Federation, per_example: PerExample | None, epochs: int) -> list[int]:
    request = asked(federation, per_example, epochs=epochs, batch_size=3)
    steps, found = LocalSteps(federation.at_client(1, CLIENT), request, dict(request.start)), []
    for part in steps.parts():
        found.append(part.size)
        steps.note(part, 0.0)
    return found


def test_examples_are_drawn_by_coins(federation: Federation) -> None:
    found = sizes(federation, PerExample(1.0, 1.0), epochs=500)
    assert len(found) == len(sizes(federation, None, epochs=500)) == 2000, "as many steps as there would be batches"
    assert {*sizes(federation, None, epochs=1)} == {3}
    share, n = 3 / SHARD, SHARD * 2000
    assert abs(sum(found) - n * share) < 5.3 * (n * share * (1 - share)) ** 0.5  # one in ten million
    squares = sum((size - 3) ** 2 for size in found) / 2000
    assert 1.8 < squares < 2.7, "binomial: 2.25; the bounds are over six of its standard deviations away"
    assert 0 in found


def test_a_step_without_examples_is_taken_on_noise(federation: Federation) -> None:
    found = stepped(federation, PerExample(1.0, 1e-3), batch_size=1, epochs=2)
    assert 0 in sizes(federation, PerExample(1.0, 1.0), epochs=20)
    assert found.steps == 2 * SHARD and found.loss > 0


def test_private_trainings_are_not_batched(federation: Federation) -> None:
    requests = [(federation.at_client(1, client), asked(federation, PerExample(1.0, 1.0))) for client in (0, 1)]
    tally = Tally()
    answers = train_batched(requests, tally)
    assert (tally.alone, tally.batched, tally.reasons) == (2, 0, [])
    assert isinstance(answers[1], Trained)
    assert distance(answers[1].parameters, stepped(federation, PerExample(1.0, 1.0)).parameters) == 0


# around a method ------------------------------------------------------------------------------------------------------


def test_all_trainings_of_a_method_are_private_those_of_its_first_stages_too() -> None:
    pair = ExampleDP(0.7, 1.3, 1e-5)
    method = FedGrow(small_epochs=1, local_epochs=1, epochs=1, batch_size=8)
    federation, purposes = Federation(Around(method, (pair,))), []
    asking = federation.updating(1, 0)
    ctx, request = next(asking)
    try:
        while True:
            assert request.per_example == PerExample(0.7, 1.3) and request.clip is None
            purposes.append(request.purpose)
            ctx, request = asking.send(train(ctx, request))
    except StopIteration as end:
        assert end.value.tree
    assert purposes == ["pretrain", "local", "global"]


def test_epsilon_is_that_of_the_steps_at_the_rate_of_a_batch() -> None:
    mnist = ExampleDP(1.0, 1.3, 1e-5)
    assert mnist.epsilon(examples=60000, batch_size=256, epochs=15) == pytest.approx(0.954, rel=0.005)
    assert mnist.epsilon(examples=100, batch_size=256, epochs=1) > 2, "a small shard is all of every batch"


def test_what_is_spent_is_that_of_the_worst_participant() -> None:
    pair, some = ExampleDP(1.0, 1.3, 1e-5), experiment()
    assert pair.spent(some, 0)["epsilon"] == 0.0, "nothing has been sent"
    trained = [Trainings(400, ((32, 3),)), Trainings(100, ((32, 3),)), Trainings(100, ((32, 1),))]
    of = [pair.epsilon(examples=n, batch_size=32, epochs=epochs) for n, epochs in ((400, 3), (100, 3), (100, 1))]
    assert pair.spent(some, 3, trained) == {"epsilon": max(of), "delta": 1e-5, "noise_multiplier": 1.3}
    assert of[1] == max(of) and pair.spent(some, 3, trained[:1])["epsilon"] == of[0]
    several = [Trainings(100, ((32, 1), (10, 2)))]  # 4 + 20 steps, all counted at the larger rate
    assert pair.spent(some, 1, several)["epsilon"] == epsilon(
        sampling_rate=0.32, noise_multiplier=1.3, steps=24, delta=1e-5
    )
    assert ExampleDP(1.0, 0.0, 1e-5).spent(some, 3, trained) == {}


def test_the_tables_say_it_for_what_everyone_has_trained(tmp_path: Path, tiny_experiment: Experiment) -> None:
    """Two of four take part in each round; the stages before count once, of whoever has sent something."""
    pair = ExampleDP(1.0, 2.0, 1e-3)
    assert isinstance(tiny_experiment.algorithm, FedGrow)
    method = dataclasses.replace(tiny_experiment.algorithm, small_epochs=1, local_epochs=1, epochs=2, batch_size=16)
    private = dataclasses.replace(tiny_experiment, algorithm=Around(method, (pair,)), participants=4, cohort=2)
    with pytest.raises(Interrupted):
        inline(private, tmp_path, progress=Cut(1))
    inline(private, tmp_path, resume=True)
    found = load(tmp_path)
    clients = found.clients.loc[found.clients.outcome.notna()]
    assert found.rounds.epsilon[0] == 0.0 and found.rounds.delta.tolist() == [1e-3] * 3
    for round in (1, 2):
        sent = clients.loc[clients["round"] <= round].groupby("client")
        spent = [
            pair.epsilon(examples=int(rows.num_examples.iloc[0]), batch_size=16, epochs=2 + 2 * len(rows))
            for _, rows in sent
        ]
        assert found.rounds.epsilon[round] == pytest.approx(max(spent)), round


# refused --------------------------------------------------------------------------------------------------------------


def experiment(**fields: Any) -> Experiment:
    defaults: dict[str, Any] = {
        "algorithm": Around(FedAvg(), (ExampleDP(1.0, 1.0, 1e-5),)),
        "task": TaskConfig(digits(limit=300), patch_size=4),
        "tiers": (Tier("phone", Form(8, 1, heads=2)),),
        "target": Form(16, 2, heads=2),
    }
    return Experiment(**defaults | fields)


def test_what_cannot_be_private_is_refused() -> None:
    mixed = dataclasses.replace(experiment().task, augmentation=Augmentation(mixup=0.8))
    with pytest.raises(ValueError, match=r"task.augmentation.mixup=0.8: must be 0 where examples are private"):
        experiment(task=mixed)
    with pytest.raises(ValueError, match=r"algorithm.method=.*: must be a method that sends what it trained"):
        experiment(algorithm=Around(Analytic(), (ExampleDP(1.0, 1.0, 1e-5),)))
    weak, strong = ExampleDP(1.0, 0.1, 1e-5), ExampleDP(1.0, 1.0, 1e-5)
    with pytest.raises(ValueError, match=r"algorithm.pairs=.*: must be at most one ExampleDP"):
        experiment(algorithm=Around(FedAvg(), (strong, weak)))  # the weak one's noise, the strong one's epsilon
    with pytest.raises(ValueError, match=r"algorithm.pairs=.*: must be one whose epsilon the tables are to have"):
        experiment(algorithm=Around(FedAvg(), (strong, ParticipantDP(1.0, 1.0, 1e-5, cohort=2))))
    with pytest.raises(ValueError, match=r"algorithm.accumulate=2: must be 1 where examples are private"):
        experiment(algorithm=Around(FedAvg(accumulate=2), (strong,)))


@pytest.mark.parametrize("name, bad", [("examples", 0), ("batch_size", 3.5), ("epochs", -1), ("examples", "9")])
def test_numbers_that_are_none_are_refused(name: str, bad: Any) -> None:
    given: dict[str, Any] = {"examples": 100, "batch_size": 10, "epochs": 1} | {name: bad}
    with pytest.raises(ValueError, match=rf"{name}={bad!r}: must be a whole number, at least 1"):
        ExampleDP(1.0, 1.0, 1e-5).epsilon(**given)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"clip": 0.0}, r"privacy.clip=0.0: must be greater than 0"),
        ({"noise_multiplier": -1.0}, r"privacy.noise_multiplier=-1.0: must be at least 0"),
        ({"delta": 1.0}, r"privacy.delta=1.0: must be between 0 and 1"),
    ],
)
def test_bad_fields_are_refused(fields: dict, message: str) -> None:
    given: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | fields
    with pytest.raises(ValueError, match=message):
        ExampleDP(**given)


def test_accumulated_batches_are_refused(federation: Federation) -> None:
    with pytest.raises(ValueError, match=r"Training.accumulate=2: must be 1 where Training.per_example is given"):
        asked(federation, PerExample(1.0, 1.0), accumulate=2)
