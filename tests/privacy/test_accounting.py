"""Epsilons against values that others have published, against closed forms, and against each other."""

import logging
import math
import sys
from typing import Any

import numpy as np
import pytest
from scipy.special import comb, logsumexp
from scipy.stats import norm, skellam

from fedsim.privacy import delta, epsilon, noise_multiplier
from fedsim.privacy.accounting import Accountant, Sampled, skellam_divergence, skellam_epsilon


STEP: dict[str, Any] = {"sampling_rate": 0.04, "noise_multiplier": 1.5, "steps": 2250, "delta": 1e-5}


# published ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accountant, expected",
    [("rdp", 7.32911117143), ("pld", 6.777395712150674)],  # opacus, tests/accountants_test.py
)
def test_epsilon_is_what_opacus_publishes(accountant: Accountant, expected: float) -> None:
    assert epsilon(**STEP, accountant=accountant) == pytest.approx(expected, rel=0.005)


def test_epsilon_is_that_of_the_tutorial_on_mnist() -> None:
    """15 epochs of 60,000 images by 256, sigma 1.3: 0.95 by the conversion from divergence in use here."""
    mnist: dict[str, Any] = {
        "sampling_rate": 256 / 60000,
        "noise_multiplier": 1.3,
        "steps": 15 * 60000 // 256,
        "delta": 1e-5,
    }
    assert epsilon(**mnist) == pytest.approx(0.954, rel=0.005)


# closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, steps", [(0.5, 1), (1.0, 1), (5.0, 1), (8.0, 16), (40.0, 100)])
def test_all_in_every_step_is_the_analytic_gaussian_mechanism(sigma: float, steps: int) -> None:
    found = epsilon(sampling_rate=1, noise_multiplier=sigma, steps=steps, delta=1e-5, accountant="pld", sampling="full")
    one = sigma / math.sqrt(steps)
    spent = norm.cdf(0.5 / one - found * one) - math.exp(found) * norm.cdf(-0.5 / one - found * one)
    assert spent == pytest.approx(1e-5, rel=1e-6)


def test_divergence_of_all_in_every_step_is_a_line_in_the_order() -> None:
    """With rho = T / 2 sigma^2, the best order is near 1 + sqrt(log(1/delta) / rho)."""
    order = np.linspace(1.01, 60, 100_000)
    rdp = 10 * order / (2 * 5.0**2)
    expected = (rdp - (np.log(1e-5) + np.log(order)) / (order - 1) + np.log((order - 1) / order)).min()
    found = epsilon(sampling_rate=1, noise_multiplier=5, steps=10, delta=1e-5, sampling="full")
    assert found == pytest.approx(expected, rel=0.005)
    assert found >= expected, "an upper bound of an infimum"


def test_fixed_cohorts_follow_the_theorem_written_out() -> None:
    """Theorem 9, with twice the sensitivity: epsilon(j) = 2j / sigma^2."""
    q, sigma, steps = 0.01, 10.0, 100
    orders = range(2, 50)

    def divergence(order: int) -> float:
        of = {j: 2 * j / sigma**2 for j in range(2, order + 1)}
        total = q**2 * comb(order, 2) * min(4 * (math.exp(of[2]) - 1), 2 * math.exp(of[2]))
        total += sum(q**j * comb(order, j) * 2 * math.exp((j - 1) * of[j]) for j in range(3, order + 1))
        return math.log1p(total) / (order - 1)

    def spent(order: int) -> float:
        ratio = math.log((order - 1) / order) - (math.log(1e-5) + math.log(order)) / (order - 1)
        return steps * divergence(order) + ratio

    expected = min(spent(order) for order in orders)
    found = epsilon(sampling_rate=q, noise_multiplier=sigma, steps=steps, delta=1e-5, sampling="fixed")
    assert found == pytest.approx(expected, rel=0.005)
    half = epsilon(sampling_rate=1, noise_multiplier=sigma / 2, steps=steps, delta=1e-5, sampling="full")
    assert found < half / 4, "sampling must amplify"


# against each other ---------------------------------------------------------------------------------------------------


CASES: list[tuple[Accountant, Sampled, float]] = [
    ("rdp", "poisson", 0.04),
    ("pld", "poisson", 0.04),
    ("rdp", "fixed", 0.04),
    ("rdp", "full", 1.0),
    ("pld", "full", 1.0),
]


@pytest.mark.parametrize("accountant, sampling, rate", CASES)
def test_more_steps_more_epsilon_and_more_noise_less(accountant: Accountant, sampling: Sampled, rate: float) -> None:
    def spent(sigma: float, steps: int) -> float:
        how: dict[str, Any] = {"accountant": accountant, "sampling": sampling}
        return epsilon(sampling_rate=rate, noise_multiplier=sigma, steps=steps, delta=1e-5, **how)

    more = [spent(4.0, steps) for steps in (1, 10, 100, 1000)]
    less = [spent(sigma, 100) for sigma in (2.0, 4.0, 8.0, 16.0)]
    assert sorted(set(more)) == more
    assert sorted(set(less), reverse=True) == less


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_rate_near_one_is_no_sampling(accountant: Accountant) -> None:
    known: dict[str, Any] = {"noise_multiplier": 5.0, "steps": 10, "delta": 1e-5, "accountant": accountant}
    full = epsilon(sampling_rate=1, sampling="full", **known)
    assert epsilon(sampling_rate=1, sampling="poisson", **known) == full
    assert epsilon(sampling_rate=0.9999, sampling="poisson", **known) == pytest.approx(full, rel=0.005)
    assert epsilon(sampling_rate=0.5, sampling="poisson", **known) < 0.7 * full, "or the rate is not read"


def test_a_fixed_cohort_of_all_is_no_sampling_of_twice_the_sensitivity() -> None:
    known: dict[str, Any] = {"steps": 10, "delta": 1e-5}
    fixed = epsilon(sampling_rate=1, noise_multiplier=10.0, sampling="fixed", **known)
    assert fixed == epsilon(sampling_rate=1, noise_multiplier=5.0, sampling="full", **known)


def test_losses_are_never_worse_than_divergence() -> None:
    assert epsilon(**STEP, accountant="pld") < epsilon(**STEP, accountant="rdp")


@pytest.mark.parametrize("accountant, sampling, rate", CASES)
def test_the_third_is_solved_for(accountant: Accountant, sampling: Sampled, rate: float) -> None:
    known: dict[str, Any] = {"sampling_rate": rate, "steps": 100, "accountant": accountant, "sampling": sampling}
    sigma = noise_multiplier(epsilon=3.0, delta=1e-5, **known)
    spent = epsilon(noise_multiplier=sigma, delta=1e-5, **known)
    assert 3 * 0.997 < spent <= 3
    assert epsilon(noise_multiplier=sigma / 1.01, delta=1e-5, **known) > 3, "the least noise that is enough"
    assert delta(epsilon=3.0, noise_multiplier=sigma, **known) == pytest.approx(1e-5, rel=0.1)


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"delta": 1}, "delta=1: must be between 0 and 1"),
        ({"delta": 0.0}, r"delta=0.0: must be between 0 and 1"),
        ({"noise_multiplier": 0}, "noise_multiplier=0: must be a finite number greater than 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan: must be a finite number"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5: must be above 0 and at most 1"),
        ({"sampling_rate": 0}, "sampling_rate=0: must be above 0"),
        ({"steps": 0}, "steps=0: must be a whole number, at least 1"),
        ({"steps": True}, "steps=True"),
        ({"noise_multiplier": 1e-320}, "noise_multiplier=1e-320: must be at least 1e-06"),
        ({"noise_multiplier": 0.05, "accountant": "pld"}, r"noise_multiplier=0.05: must be at least 0.1 where"),
        ({"sampling": "full"}, r"sampling_rate=0.04: must be 1 where sampling='full'"),
        ({"sampling": "fixed", "accountant": "pld"}, "accountant='pld': must be 'rdp' where sampling='fixed'"),
        ({"sampling": "shuffled"}, "sampling='shuffled': must be 'poisson' or 'fixed' or 'full'"),
        ({"accountant": "gdp"}, "accountant='gdp': must be 'rdp' or 'pld'"),
    ],
)
def test_bad_arguments_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epsilon(**dict(STEP, **changed))


@pytest.mark.parametrize("wanted", [0, -1.0, math.inf])
def test_an_epsilon_that_none_can_have_is_refused(wanted: float) -> None:
    with pytest.raises(ValueError, match=f"epsilon={wanted}: must be a finite number greater than 0"):
        noise_multiplier(epsilon=wanted, sampling_rate=0.1, steps=10, delta=1e-5)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon=0.001: must be more: at delta=1e-05 no noise_multiplier up to"):
        noise_multiplier(epsilon=0.001, sampling_rate=1, steps=10**9, delta=1e-5, sampling="full")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules, "dp_accounting"]:
        if name.partition(".")[0] == "dp_accounting":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'fedsim\[privacy\]'"):
        epsilon(**dict(STEP, steps=2249))  # not in memory


def test_orders_that_are_left_out_are_not_told_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """At this rate the series of some orders below 2 does not converge; others bound as well."""
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        spent = epsilon(sampling_rate=0.206452, noise_multiplier=1.0411, steps=50, delta=1e-3)
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)
    assert caplog.records == [] and 7.9 < spent < 8.1
    assert logging.getLogger("absl").isEnabledFor(logging.WARNING), "what others say of themselves is told"


# whole numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved, variance, near", [(1, 4.0, 2.5), (2, 30.0, 1.3), (20, 4000.0, 1.01)])
def test_the_bound_on_skellam_noise_holds_and_is_near(moved: int, variance: float, near: float) -> None:
    """Against the divergence itself, summed over all whole numbers that have any mass."""
    reach = int(moved + 20 * variance**0.5)
    numbers = np.arange(-reach, reach + 1)
    here, there = (skellam.logpmf(numbers - shift, variance / 2, variance / 2) for shift in (0, moved))
    for order in (2, 5, 20):
        held = np.isfinite(here) & np.isfinite(there)
        exact = float(logsumexp((order * there + (1 - order) * here)[held])) / (order - 1)
        bound = float(skellam_divergence(np.array(order), variance, moved, size=1))
        assert exact <= bound <= near * exact, (order, exact, bound)


def test_fine_steps_make_it_gaussian_and_coarse_ones_cost() -> None:
    gaussian = epsilon(sampling_rate=1, noise_multiplier=3.0, steps=10, delta=1e-5, sampling="full")
    found = []
    for step in (1e-6, 1e-2, 1.0):
        moved, size = 1 / step, 1
        whole = skellam_epsilon(variance=(3 * moved) ** 2, moved=moved + 1, size=size, steps=10, delta=1e-5)
        found.append(whole)
    assert found == sorted(found) and found[0] == pytest.approx(gaussian, rel=0.02) and found[2] > 1.5 * gaussian


@pytest.mark.parametrize(
    "bad, field",
    [
        ({"variance": 0.0}, "variance"),
        ({"moved": -1.0}, "moved"),
        ({"delta": 1.0}, "delta"),
        ({"size": -3}, "size"),
        ({"steps": 1.5}, "steps"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_numbers_of_whole_noise_are_refused(bad: dict, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}="):
        skellam_epsilon(**{"variance": 9.0, "moved": 1.0, "size": 4, "steps": 1, "delta": 1e-5} | bad)
