"""What a number of noised sums gives away: epsilon from noise, noise from epsilon, delta from both.

    one step    the sum of what a random part of N people send, each of norm at most C, + N(0, sigma^2 C^2)
    T steps     are (epsilon, delta)-differentially private

    q      sampling rate: the share of N that a step sees (`sampling_rate`)
    sigma  `noise_multiplier`: standard deviation of the noise over C, whatever the adjacency

What is compared, and the theorem, by `sampling`:

- "poisson": everyone by a coin of their own. With and without one person: what changes is at most C. RDP: Mironov,
  Talwar, Zhang 2019, section 3.3. PLD: Doroshenko et al. 2022.
- "fixed": qN people, uniformly without replacement. One person replaced by another: the sum changes by up to 2C, and
  sigma counts as half of what it is. RDP: Wang, Balle, Kasiviswanathan 2019, theorem 9, or no amplification, where that
  is less. PLD: refused, for want of a theorem.
- "full": everyone, in every step; nothing is amplified. With and without one person. RDP: alpha / 2 sigma^2 (Mironov
  2017, corollary 3). PLD: T steps are one of sigma / sqrt(T), exactly (Balle, Wang 2018, theorem 8).

"rdp" goes from Renyi divergence to epsilon as dp-accounting does (Canonne, Kamath, Steinke 2020, proposition 12). "pld"
is its composition of privacy loss distributions: an upper bound, of the worse of the two directions. Order alone
decides amplification: batches of a shuffled shard are not "poisson".
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp

from fedsim.core.fields import refuse


Accountant = Literal["rdp", "pld"]
Sampled = Literal["poisson", "fixed", "full"]
WHOLE_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1000)  # beyond, binomials overflow
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100) if tenth % 10), *WHOLE_ORDERS)
LEAST, MOST = 1e-6, 1e6  # a noise multiplier
LEAST_PLD = 0.1  # the same: with less, distributions of losses take minutes and gigabytes
FINE = 1.0001  # what is solved for is at most so many times too large


def epsilon(
    *,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
    sampling: Sampled = "poisson",
) -> float:
    """The epsilon at which so many steps are (epsilon, delta)-private.

    **Arguments:**

    - `sampling_rate`: the expected share of people, or of examples, in a step; 1 where `sampling="full"`.
    - `noise_multiplier`: standard deviation of the noise over the clipping norm, above 0.
    - `steps`: rounds, or steps of an optimizer; at least 1. - `delta`: between 0 and 1, both excluded.
    - `accountant`, `sampling`: as above.

    **Raises:** `ValueError` for an argument out of its range, and where there is no theorem; `ImportError` without
    dp-accounting.
    """
    _check(sampling_rate, steps, accountant, sampling)
    _check_above(noise_multiplier=noise_multiplier)
    _check_delta(delta)
    if accountant == "pld" and noise_multiplier < LEAST_PLD:
        refuse("noise_multiplier", noise_multiplier, f"at least {LEAST_PLD} where accountant='pld': else 'rdp'")
    return _epsilon(float(sampling_rate), float(noise_multiplier), steps, float(delta), accountant, sampling)


def noise_multiplier(
    *,
    epsilon: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
    sampling: Sampled = "poisson",
) -> float:
    """The least noise multiplier, to 0.01 % and never less, with which so many steps are (epsilon, delta)-private.

    **Raises:** as `fedsim.privacy.epsilon`.
    """
    _check(sampling_rate, steps, accountant, sampling)
    _check_above(epsilon=epsilon)
    _check_delta(delta)

    def enough(sigma: float) -> bool:
        if accountant == "pld" and sigma < LEAST_PLD:
            return False
        return _epsilon(float(sampling_rate), sigma, steps, float(delta), accountant, sampling) <= epsilon

    start = 1.0
    if accountant == "pld":  # needs about as much, and each try takes longer
        known: dict[str, Any] = {"sampling_rate": sampling_rate, "steps": steps, "delta": delta, "sampling": sampling}
        start = noise_multiplier(epsilon=epsilon, **known)
    found = least(enough, start)
    if found == math.inf:
        refuse("epsilon", epsilon, f"more: at delta={delta} no noise_multiplier up to {MOST:g} is enough")
    return found


def delta(
    *,
    epsilon: float,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    accountant: Accountant = "rdp",
    sampling: Sampled = "poisson",
) -> float:
    """The least delta, to 0.01 % and never less, at which so many steps are (epsilon, delta)-private.

    **Raises:** as `fedsim.privacy.epsilon`; `ValueError` where no delta from 1e-30 to 1 does it.
    """
    _check(sampling_rate, steps, accountant, sampling)
    _check_above(epsilon=epsilon, noise_multiplier=noise_multiplier)

    def enough(delta: float) -> bool:
        known = float(sampling_rate), float(noise_multiplier), steps
        return delta >= 1 or _epsilon(*known, delta, accountant, sampling) <= epsilon

    found = least(enough, 1e-5, smallest=1e-30)
    if found >= 1:
        refuse("epsilon", epsilon, f"more, with noise_multiplier={noise_multiplier}: no delta below 1 goes with it")
    return found


def skellam_epsilon(*, variance: float, moved: float, size: int, steps: int, delta: float) -> float:
    """The epsilon of sums of whole numbers under Skellam noise: Agarwal, Kairouz, Liu 2021, theorem 3.5, composed.

        eps(alpha) = alpha D2^2 / 2 mu + min(((2 alpha - 1) D2^2 + 6 D1) / 4 mu^2, 3 D1 / 2 mu),  D1 <= sqrt(d) D2, D2^2

    **Arguments:**

    - `variance`: mu, of the noise of a sum. - `moved`: D2, by how much a participant moves it. - `size`: d, of numbers.
    - `steps`: rounds, everyone in each. - `delta`: as of `epsilon`.
    """
    _check_above(variance=variance, moved=moved)
    _check_delta(delta)
    _check_whole(size=size, steps=steps)
    _, rdp, _ = _library()
    divergences = skellam_divergence(np.array(WHOLE_ORDERS, float), variance, moved, size)
    spent, _ = rdp.compute_epsilon(WHOLE_ORDERS, steps * divergences, delta)
    return max(0.0, float(spent))


def skellam_divergence(order: np.ndarray, variance: float, moved: float, size: int) -> np.ndarray:
    """eps(alpha) of one sum, for whole orders."""
    D1 = moved * min(math.sqrt(size), moved)
    more = np.minimum(((2 * order - 1) * moved**2 + 6 * D1) / (4 * variance**2), 3 * D1 / (2 * variance))
    return order * moved**2 / (2 * variance) + more


# by the theorems ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # every round of every run of a sweep asks
def _epsilon(q: float, sigma: float, steps: int, delta: float, accountant: str, sampling: str) -> float:
    if q == 1 and sampling == "poisson":
        sampling = "full"
    if accountant == "pld" and sampling == "full":
        return _exact(sigma / math.sqrt(steps), delta)
    dp, rdp, pld = _library()
    if sampling == "fixed":
        divergences = steps * np.array([_without_replacement(q, sigma / 2, order) for order in ORDERS])
        spent, _ = rdp.compute_epsilon(ORDERS, divergences, delta)
        return max(0.0, float(spent))
    gaussian = dp.GaussianDpEvent(sigma)
    ledger = rdp.RdpAccountant(ORDERS) if accountant == "rdp" else pld.PLDAccountant()
    with _unwarned():
        ledger.compose(gaussian if sampling == "full" else dp.PoissonSampledDpEvent(q, gaussian), steps)
        return max(0.0, float(ledger.get_epsilon(delta)))


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without a line for every order that is left out: each gives a bound by itself, and the least is taken."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _without_replacement(q: float, sigma: float, order: float) -> float:
    """Wang, Balle, Kasiviswanathan 2019, theorem 9, of epsilon(j) = j / 2 sigma^2 without a bound."""
    unsampled = order / (2 * sigma**2)
    if order not in WHOLE_ORDERS:  # the theorem is about whole orders
        return unsampled
    j = np.arange(2, int(order) + 1)
    log_binomials = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
    log_terms = j * math.log(q) + log_binomials + (j - 1) * j / (2 * sigma**2) + math.log(2)
    second = 1 / sigma**2  # epsilon(2), of which the first term has a smaller bound where that is small
    log_terms[0] += min(0.0, math.log(4) + math.log(-math.expm1(-second)) - math.log(2))
    total: Any = logsumexp([0.0, *log_terms])
    return min(unsampled, float(total) / (order - 1))


def _exact(sigma: float, delta: float) -> float:
    """The epsilon of one Gaussian mechanism: Balle, Wang 2018, theorem 8, solved for it."""

    def excess(epsilon: float) -> float:
        nearer, farther = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return math.exp(log_ndtr(nearer)) - math.exp(epsilon + log_ndtr(farther)) - delta

    most = 1 / (2 * sigma**2) + math.sqrt(2 * math.log(1 / delta)) / sigma  # zero-concentrated privacy's bound
    root: Any = brentq(excess, 0.0, most + 1e-9, xtol=1e-12) if excess(0.0) > 0 else 0.0
    return float(root)


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Google's accountants, by divergence and by loss."""
    try:
        import dp_accounting
        from dp_accounting import pld
        from dp_accounting.rdp import rdp_privacy_accountant
    except ImportError as error:
        accepted = "accounting for differential privacy needs dp-accounting: pip install 'fedsim[privacy]'"
        raise ImportError(accepted) from error
    return dp_accounting, rdp_privacy_accountant, pld


def least(enough: Callable[[float], bool], start: float, smallest: float = 1e-6) -> float:
    """The least number that is enough, where all larger ones are, too; never too little. Infinity: none is."""
    low = high = start
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            return math.inf
    while low == high or enough(low):
        low, high = low / 2, low
        if low < smallest:
            return high
    while high / low > FINE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# checks ---------------------------------------------------------------------------------------------------------------


def _check(sampling_rate: Any, steps: Any, accountant: Any, sampling: Any) -> None:
    for name, value, accepted in (("accountant", accountant, Accountant), ("sampling", sampling, Sampled)):
        if value not in get_args(accepted):
            refuse(name, value, " or ".join(map(repr, get_args(accepted))))
    if not _number(sampling_rate) or not 0 < sampling_rate <= 1:
        refuse("sampling_rate", sampling_rate, "above 0 and at most 1")
    if sampling == "full" and sampling_rate != 1:
        refuse("sampling_rate", sampling_rate, "1 where sampling='full': without sampling nothing is amplified")
    if accountant == "pld" and sampling == "fixed":
        refuse("accountant", accountant, "'rdp' where sampling='fixed': no theorem composes its privacy losses")
    _check_whole(steps=steps)


def _check_above(**values: Any) -> None:
    for name, value in values.items():
        if not _number(value) or not 0 < value < math.inf:
            refuse(name, value, "a finite number greater than 0")
        if name == "noise_multiplier" and value < LEAST:
            refuse(name, value, f"at least {LEAST:g}: below, nothing is private")


def _check_whole(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            refuse(name, value, "a whole number, at least 1")


def _check_delta(delta: Any) -> None:
    if not _number(delta) or not 0 < delta < 1:
        refuse("delta", delta, "between 0 and 1")


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)
