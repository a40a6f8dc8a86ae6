"""Readings -> one table, a row a method: means over seeds, with intervals and differences; and how they are printed."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from fedsim.report.comparison import BUDGETS, Difference, differences, interval, reference_of, to_target
from fedsim.report.readings import (
    CHOSEN,
    EQUAL_BYTES,
    EQUAL_FLOPS,
    EQUAL_ROUNDS,
    KEYS,
    TO_TARGET,
    Readings,
    by_method,
    by_setting,
    read,
)
from fedsim.results.tables import Results


# What `summary` averages over seeds, in its columns' order.
AVERAGED = [
    *EQUAL_ROUNDS,
    "rounds",
    *EQUAL_BYTES,
    *EQUAL_FLOPS,
    *CHOSEN,
    "accuracy_bottom",
    "budget_mb",
    "budget_flops",
    "trainable_params",
    "trainable_share",
    "upload_mb",
    "total_mb",
    "up_mb",
    "down_mb",
    "flops",
    "held_mb",
    "peak_mb",
    "saved",
    "seconds",
    "local_seconds",
]

Row = Mapping[str, Any]


def summary(results: Results | Readings) -> pd.DataFrame:
    """One row a method: means over seeds of what `readings.read` holds a run.

    `accuracy_std` and `equal_bytes_std` are means over seeds of the spread over participants; `accuracy_seed_std` is
    the spread of `accuracy` over seeds. `<reading>_ci` is half of a 95 % interval of the mean over seeds;
    `<reading>_difference`, `_difference_ci` and `_p` (adjusted by Holm) compare with `reference`, the row of the
    reference that validated best. `target_*`: medians of what it took to get to the accuracy `target`, lower bounds
    where `target_censored`. Accuracies and `saved` are fractions, 1 MB is 10^6 bytes. What cannot be said, for want of
    seeds, of a reference or of FedAvg, is not a number.
    """
    readings = results if isinstance(results, Readings) else read(results)
    of_settings = by_setting(readings.runs).values()
    rows = [row for runs in of_settings for row in _of_setting(runs, readings.reference)]
    first = [*KEYS, "seeds", *AVERAGED[:2], "accuracy_seed_std", *AVERAGED[2:]]
    return pd.DataFrame(rows, columns=[*first, *(name for name in rows[0] if name not in first)] if rows else first)


def _of_setting(runs: Sequence[Row], named: str | None) -> Iterable[dict[str, Any]]:
    reference = reference_of(runs, named)
    compared: dict[str, Mapping[str, Difference]] = {
        reading: differences(runs, reading, reference) if reference else {} for reading in BUDGETS.values()
    }
    for method, group in by_method(runs).items():
        row = {name: group[0][name] for name in KEYS} | {"seeds": len(group), "reference": reference or ""}
        row["accuracy_seed_std"] = _deviation([run["accuracy"] for run in group])
        row |= {name: interval([run[name] for run in group]).mean for name in AVERAGED}
        for reading in BUDGETS.values():
            found = compared[reading].get(method)
            row[f"{reading}_ci"] = interval([run[reading] for run in group]).half
            row[f"{reading}_difference"] = found.difference.mean if found else math.nan
            row[f"{reading}_difference_ci"] = found.difference.half if found else math.nan
            row[f"{reading}_p"] = found.p if found else math.nan
        taken = {what: to_target(group, what) for what in TO_TARGET}
        row |= {f"target_{what}": each.median for what, each in taken.items()}
        row |= {"target": group[0]["target"], "target_reached": taken["rounds"].reached}
        yield row | {"target_censored": taken["rounds"].censored}


def _deviation(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.stdev(known) if len(known) > 1 else math.nan


# ---- in print --------------------------------------------------------------------------------------------------------


def significant(number: float) -> str:
    """Three significant digits, never in powers of ten: 0.0123, 4.57, 1,235."""
    if math.isnan(number) or number == 0:
        return "-" if number else "0"
    rounded = float(f"{number:.2e}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded if digits else number:,.{digits}f}"


def percent(number: float) -> str:
    return "-" if math.isnan(number) else f"{100 * number:.1f}"


def _spread(mean: float, deviation: float) -> str:
    return percent(mean) if math.isnan(deviation) else f"{percent(mean)} ± {percent(deviation)}"


def _count(number: float) -> str:
    """1234567 -> 1.23 M"""
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{significant(number / size)} {unit}"
    return significant(number) if number % 1 else f"{number:.0f}"


def _round(number: float) -> str:
    """A round, or the mean of several seeds' rounds where they differ."""
    return "-" if math.isnan(number) else f"{number:.1f}".removesuffix(".0")


# Heading -> cell. Every table in print is made of these.
COMPACT: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "leaves": lambda row: row["leaves"] or "-",
    "accuracy ± ci, %": lambda row: _with_ci(row, "accuracy"),
    "spread": lambda row: percent(row["accuracy_std"]),
    "worst, %": lambda row: percent(row["accuracy_min"]),
    "server's own, %": lambda row: percent(row["accuracy_global"]),
    "at equal bytes ± ci, %": lambda row: _with_ci(row, "equal_bytes_accuracy"),
    "trainable": lambda row: _count(row["trainable_params"]),
    "MB per upload": lambda row: significant(row["upload_mb"]),
    "MB in total": lambda row: significant(row["total_mb"]),
    "saved vs FedAvg": lambda row: "-" if math.isnan(row["saved"]) else f"{percent(row['saved'])} %",
    "seconds": lambda row: significant(row["seconds"]),
}
# What the columns of `COMPACT` say, printed under it.
LEGEND = {
    "leaves": "what leaves a participant, from nothing to a model; up to an auxiliary model, none of its own does, and "
    "the two classes are to be compared apart",
    "accuracy ± ci": "of the model that each participant deploys, on the common test set: mean over participants and "
    "seeds, with half of its 95 % interval over seeds (Student's t; none for one seed)",
    "spread": "standard deviation of that accuracy over participants, mean over seeds; worst: the worst participant",
    "server's own": "accuracy of the server's model, where it has one: what authors of sub-model methods report",
    "at equal bytes ± ci": "the same accuracy at equal bytes, see below",
    "trainable": "parameters that a participant trains; saved: of the bytes of FedAvg's upload, 1 MB = 10^6 bytes",
    "in total": "sent and received by all participants, public models that they begin with included",
}


# What it takes, for everyone and for one participant: by count, so that it does not depend on the machine.
COSTS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "read at round": lambda row: _round(row["equal_bytes_round"]),
    "deployed, %": lambda row: percent(row["accuracy"]),
    "own labels, %": lambda row: percent(row["accuracy_local"]),
    "worst, %": lambda row: percent(row["accuracy_min"]),
    "sd over seeds": lambda row: percent(row["accuracy_seed_std"]),
    "at equal bytes, %": lambda row: percent(row["equal_bytes_accuracy"]),
    "MB up": lambda row: significant(row["up_mb"]),
    "MB down": lambda row: significant(row["down_mb"]),
    "FLOPs": lambda row: _count(row["flops"]),
    "held, MB": lambda row: significant(row["held_mb"]),
    "peak, MB": lambda row: significant(row["peak_mb"]),
    "covered, %": lambda row: percent(row["coverage"]),
    "least covered, %": lambda row: percent(row["coverage_min"]),
}


def _with_ci(row: Row, reading: str) -> str:
    return _spread(row[reading], row.get(f"{reading}_ci", math.nan))


def _difference(row: Row, reading: str) -> str:
    """Percentage points against the reference: `+1.2 ± 0.8 (p 0.04)`."""
    if row["method"] == row["reference"]:
        return "reference"
    mean, half, p = (row[f"{reading}_{name}"] for name in ("difference", "difference_ci", "p"))
    if math.isnan(mean):
        return "-"
    spread = "" if math.isnan(half) else f" ± {percent(half)}"
    return f"{100 * mean:+.1f}{spread}" + ("" if math.isnan(p) else f" (p {_probability(p)})")


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.1f}"


def _to_target(row: Row, what: str, shown: Callable[[float], str]) -> str:
    """What it took; `>` where it would have taken more, and how many seeds got there where not all did."""
    if math.isnan(row[f"target_{what}"]):
        return "-"
    reached = "" if row["target_reached"] == row["seeds"] else f" ({row['target_reached']} of {row['seeds']})"
    return f"{'> ' if row['target_censored'] else ''}{shown(row[f'target_{what}'])}{reached}"


# What seeds say: intervals at three budgets, and who is left behind; how far each method is from the reference.
COMPARED: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "seeds": lambda row: str(row["seeds"]),
    "equal rounds, %": lambda row: _with_ci(row, "accuracy"),
    "equal bytes, %": lambda row: _with_ci(row, "equal_bytes_accuracy"),
    "equal FLOPs, %": lambda row: _with_ci(row, "equal_flops_accuracy"),
    "best validated round, %": lambda row: percent(row["chosen_accuracy"]),
    "bottom 10 %": lambda row: percent(row["accuracy_bottom"]),
    "worst, %": lambda row: percent(row["accuracy_min"]),
}

DIFFERENCES: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "at equal rounds": lambda row: _difference(row, "accuracy"),
    "at equal bytes": lambda row: _difference(row, "equal_bytes_accuracy"),
    "at equal FLOPs": lambda row: _difference(row, "equal_flops_accuracy"),
}

TARGETS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "target, %": lambda row: percent(row["target"]),
    "rounds": lambda row: _to_target(row, "rounds", _round),
    "MB": lambda row: _to_target(row, "mb", significant),
    "FLOPs": lambda row: _to_target(row, "flops", _count),
}


def cells(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]] = COMPACT) -> list[list[str]]:
    return [[cell(row) for cell in columns.values()] for row in rows]
