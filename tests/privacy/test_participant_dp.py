"""Clipping and noise of participants, on numbers that can be checked by hand and on draws."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from baselines.fedavg import FedAvg
from baselines.heterofl import heterofl_clean
from fedsim.algorithm import ClientUpdate, Partial, State, whole_sum
from fedsim.core.seeding import derive, generator
from fedsim.core.tree import flat, mapped
from fedsim.data.config import digits
from fedsim.devices import Conditions
from fedsim.experiment import Experiment, Tier
from fedsim.learning.task import TaskConfig
from fedsim.models import Form
from fedsim.privacy import Around, ParticipantDP, calibrated, epsilon
from fedsim.privacy.dp import CLIP, COUNT
from fedsim.privacy.fixed_point import FixedPoint
from fedsim.privacy.hostile import Hostile
from fedsim.privacy.pair import Pair
from fedsim.privacy.robust import Robust
from fedsim.privacy.secure import FixedPointSum, SecureSum
from tests.support.small_federation import ALIKE, LOCAL, Federation, assert_same_bits, without_counting


NOISY: dict[str, Any] = {"clip": 2.0, "noise_multiplier": 3.0, "delta": 1e-5, "cohort": 4}
DRAWS = 1000


def context(round: int = 1, client: int = -1) -> Any:
    streams = {"generator": generator, "derive": derive}
    return SimpleNamespace(
        **{name: lambda purpose, of=of: of(0, purpose, round, client) for name, of in streams.items()}, round=round
    )


def sent_by(pair: ParticipantDP, tree: State, received: State, sent: State | None = None, client: int = 0):
    update = ClientUpdate(client, tree, weight=7)
    return pair.client(update, received, sent or {}, context(client=client))


def mean_of(pair: ParticipantDP, updates: list, received: State, round: int = 1, state: State | None = None) -> State:
    """What a method that averages makes of what the server's side hands on."""
    arriving, _ = pair.server(iter(updates), state or pair.start(), lambda: received, context(round))
    total = whole_sum(arriving)
    assert total is not None
    return total.mean({})


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


def assert_standard_deviation(draws: Tensor, expected: float) -> None:
    """Chi-square, two-sided, with a false alarm in a million."""
    ratio, n = float(draws.double().square().sum()) / expected**2, draws.numel()
    assert chi2.ppf(5e-7, n) < ratio < chi2.ppf(1 - 5e-7, n), (ratio / n) ** 0.5


# clipping -------------------------------------------------------------------------------------------------------------


def test_a_flat_clip_shortens_the_whole_difference_to_what_was_received() -> None:
    update = sent_by(ParticipantDP(1.0), {"a": tensor(13.0), "b": {"c": tensor(4.0)}}, {"a": tensor(10.0)})
    assert flat(update.tree)["a"].item() == pytest.approx(10.6)
    assert flat(update.tree)["b::c"].item() == pytest.approx(0.8), "what was not received counts from 0"
    assert update.metrics == {"clipped": 1.0}
    assert update.weight == 7, "nothing is noised: the method's own weight"


def test_a_clip_per_tensor_splits_the_norm_evenly() -> None:
    small = tensor(0.5)
    pair = ParticipantDP(math.sqrt(2), clipping="per_tensor")
    update = sent_by(pair, {"a": tensor(3.0, 4.0), "b": small}, {"a": tensor(0.0, 0.0), "b": tensor(0.0)})
    assert update.tree["a"].tolist() == pytest.approx([0.6, 0.8])
    assert update.tree["b"] is small
    assert update.metrics == {"clipped": 1.0}


def test_what_is_short_enough_is_sent_as_it_is() -> None:
    a = tensor(3.0, 4.0)
    update = sent_by(ParticipantDP(5.0), {"a": a}, {})
    assert update.tree["a"] is a and update.metrics == {"clipped": 0.0}
    assert sent_by(ParticipantDP(4.999), {"a": a}, {}).tree["a"] is not a


@pytest.mark.parametrize("clip", [None, math.inf])
def test_without_clip_and_noise_a_pair_does_nothing(clip: float | None) -> None:
    pair, update, arriving = ParticipantDP(clip), ClientUpdate(0, {"a": tensor(1e9)}, 7), iter([])
    assert pair.client(update, {}, {}, context()) is update
    assert pair.server(arriving, {}, dict, context()) == (arriving, {})
    assert not (pair.each or pair.common)


# central noise --------------------------------------------------------------------------------------------------------


def test_the_server_adds_noise_of_sigma_c_once_to_the_sum() -> None:
    pair, received = ParticipantDP(**NOISY), {"w": torch.zeros(DRAWS)}
    updates = [sent_by(pair, {"w": torch.zeros(DRAWS)}, received, client=client) for client in range(4)]
    assert all(not update.tree["w"].any() for update in updates), "clients add none"
    noise = mean_of(pair, updates, received)["w"] * 4
    expected = torch.randn(DRAWS, generator=generator(0, "privacy/noise", 1), dtype=torch.float64) * 6
    torch.testing.assert_close(noise, expected.float())
    assert_standard_deviation(noise, 3.0 * 2.0)
    assert not torch.equal(mean_of(pair, updates, received, round=2)["w"] * 4, noise), "a stream of its own each round"
    whole = mean_of(pair, [whole_sum(updates)], received)
    assert torch.equal(whole["w"] * 4, noise), "whoever has added them up"


def test_the_mean_is_over_those_expected_of_one_weight_each() -> None:
    pair = dataclasses.replace(ParticipantDP(**NOISY), noise_multiplier=1e-9)
    received = {"w": tensor(10.0)}
    updates = [sent_by(pair, {"w": tensor(11.0)}, received, client=client) for client in range(2)]
    assert [update.weight for update in updates] == [1, 1]
    assert mean_of(pair, updates, received)["w"].item() == pytest.approx(10.5), "2 of 4 have come, each a step of 1"
    assert mean_of(pair, updates * 4, received)["w"].item() == pytest.approx(12.0), "and 8 of 4"


def test_a_round_of_nobody_has_its_noise_too() -> None:
    pair, received = ParticipantDP(**NOISY), {"w": torch.full((DRAWS,), 5.0)}
    noise = (mean_of(pair, [], received)["w"] - 5) * 4
    assert_standard_deviation(noise, 6.0)


def test_all_tensors_of_an_update_are_noised_differently() -> None:
    noise = mean_of(ParticipantDP(**NOISY), [], {"a": torch.zeros(DRAWS), "b": {"c": torch.zeros(DRAWS)}})
    assert_standard_deviation(noise["a"] * 4, 6.0)
    assert_standard_deviation((noise["b"]["c"] - noise["a"]) * 4, 6.0 * 2**0.5)


# noise of clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise, of_each", [("local", 6.0), ("distributed", 3.0)])
def test_clients_add_their_own(noise: Any, of_each: float) -> None:
    pair, received = ParticipantDP(**NOISY, noise=noise), {"w": torch.zeros(DRAWS)}
    updates = [sent_by(pair, received, received, client=client) for client in range(4)]
    assert_standard_deviation(updates[0].tree["w"], of_each)
    total = torch.stack([update.tree["w"].double() for update in updates]).sum(0)
    assert_standard_deviation(total, of_each * 2)
    torch.testing.assert_close(mean_of(pair, updates, received)["w"].double() * 4, total)  # the server adds none


def test_what_the_operating_system_draws_is_nobodys_to_repeat() -> None:
    received = {"w": torch.zeros(3)}
    seeded, deployed = ParticipantDP(**NOISY), ParticipantDP(**NOISY, deployable=True)
    assert_same_bits(mean_of(seeded, [], received), mean_of(seeded, [], received))
    assert not torch.equal(mean_of(deployed, [], received)["w"], mean_of(deployed, [], received)["w"])


# the adaptive clip ----------------------------------------------------------------------------------------------------


def test_an_adaptive_clip_follows_the_count_of_those_within_it() -> None:
    pair = ParticipantDP(1.0, clipping="adaptive", cohort=3, quantile=0.5, clip_lr=0.2)
    state, received = pair.start(), {"w": tensor(0.0)}
    assert pair.sent(state, context()) == state
    updates = [sent_by(pair, {"w": tensor(norm)}, received, state) for norm in (0.5, 2.0, 3.0)]
    assert [float(update.tree[COUNT]) for update in updates] == [0.5, -0.5, -0.5]
    arriving, after = pair.server(iter(updates), state, lambda: received, context())
    assert float(after[CLIP]) == pytest.approx(math.exp(-0.2 * (1 / 3 - 1 / 2)))
    total = whole_sum(arriving)
    assert total is not None and total.tree.keys() == {"w"}, "the method sees no count"
    assert total.mean({})["w"].item() == pytest.approx((0.5 + 1 + 1) / 3)


def test_the_clip_that_clients_received_is_the_one_that_scales_the_noise() -> None:
    pair = ParticipantDP(**NOISY, clipping="adaptive", count_noise=1e3)
    noise = mean_of(pair, [], {"w": torch.zeros(DRAWS)}, state={CLIP: torch.tensor(5.0, dtype=torch.float64)})["w"] * 4
    assert_standard_deviation(noise, 3.0 * 5.0)


def test_count_and_sum_are_together_one_mechanism_of_sigma() -> None:
    pair = ParticipantDP(1.0, 1.0, 1e-5, cohort=4, clipping="adaptive", count_noise=1.0)
    received, counts, sums = {"w": torch.zeros(1)}, [], []
    for round in range(DRAWS):
        arriving, after = pair.server(iter([]), pair.start(), lambda: received, context(round))
        counts.append((-math.log(float(after[CLIP])) / 0.2 + 0.5 - 0.5) * 4)
        sums += [each.tree["w"] - 0.0 for each in arriving if isinstance(each, Partial)]
    assert_standard_deviation(torch.tensor(counts), 1.0)
    assert_standard_deviation(torch.cat(sums), (1 - 1 / 4) ** -0.5)
    assert abs(torch.corrcoef(torch.stack([torch.tensor(counts), torch.cat(sums)]))[0, 1]) < 5 / DRAWS**0.5


# around a method ------------------------------------------------------------------------------------------------------


def test_a_round_of_fedavg_moves_by_the_mean_of_clipped_steps_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    without_counting(monkeypatch)
    clip = 0.05
    pair = ParticipantDP(clip, 1e-12, 1e-5, cohort=3)
    plain, around = (Federation(method, ALIKE) for method in (FedAvg(**LOCAL), Around(FedAvg(**LOCAL), (pair,))))
    before = flat(plain.server)
    sums = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in before.items()}
    for client in range(3):
        moved = {name: each.double() - before[name].double() for name, each in plain.update(1, client).tree.items()}
        norm = math.sqrt(sum(float(each.square().sum()) for each in moved.values()))
        assert norm > clip
        sums = {name: sums[name] + each * clip / norm for name, each in moved.items()}
    around.run(1)
    for name, each in flat(around.server).items():
        torch.testing.assert_close(each.double(), before[name].double() + sums[name] / 3, atol=1e-6, rtol=0)


# experiments ----------------------------------------------------------------------------------------------------------


FORM = Form(8, 1, heads=2)


def experiment(**fields: Any) -> Experiment:
    defaults: dict[str, Any] = {
        "algorithm": FedAvg(),
        "task": TaskConfig(digits(limit=300), patch_size=4),
        "tiers": (Tier("phone", FORM),),
        "target": Form(16, 2, heads=2),
        "participants": 10,
        "cohort": 4,
        "rounds": 5,
    }
    return Experiment(**defaults | fields)


def pair_of(calibrated: Experiment) -> ParticipantDP:
    assert isinstance(calibrated.algorithm, Around)
    (pair,) = calibrated.algorithm.pairs
    assert isinstance(pair, ParticipantDP)
    return pair


@pytest.mark.parametrize(
    "fields, expected",
    [({"sampling": "poisson"}, "poisson"), ({}, "fixed"), ({"cohort": None}, "full"), ({"cohort": 10}, "full")],
)
def test_noise_is_solved_for_from_the_experiment(fields: dict, expected: str) -> None:
    base = experiment(**fields)
    private = calibrated(base, clip=1.0, epsilon=3.0, delta=1e-5)
    pair = pair_of(private)
    assert (pair.sampling, pair.cohort) == (expected, base.cohort or 10)
    spent = [private.algorithm.spent(private, round)["epsilon"] for round in range(6)]
    assert spent[0] == 0 and sorted(spent) == spent and 3 * 0.997 < spent[5] <= 3
    assert spent[5] == epsilon(
        sampling_rate=(base.cohort or 10) / 10,
        noise_multiplier=pair.noise_multiplier,
        steps=5,
        delta=1e-5,
        sampling=pair.sampling,
    )


def test_what_each_adds_for_itself_counts_for_half() -> None:
    private = calibrated(experiment(), clip=1.0, noise_multiplier=10.0, delta=1e-5, noise="local")
    spent = private.algorithm.spent(private, 5)
    assert spent["epsilon"] == epsilon(sampling_rate=1, noise_multiplier=5, steps=5, delta=1e-5, sampling="full")
    assert (spent["noise_multiplier"], spent["delta"]) == (10.0, 1e-5)
    solved = calibrated(experiment(), clip=1.0, epsilon=3.0, delta=1e-5, noise="local")
    assert solved.algorithm.spent(solved, 5)["epsilon"] == pytest.approx(3.0, rel=0.003)


def test_other_pairs_stay_around_and_runs_without_have_their_old_names() -> None:
    other = ParticipantDP(5.0)
    private = calibrated(experiment(algorithm=Around(FedAvg(), (other,))), clip=1.0, epsilon=3.0, delta=1e-5)
    assert isinstance(private.algorithm, Around) and private.algorithm.method == FedAvg()
    assert (
        "sampling" not in experiment().canonical_json() and "poisson" in experiment(sampling="poisson").canonical_json()
    )


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"clip": 0.0}, r"privacy.clip=0.0: must be greater than 0"),
        ({"clip": None}, r"privacy.clip=None: must be given where privacy.noise_multiplier=3.0"),
        ({"delta": 1.0}, r"privacy.delta=1.0: must be between 0 and 1"),
        ({"delta": 0}, r"privacy.delta=0: must be between 0 and 1"),
        ({"delta": None}, r"privacy.delta=None: must be given"),
        ({"cohort": None}, r"privacy.cohort=None: must be given"),
        ({"noise_multiplier": -1.0}, r"privacy.noise_multiplier=-1.0: must be at least 0"),
        ({"quantile": 1.5}, r"privacy.quantile=1.5: must be at most 1"),
        ({"clipping": "adaptive", "noise": "local"}, r"privacy.clipping='adaptive': must be 'flat' or"),
        ({"clipping": "adaptive", "count_noise": 1.5}, r"privacy.count_noise=1.5: must be more than half of .*=3.0"),
    ],
)
def test_bad_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParticipantDP(**dict(NOISY, **fields))


@pytest.mark.parametrize(
    "changed, pair, message",
    [
        ({}, {"cohort": 5}, r"privacy.cohort=5: must be 4, which is the experiment's"),
        ({}, {"sampling": "poisson"}, r"privacy.sampling='poisson': must be 'fixed', which is the experiment's"),
        ({"cohort": None}, {}, r"privacy.cohort=4: must be 10"),
        ({}, {"accountant": "pld"}, r"accountant='pld': must be 'rdp' where sampling='fixed'"),
        ({"conditions": Conditions(availability=0.5)}, {}, r"conditions.availability=0.5: must be 1 with noise"),
        ({"conditions": Conditions(dropout=0.5)}, {"noise": "distributed"}, r"conditions.dropout=0.5: must be another"),
        ({"on_error": "drop"}, {"noise": "distributed"}, r"on_error='drop': must be another"),
        ({"algorithm": heterofl_clean()}, {}, r"algorithm.method='heterofl_clean': must be a method that averages"),
    ],
)
def test_where_no_theorem_holds_an_experiment_is_refused(changed: dict, pair: dict, message: str) -> None:
    base = experiment(**changed)
    fields = dict(NOISY, **{"sampling": "fixed"} | pair)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, algorithm=Around(base.algorithm, (ParticipantDP(**fields),)))


def test_noise_for_a_sum_is_refused_where_no_sum_is_released() -> None:
    """What a median releases moves by more than a sum does: only an update that is private by itself bears it."""
    fields = dict(NOISY, sampling="fixed")
    for noise in ("central", "distributed"):
        with pytest.raises(ValueError, match=r"algorithm.pairs=.*must be without a robust rule where privacy.noise="):
            experiment(algorithm=Around(FedAvg(), (ParticipantDP(**fields, noise=noise), Robust("median"))))
    experiment(algorithm=Around(FedAvg(), (ParticipantDP(**fields, noise="local"), Robust("median"))))
    with pytest.raises(ValueError, match=r"algorithm.pairs=.*must be without a robust rule"):
        experiment(algorithm=Around(FedAvg(), (ParticipantDP(**fields), Hostile("little", 0.3))))
    experiment(algorithm=Around(FedAvg(), (ParticipantDP(clip=1.0), Robust("median"))))


@pytest.mark.parametrize("inner", [Robust("median"), Hostile("little", 0.3)])
def test_who_looks_at_each_update_stands_outside_of_who_adds_them_up(inner: Pair) -> None:
    """Else it would see one sum, for one update."""
    pair = ParticipantDP(**NOISY, noise="local")
    with pytest.raises(ValueError, match=r"algorithm.pairs=.*look at each update after ParticipantDP, which adds them"):
        Around(FedAvg(), (inner, pair))
    assert Around(FedAvg(), (inner, ParticipantDP(clip=1.0))), "who clips alone adds nothing up"


@pytest.mark.parametrize("kept", [0.9, 1.1])
def test_noise_that_a_sum_of_words_would_cut_off_is_refused(kept: float) -> None:
    """A parameter of 1.1 where words hold 1: all of its noise would be lost, and nobody would see it."""
    numbers = FixedPoint(clip=1.0, fraction=10)
    pair = ParticipantDP(clip=1e-3, noise_multiplier=1e-3, delta=1e-5, cohort=3, numbers=numbers)
    federation = Federation(Around(FedAvg(**LOCAL), (pair, FixedPointSum(numbers))))
    federation.server = mapped(lambda tensor: torch.full_like(tensor, kept), federation.server)
    if kept > 1:
        with pytest.raises(ValueError, match=r"numbers.clip=.*of all numbers that are sent with noise"):
            federation.run(1)
    else:
        assert all(update.metrics["cut"] == 0 for update in federation.run(1))


def test_what_is_given_as_no_noise_is_none() -> None:
    (pair,) = calibrated(experiment(), clip=1.0, delta=1e-5, noise_multiplier=0.0).algorithm.pairs  # type: ignore[attr-defined]
    assert pair.noise_multiplier == 0.0


def test_two_of_three_are_asked_for() -> None:
    for wrong in ({}, {"epsilon": 1.0, "noise_multiplier": 1.0}):
        with pytest.raises(ValueError, match="must be one of them given"):
            calibrated(experiment(), clip=1.0, delta=1e-5, **wrong)
    with pytest.raises(ValueError, match=r"epsilon=-1.0: must be a finite number greater than 0"):
        calibrated(experiment(), clip=1.0, delta=1e-5, epsilon=-1.0)


def test_what_was_not_received_is_refused_where_a_round_may_have_nobody() -> None:
    pair = ParticipantDP(**NOISY, sampling="poisson")
    with pytest.raises(ValueError, match=r"ClientUpdate.tree='b': must be received as well as sent"):
        sent_by(pair, {"a": tensor(1.0), "b": tensor(1.0)}, {"a": tensor(1.0)})
    with pytest.raises(ValueError, match=r"ClientUpdate.tree\['a'\]=torch.int64: must be of floats"):
        sent_by(pair, {"a": torch.tensor([1])}, {"a": torch.tensor([1])})


# whole noise ----------------------------------------------------------------------------------------------------------


WHOLE: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 2.0, "delta": 1e-3, "noise": "skellam", "size": 50_000}
NUMBERS = FixedPoint(fraction=16)


def whole(**changes: Any) -> ParticipantDP:
    fields: dict[str, Any] = WHOLE | {"cohort": 4} | changes
    return ParticipantDP(**fields)


def test_whole_shares_add_up_to_noise_of_the_whole_round() -> None:
    """Four shares of variance sigma^2 C^2 / 4, in whole steps."""
    pair, received = whole(size=4 * DRAWS), {"a": torch.zeros(4 * DRAWS)}
    shares = [sent_by(pair, received, received, client=client).tree["a"] for client in range(4)]
    for share in shares:
        assert share.dtype == torch.float64 and torch.equal(share * 2**16, torch.round(share * 2**16))
    assert_standard_deviation(shares[0], 2.0 / 4**0.5)
    assert_standard_deviation(torch.stack(shares).sum(0), 2.0)
    assert not torch.equal(shares[0], shares[1])


def test_a_sum_of_words_holds_whole_noise_exactly(monkeypatch: pytest.MonkeyPatch, tiny_experiment: Experiment) -> None:
    without_counting(monkeypatch)
    states = []
    for total in (FixedPointSum(NUMBERS), SecureSum(NUMBERS)):
        base = dataclasses.replace(tiny_experiment, algorithm=Around(FedAvg(**LOCAL), (total,)), cohort=None)
        private = calibrated(base, clip=0.5, epsilon=8.0, delta=1e-3, noise="skellam", size=50_000, numbers=NUMBERS)
        spent = private.algorithm.spent(private, private.rounds)
        assert 7.99 < spent["epsilon"] <= 8.0
        gaussian = calibrated(base, clip=0.5, epsilon=8.0, delta=1e-3).algorithm.spent(private, 1)["noise_multiplier"]
        assert 1 < spent["noise_multiplier"] / gaussian < 1.2
        federation = Federation(private.algorithm)
        federation.run(1)
        states.append(federation.server)
    assert_same_bits(states[0], states[1])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"size": None}, r"privacy\.size=None: must be given"),
        ({"size": 0}, r"privacy\.size=0: must be at least 1"),
        ({"accountant": "pld"}, r"privacy\.accountant='pld': must be 'rdp'"),
        ({"sampling": "fixed"}, r"privacy\.sampling='fixed': must be 'full'"),
        ({"clipping": "adaptive"}, r"privacy\.clipping='adaptive': must be 'flat' or 'per_tensor'"),
        ({"numbers": FixedPoint(fraction=30)}, r"privacy\.numbers\.fraction=30: must be smaller"),
    ],
)
def test_whole_noise_is_refused_where_nothing_is_known_of_it(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(**changed)


def test_whole_noise_asks_for_a_sum_of_words_and_room_for_an_update(tiny_experiment: Experiment) -> None:
    base = dataclasses.replace(tiny_experiment, algorithm=FedAvg(**LOCAL), cohort=None)
    with pytest.raises(ValueError, match=r"algorithm\.pairs=\['ParticipantDP'\]: must be with a SecureSum"):
        calibrated(base, **{name: value for name, value in WHOLE.items() if name != "noise_multiplier"}, epsilon=8.0)
    pair = whole(size=3)
    with pytest.raises(ValueError, match=r"privacy\.size=3: must be at least 4"):
        sent_by(pair, {"a": torch.zeros(4)}, {"a": torch.zeros(4)})
