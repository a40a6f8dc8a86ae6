"""An audit that tries to tell whether one participant took part, and would find noise that was left out.

Federated averaging of a linear model by full-batch steps, without any engine: eight participants, three rounds, and the
canary, whose updates all point one way. Who sees the models sums up their moves that way, and thresholds. From the
rates of false and missed alarms over runs follows a lower bound of epsilon (Jagielski, Ullman, Oprea 2020, equation 2),
each rate at the end of its exact interval (Clopper, Pearson 1934): at most once in a million audits is it wrong.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from fedsim.algorithm import ClientUpdate, whole_sum
from fedsim.core.seeding import generator
from fedsim.privacy import ParticipantDP, epsilon, noise_multiplier


RUNS, ROUNDS, PEOPLE, SIZE = 200, 3, 8, 6
DELTA, CONFIDENCE = 1e-5, 1 - 1e-6
CLAIMED = 1.0
CANARY = torch.eye(SIZE)[0]
INPUTS = torch.randn(PEOPLE, 10, SIZE, generator=generator(0, "inputs"))
OUTPUTS = INPUTS @ torch.ones(SIZE)


def updates(model: Tensor, pair: ParticipantDP, canary: bool, run: int, round: int) -> Iterator[ClientUpdate]:
    for id_ in range(PEOPLE + canary):
        if id_ < PEOPLE:
            gradient = INPUTS[id_].T @ (INPUTS[id_] @ model - OUTPUTS[id_]) / 10
            trained = {"w": model - 0.1 * gradient}
        else:
            trained = {"w": model + 1e6 * CANARY}
        yield pair.client(ClientUpdate(id_, trained, 1), {"w": model}, {}, context(run, round, id_))


def context(run: int, round: int, client: int = -1) -> Any:
    return SimpleNamespace(generator=lambda purpose: generator(run, purpose, round, client))


def seen(pair: ParticipantDP, canary: bool, run: int) -> float:
    """How far the models of one run have moved the canary's way, beyond what the others alone would do."""
    model, moved = torch.zeros(SIZE), 0.0
    for round in range(1, ROUNDS + 1):
        payload = partial(dict, w=model)
        arriving, _ = pair.server(updates(model, pair, canary, run, round), {}, payload, context(run, round))
        others = whole_sum(updates(model, dataclasses.replace(pair, noise_multiplier=1e-9), False, run, round))
        total = whole_sum(arriving)
        assert total is not None and others is not None
        after = total.mean({})["w"]
        moved += float((after - others.mean({})["w"]) @ CANARY)
        model = after
    return moved


def least_epsilon(without: np.ndarray, with_: np.ndarray) -> float:
    """The largest lower bound over thresholds that half of the runs choose; the other half measures."""
    half = RUNS // 2
    threshold = max(
        np.concatenate([without[:half], with_[:half]]), key=lambda at: bound(without[:half], with_[:half], at)
    )
    return bound(without[half:], with_[half:], threshold)


def bound(without: np.ndarray, with_: np.ndarray, threshold: float) -> float:
    false, missed = (upper(int(each.sum()), len(each)) for each in (without >= threshold, with_ < threshold))
    return max(
        (math.log((1 - DELTA - x) / y) for x, y in ((false, missed), (missed, false)) if x < 1 - DELTA), default=0
    )


def upper(found: int, of: int) -> float:
    """The upper end of the exact interval of a rate."""
    return 1.0 if found == of else float(beta.ppf(1 - (1 - CONFIDENCE) / 4, found + 1, of - found))


def audited(pair: ParticipantDP) -> float:
    seeds = range(RUNS)
    without = np.array([seen(pair, False, seed) for seed in seeds])
    return least_epsilon(without, np.array([seen(pair, True, RUNS + seed) for seed in seeds]))


@pytest.fixture(scope="module")
def pair() -> ParticipantDP:
    known: dict[str, Any] = {
        "sampling_rate": 1,
        "steps": ROUNDS,
        "delta": DELTA,
        "sampling": "full",
        "accountant": "pld",
    }
    sigma = noise_multiplier(epsilon=CLAIMED, **known)
    assert epsilon(noise_multiplier=sigma, **known) <= CLAIMED
    return ParticipantDP(0.1, sigma, DELTA, cohort=PEOPLE)


def test_the_audit_stays_below_what_is_claimed(pair: ParticipantDP) -> None:
    assert audited(pair) <= CLAIMED


def test_the_audit_finds_noise_that_was_left_out(pair: ParticipantDP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.privacy.dp.noised", lambda tree, std, stream: tree)
    assert audited(pair) > 1.5 * CLAIMED
