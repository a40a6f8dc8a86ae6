"""The pair `Robust` in a federation: what the method gets to see, what is remembered, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.heterofl import HeteroFL
from baselines.lora import hetlora
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import ClientUpdate
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment
from fedsim.privacy.hostile import Hostile, is_hostile
from fedsim.privacy.pairs import Around
from fedsim.privacy.robust import Robust
from fedsim.privacy.vectors import change, check_alike, with_change
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.inline_runs import Cut, Interrupted, assert_same_numbers, inline
from tests.support.sent_numbers import moved, numbers
from tests.support.small_federation import LOCAL, Federation, assert_close, assert_same_bits


FIVE = [[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [3.0, 1.0], [20.0, -10.0]]


# what the method gets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (Robust("mean"), [5, -1]),
        (Robust("median"), [2, 0]),
        (Robust("krum", attackers=1), [2, 0]),
        (Robust("multi_krum", attackers=1, keep=2), [2.5, 0.5]),
        (Robust("fltrust"), [0, 0]),  # participant 0 changes nothing, so there is nothing to agree with
    ],
)
def test_the_server_moves_by_the_robust_mean_of_the_changes(pair, expected) -> None:
    federation = numbers(FIVE, pair)
    federation.run(1)
    assert moved(federation) == pytest.approx(expected, abs=1e-6)


def test_fltrusts_participant_0_is_trusted_and_not_averaged() -> None:
    federation = numbers([[2.0, 0.0], [0.0, 3.0], [3.0, 4.0], [-5.0, 0.0]], Robust("fltrust"))
    federation.run(1)
    assert moved(federation) == pytest.approx([1.2, 1.6])  # of the three, only (3, 4) agrees; as long as (2, 0)
    before = federation.server
    federation.run(2, cohort=[1, 2, 3])
    assert_same_bits(federation.server, before)


def test_weights_are_the_methods_where_that_is_asked_for() -> None:
    changes, weights = [[0.0], [2.0]], (1.0, 3.0)
    for pair, expected in (
        (Robust("mean"), 1.5),
        (Robust("norm_bound", bound=9.0), 1.0),
        (Robust("norm_bound", bound=9.0, by_examples=True), 1.5),
    ):
        federation = numbers(changes, pair, weights=weights)
        federation.run(1)
        assert moved(federation) == [expected]


def test_what_was_not_received_counts_from_0() -> None:
    update = ClientUpdate(3, {"b": torch.tensor([4.0]), "a": {"x": torch.tensor([[1.0], [2.0]])}}, 1)
    vector = change(update, {"a": {"x": torch.tensor([[1.0], [5.0]])}, "c": torch.zeros(2)})
    assert vector.tolist() == [0.0, -3.0, 4.0] and vector.dtype == torch.float64
    back = with_change(update, {"a": {"x": torch.tensor([[1.0], [5.0]])}}, vector * 2)
    assert back.client == 3 and back.tree["b"].tolist() == [8.0]
    assert back.tree["a"]["x"].tolist() == [[1.0], [-1.0]] and back.tree["b"].dtype == torch.float32


def test_a_round_changes_nothing_where_too_few_updates_arrive() -> None:
    federation = numbers(FIVE, Robust("krum", attackers=1))
    federation.run(1, cohort=[0, 1, 2, 3])
    assert moved(federation) == [0.0, 0.0]
    federation.run(2, cohort=[0, 1, 2, 3, 4])
    assert moved(federation) == [2.0, 0.0]


def test_centred_clipping_remembers_the_mean_of_the_round_before() -> None:
    federation = numbers([[6.0, 8.0], [6.0, 8.0]], Robust("centered_clipping", bound=5.0))
    federation.run(1)
    assert moved(federation) == [3.0, 4.0]  # from 0, as far as the bound
    assert federation.server["around.pairs"]["0"]["center"].tolist() == [3.0, 4.0]
    federation.run(2)
    assert moved(federation) == [9.0, 12.0]  # from (3, 4), which is near enough, all the way
    assert federation.payload(3, 0).keys() == {"x"}, "what it remembers is not sent"


# beside the plain run -------------------------------------------------------------------------------------------------


def after_two_rounds(method, *pairs, **more):
    federation = Federation(Around(method, pairs) if pairs else method, **more)
    for round in (1, 2):
        federation.run(round)
    return federation.server


@pytest.mark.parametrize("method", [FedAvg(**LOCAL), FedGrow(preset="preserving", small_epochs=1, local_epochs=1)])
def test_the_mean_without_attackers_is_the_plain_run(method, one_thread: None, uncounted: None) -> None:
    plain = after_two_rounds(method)
    assert_same_bits(after_two_rounds(method, Robust("mean"), Hostile("scaled", 0.0)), plain)
    loose = after_two_rounds(method, Robust("norm_bound", bound=1e6, by_examples=True))
    assert_close(loose, plain, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(after_two_rounds(method, Robust("median")), plain, atol=1e-6)


def test_a_scaled_attack_ruins_the_mean_and_not_the_median() -> None:
    changes = [[1.0, 2.0], [1.5, 2.0], [2.0, 1.0], [2.0, 1.5], [1.5, 1.5]]
    (hostile,) = [client for client in range(5) if is_hostile(0, 0.2, client)]
    attack = Hostile("scaled", 0.2, scale=1000.0)
    ruined, saved = numbers(changes, Robust("mean"), attack), numbers(changes, Robust("median"), attack)
    for federation in (ruined, saved):
        federation.run(1)
    assert all(abs(x) > 100 for x in moved(ruined))
    honest = torch.tensor([change for client, change in enumerate(changes) if client != hostile])
    assert all(low <= x <= high for x, low, high in zip(moved(saved), honest.amin(0), honest.amax(0), strict=True))


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "mode"}, r"robust\.rule='mode': must be one of"),
        ({"rule": "krum"}, r"robust\.attackers=None.*for krum"),
        ({"rule": "median", "bound": 1.0}, r"robust\.bound=1\.0: must be left out"),
        ({"rule": "norm_bound", "bound": -1.0}, r"robust\.bound=-1\.0: must be a finite number above 0"),
        ({"rule": "median", "by_examples": True}, r"robust\.by_examples=True: must be False for median"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        Robust(**fields)


def around(experiment: Experiment, *pairs, method=None) -> Experiment:
    return dataclasses.replace(experiment, algorithm=Around(method or experiment.algorithm, pairs))


def test_more_attackers_than_the_rule_bears_are_refused_before_anything_starts(tiny_experiment) -> None:
    with pytest.raises(ValueError, match=r"robust\.attackers=1: .*krum then needs 5 of 3 clients"):
        around(tiny_experiment, Robust("krum", attackers=1))
    five = dataclasses.replace(tiny_experiment, participants=5)
    around(five, Robust("krum", attackers=1))
    with pytest.raises(ValueError, match="5 of 4"):  # it is the cohort that counts
        around(dataclasses.replace(five, cohort=4), Robust("krum", attackers=1))
    with pytest.raises(ValueError, match=r"5 of 4"):
        numbers(FIVE[:4], Robust("krum", attackers=1))


def test_methods_that_do_not_average_are_refused_before_anything_starts(tiny_experiment) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.method='heterofl': must be a method that averages"):
        around(tiny_experiment, Robust("median"), method=HeteroFL())
    alone = dataclasses.replace(tiny_experiment.algorithm, federate=False)
    with pytest.raises(ValueError, match=r"algorithm\.method='fedgrow_no_federation'"):
        around(tiny_experiment, Robust("median"), method=alone)
    around(tiny_experiment, Hostile("scaled", 0.2), method=HeteroFL())  # compares nothing


def test_updates_of_different_shapes_are_refused_when_they_are_counted(tiny_experiment, uncounted: None) -> None:
    by_device = around(tiny_experiment, Robust("median"), method=hetlora())
    with pytest.raises(
        ValueError, match=r"must have the same names and shapes: 'a::.*participant 0, and .*participant"
    ):
        cost_of(by_device, {})
    cost_of(around(tiny_experiment, Robust("median")), {})


def test_pairs_around_pairs_are_refused(tiny_experiment) -> None:
    inner = Around(tiny_experiment.algorithm, (Robust("median"),))
    with pytest.raises(ValueError, match=r"algorithm\.method='fedgrow': must be a method itself"):
        Around(inner, (Hostile("scaled", 0.2),))


def test_updates_of_different_names_are_refused() -> None:
    one, other = ClientUpdate(0, {"x": torch.zeros(2)}, 1), ClientUpdate(4, {"y": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match=r"'x' is \(2,\) in that of participant 0, and missing in .* participant 4"):
        check_alike([one, other])
    check_alike([])


# in runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(tiny_experiment) -> Experiment:
    """Three participants, of whom one adds noise, and a rule that remembers."""
    pairs = Robust("centered_clipping", bound=1.0), Hostile("noise", 1 / 3)
    return dataclasses.replace(around(tiny_experiment, *pairs), rounds=3)


@pytest.fixture(scope="module")
def attacked_run(attacked, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("attacked")
    inline(attacked, out)
    return out


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_cut_goes_on_from_what_the_pair_remembered(attacked, attacked_run, after, tmp_path) -> None:
    with pytest.raises(Interrupted):
        inline(attacked, tmp_path, progress=Cut(after))
    inline(attacked, tmp_path, resume=True)
    assert_same_numbers(attacked_run, tmp_path)


def test_tables_say_who_is_hostile(attacked, attacked_run) -> None:
    clients = load(attacked_run).clients.query("round == 2")
    said = {
        client: '"hostile": 1.0' in metrics for client, metrics in zip(clients.client, clients.metrics, strict=True)
    }
    assert said == {client: is_hostile(attacked.seed, 1 / 3, client) for client in range(3)}
    assert sum(said.values()) == 1


def test_tables_have_the_backdoors_success_beside_what_clients_reported(tiny_experiment, tmp_path) -> None:
    experiment = around(tiny_experiment, Robust("median"), Hostile("backdoor", 1 / 3))
    inline(dataclasses.replace(experiment, rounds=1), tmp_path)
    results = load(tmp_path)
    clients = results.clients.query("round == 1").set_index("client").metrics.map(json.loads)
    for client, metrics in clients.items():
        assert metrics.keys() == ({"hostile"} if metrics["hostile"] else {"hostile", "backdoor"}), client
    (of_round,) = results.rounds.query("round == 1").metrics.map(json.loads)
    honest = [metrics["backdoor"] for metrics in clients if not metrics["hostile"]]
    assert len(honest) == 2 and min(honest) <= of_round["backdoor"] <= max(honest)


@pytest.mark.ray
def test_a_rule_and_an_attack_give_the_same_bits_inline_and_on_ray(
    tiny_experiment, attacked, on_hosts, tmp_path
) -> None:
    together = around(tiny_experiment, Robust("geometric_median"), Hostile("little", 1 / 3, scale=1.0))
    backdoor = around(tiny_experiment, Robust("median"), Hostile("backdoor", 1 / 3))
    experiments = [attacked, together, backdoor]
    for name, runtime in (("here", InlineRuntime), ("there", on_hosts(2))):
        assert run_all(experiments, out=tmp_path / name, make_runtime=runtime) == []
    here, there = (load(tmp_path / name).rounds.set_index(["run_id", "round"]) for name in ("here", "there"))
    assert here.state_sha256.to_dict() == there.state_sha256.to_dict()
    assert here.metrics.to_dict() == there.metrics.to_dict()
    assert len(here) == 10 and here.xs(2, level="round").state_sha256.nunique() == 3
