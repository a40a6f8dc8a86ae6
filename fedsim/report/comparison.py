"""What several seeds say: means with 95 % confidence intervals, paired differences, and costs to a target.

Seeds are the sample: each is another federation, and all methods meet the same one (common random numbers), so methods
are compared seed by seed. Intervals and tests are Student's t on the seeds' values or differences.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from fedsim.report.readings import TO_TARGET, by_method, referred


CONFIDENCE = 0.95
BUDGETS = {"rounds": "accuracy", "bytes": "equal_bytes_accuracy", "FLOPs": "equal_flops_accuracy"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and the half-width of its confidence interval (not a number for fewer than two)."""

    mean: float
    half: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval, `t_{n-1} s / sqrt(n)`; values that are not numbers are left out."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return Interval(known[0] if known else math.nan, math.nan, len(known))
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
    return Interval(statistics.fmean(known), t * statistics.stdev(known) / math.sqrt(len(known)), len(known))


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, over the seeds both have. `p`: adjusted by Holm over the setting's methods."""

    difference: Interval
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that of all comparisons together at most 5 % are wrongly called different (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, never falls below those before it, and is at most 1. Those that
    are not numbers stay so and do not count.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, floor = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p))
        adjusted[place] = floor
    return adjusted


def reference_of(runs: Sequence[Row], reference: str | None = None) -> str | None:
    """The method others are compared with: of those that may be (`referred`), the one with the highest validation
    accuracy after its last round.

    Of one setting's runs; None if none was validated, unless a single method was named.
    """
    means = {
        method: statistics.fmean(row["accuracy_val"] for row in rows)
        for method, rows in by_method(referred(runs, reference)).items()
    }
    known = {method: mean for method, mean in means.items() if not math.isnan(mean)}
    if reference is not None and len(means) == 1:
        return next(iter(means))
    return max(known, key=lambda method: known[method], default=None)


def differences(runs: Sequence[Row], reading: str, reference: str) -> dict[str, Difference]:
    """Of one setting's methods, each against the reference, at one reading (a value of `BUDGETS`)."""
    values = {
        method: {row["seed"]: row[reading] for row in rows if not math.isnan(row[reading])}
        for method, rows in by_method(runs).items()
    }
    pairs = {
        method: [found[seed] - values[reference][seed] for seed in sorted(found) if seed in values[reference]]
        for method, found in values.items()
        if method != reference
    }
    adjusted = holm([_p(pair) for pair in pairs.values()])
    return {method: Difference(interval(pair), p) for (method, pair), p in zip(pairs.items(), adjusted, strict=True)}


def _p(pairs: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test; not a number where seeds do not differ, or there are too few."""
    if len(pairs) < 2 or statistics.stdev(pairs) == 0:
        return math.nan
    t = statistics.fmean(pairs) / (statistics.stdev(pairs) / math.sqrt(len(pairs)))
    return float(2 * stats.t.sf(abs(t), len(pairs) - 1))


@dataclass(frozen=True)
class ToTarget:
    """What it took to reach the target: the median over seeds; `censored`: that half of them or more never did, and the
    median is only a lower bound. `reached` of `n` seeds got there."""

    median: float
    censored: bool
    reached: int
    n: int


def to_target(runs: Sequence[Row], what: str) -> ToTarget:
    """Of one method's runs; `what` is one of `TO_TARGET`.

    A run that never reached the target counts as one that would have needed more than all it spent: sorted after those
    that did, so that it can only move the median up.
    """
    assert what in TO_TARGET, what
    known = [run for run in runs if not math.isnan(run[f"target_{what}"])]
    if not known:
        return ToTarget(math.nan, False, 0, 0)
    ordered = sorted((not run["reached"], run[f"target_{what}"]) for run in known)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    reached = sum(run["reached"] for run in known)
    return ToTarget((low[1] + high[1]) / 2, high[0], reached, len(known))
