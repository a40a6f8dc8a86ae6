"""Runs -> readings: what each run reached, read at three budgets, and what it took.

Every run is read at **equal rounds** (after its last round), at **equal bytes** and at **equal FLOPs**: at the last
evaluated round at which it had sent and received, or its participants had computed, no more than the reference
(Fed-Grow, unless another is named) did in its whole run. No rule here looks at a test score: rounds are read where a
budget ends, or where validation was best.

Runs are compared within a *setting*: one suite, one data set, one population of small models, one way of dealing.
"""

import dataclasses
import math
import statistics
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from fedsim.core.canonical import parsed, with_todays_names
from fedsim.core.updates import Leaves
from fedsim.report.names import begun_with, method_names, settings_of, small_forms
from fedsim.results.tables import Results


MEGABYTE = 10**6
METHOD_ORDER = (
    "fedgrow fedgrow_lowrank fedgrow_residual fedgrow_anchored fedgrow_matched fedgrow_joint fedgrow_no_federation "
    "fedgrow_released_code fedgrow_analytic fedgrow_core fedgrow_core_warm fedgrow_fused fedavg fedavg_small "
    "fedavg_mid fedprox heterofl heterofl_clean fedrolex fjord federated_dropout fedbrb_like depthfl progfed "
    "grow_then_fedavg exclusive ensemble_small local_only fedit ffa_lora flora hetlora fedsb analytic fedproto fedtgp "
    "fedgh lg_fedavg fedkd fedmrl"
)
RANK = {name: place for place, name in enumerate(METHOD_ORDER.split())}
LEAVES = {what: place for place, what in enumerate(typing.get_args(Leaves))}
KEYS = ["setting", "method", "algorithm", "preset", "leaves"]
WORST_SHARE = 0.1  # of participants: whose mean is `accuracy_bottom`
# Accuracy at which costs "to a target" are read, by data set.
TARGET_ACCURACY = {
    "digits": 0.8,
    "pydoc": 0.25,
    "sst2": 0.55,
    "ag_news": 0.6,
    "newsgroups": 0.3,
    "cifar10": 0.25,
    "cifar100": 0.1,
    "flowers102": 0.1,
}
# Columns of a reading -> columns of `rounds`.
EQUAL_ROUNDS = {
    "accuracy": "accuracy_mean",
    "accuracy_std": "accuracy_std",
    "accuracy_min": "accuracy_min",
    "accuracy_local": "accuracy_local_mean",
    "accuracy_local_min": "accuracy_local_min",
    "accuracy_val": "accuracy_val_mean",
    "accuracy_global": "accuracy_global",
    "coverage": "coverage",
    "coverage_min": "coverage_min",
    "loss": "loss_mean",
}
EQUAL_BYTES = {
    "equal_bytes_accuracy": "accuracy_mean",
    "equal_bytes_std": "accuracy_std",
    "equal_bytes_min": "accuracy_min",
    "equal_bytes_local": "accuracy_local_mean",
    "equal_bytes_loss": "loss_mean",
    "equal_bytes_round": "round",
}
EQUAL_FLOPS = {"equal_flops_accuracy": "accuracy_mean", "equal_flops_round": "round"}
CHOSEN = {"chosen_accuracy": "accuracy_mean", "chosen_round": "round"}
TO_TARGET = ("rounds", "mb", "flops")

Row = Mapping[str, Any]
Runs = Sequence[Row]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows. Text that is null becomes empty, a number that is null is `nan`."""
    columns = {
        str(name): (column if pd.api.types.is_numeric_dtype(column) else column.fillna("")).tolist()
        for name, column in frame.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def sent_bytes(round_: Row) -> int:
    return round_["bytes_up_total"] + round_["bytes_down_total"]


def evaluated(history: Runs) -> list[Row]:
    """Those of one run's rounds that have an accuracy."""
    return [row for row in history if not math.isnan(row["accuracy_mean"])]


def last_within(history: Runs, spent: Callable[[Row], float], budget: float) -> Row | None:
    """The last evaluated round of one run within a budget.

    Round 0 is before any federated round and always counts as affordable: a method whose first federated round already
    exceeds the budget is read there. `None` if none of these rounds was evaluated.
    """
    within = evaluated([row for row in history if spent(row) <= budget or row["round"] == 0])
    return within[-1] if within else None


def best_validated(history: Runs) -> Row | None:
    """The evaluated round with the highest validation accuracy, of equal ones the first; `None` without any."""
    known = [row for row in evaluated(history) if not math.isnan(row["accuracy_val_mean"])]
    return max(known, key=lambda row: row["accuracy_val_mean"], default=None)


def to_target(history: Runs, target: float) -> Row | None:
    """The first evaluated round at which accuracy is at least `target`; `None` if the run never got there."""
    return next((row for row in evaluated(history) if row["accuracy_mean"] >= target), None)


def histories(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each run, in order, by run id, with FLOPs so far (`flops_total`); a run without rounds has none."""
    frame = results.rounds.sort_values(["run_id", "round"])
    frame = frame.assign(flops_total=frame.groupby("run_id")["flops"].cumsum())
    by_run: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in records(frame):
        by_run[row["run_id"]].append(row)
    return by_run


def finished_runs(results: Results) -> list[dict[str, Any]]:
    """The finished runs, with their `setting` and `method` in words."""
    finished = [run for run in records(results.runs) if run["status"] == "finished"]
    runs = [run | {"parsed": _config_of(run)} for run in finished]
    runs = [run | {"setting": setting} for run, setting in zip(runs, settings_of(runs), strict=True)]
    return [run | {"method": method} for run, method in zip(runs, method_names(runs), strict=True)]


def _config_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config. **Raises:** `ValueError` if it is none whose tiers can be told."""
    try:
        config = with_todays_names(parsed(run["config"]))
        _ = small_forms(config), begun_with(config)
        return config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"run {run['run_id']}: its config cannot be understood ({error!r})") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Readings:
    """Everything that tables, figures and notes are made of, read once.

    - `runs`: one row a finished run (`finished_runs`), and what was read of it. - `rounds`: `histories`.
    - `reference`: the algorithm or method that others are compared with, if it was named.
    """

    runs: list[dict[str, Any]]
    rounds: Mapping[str, Runs]
    reference: str | None = None


def read(results: Results, target: float | None = None, reference: str | None = None) -> Readings:
    """One row a finished run: its accuracies at every budget, its cost, and the saving against FedAvg's upload.

    - `target`: accuracy to reach; None: `TARGET_ACCURACY` of its data set.
    - `reference`: an algorithm or a method (`referred`); None: Fed-Grow, or without it the first method.

    **Raises:** `ValueError` for a reference that no finished run has.
    """
    runs, rounds = finished_runs(results), histories(results)
    if reference is not None and not referred(runs, reference):
        there = sorted({name for run in runs for name in (run["algorithm"], run["method"])})
        raise ValueError(f"reference={reference!r}: no finished run has it; there are {', '.join(there) or 'none'}")
    totals = {run["run_id"]: max((sent_bytes(row) for row in rounds[run["run_id"]]), default=0) for run in runs}
    work = {run["run_id"]: max((row["flops_total"] for row in rounds[run["run_id"]]), default=0) for run in runs}
    of_bytes, of_flops = _budgets(runs, totals, reference), _budgets(runs, work, reference)
    bottom, uploads = _bottom(results), _fedavg_uploads(runs)
    rows = []
    for run in runs:
        history, where = rounds[run["run_id"]], (run["setting"], run["seed"])
        nothing = (math.nan, "")
        (budget, budget_method), (flops, flops_method) = of_bytes.get(where, nothing), of_flops.get(where, nothing)
        last = evaluated(history)[-1] if evaluated(history) else None
        aim = TARGET_ACCURACY.get(run["dataset"], math.nan) if target is None else target
        rows.append(
            {name: run[name] for name in (*KEYS, "seed", "run_id", "federation_sha256", "labels", "parsed", "suite")}
            | {"rounds": history[-1]["round"] if history else math.nan}
            | _columns(EQUAL_ROUNDS, last)
            | _columns(EQUAL_BYTES, last_within(history, sent_bytes, budget) if budget_method else None)
            | _columns(
                EQUAL_FLOPS, last_within(history, lambda row: row["flops_total"], flops) if flops_method else None
            )
            | _columns(CHOSEN, best_validated(history))
            | {"accuracy_bottom": bottom.get(run["run_id"], math.nan)}
            | {"target": aim, **_reached(history, aim)}
            | {"budget_mb": budget / MEGABYTE, "budget_method": budget_method}
            | {"budget_flops": flops, "flops_method": flops_method}
            | {"trainable_params": run["trainable_params"], "upload_mb": run["bytes_per_upload"] / MEGABYTE}
            | {f"{way}_mb": sum(row[f"bytes_{way}"] for row in history) / MEGABYTE for way in ("up", "down")}
            | {"flops": work[run["run_id"]]}
            | {f"{name}_mb": run[f"{name}_bytes"] / MEGABYTE for name in ("held", "peak")}
            | {"total_mb": totals[run["run_id"]] / MEGABYTE, "saved": _saved(run, uploads)}
            | {"seconds": run["wall_seconds"], "command": run["command"]}
            | {"trainable_share": run["trainable_params"] / run["target_params"]}
            | {"local_seconds": sum(row["wall_seconds"] for row in history if row["round"] == 0)}
            | {"state_sha256": history[-1]["state_sha256"] if history else ""}
        )
    return Readings(sorted(rows, key=lambda row: (row["setting"], *in_order(row), row["seed"])), rounds, reference)


def in_order(run: Row) -> tuple[int, int, str]:
    """Where a method stands in lists: by what leaves a participant, the least first; earlier versions did not say."""
    return LEAVES.get(run["leaves"], len(LEAVES)), RANK.get(run["algorithm"], len(RANK)), run["method"]


def referred(runs: Runs, reference: str | None) -> list[Row]:
    """Of one setting's runs, those of the algorithm or method that others are compared with.

    None: those of `fedgrow` or, where there are none, of the first method in the list that sent anything.
    """
    if reference is not None:
        return [run for run in runs if reference in (run["algorithm"], run["method"])]
    grown = [run for run in runs if run["algorithm"] == "fedgrow"]
    sent = [run for run in runs if run.get("bytes_per_upload", run.get("upload_mb", 1))]
    first = min(sent or runs, key=in_order, default=None)
    return grown or [run for run in runs if first is not None and run["method"] == first["method"]]


def by_setting(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["setting"]].append(row)
    return groups


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one setting by method, in the order of the rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"]].append(row)
    return groups


# parts ----------------------------------------------------------------------------------------------------------------


def _columns(columns: Mapping[str, str], round_: Row | None) -> dict[str, float]:
    return {ours: math.nan if round_ is None else round_[theirs] for ours, theirs in columns.items()}


def _reached(history: Runs, target: float) -> dict[str, Any]:
    """Rounds, MB and FLOPs to the target; where it was never reached, what was spent without reaching it."""
    if math.isnan(target) or not evaluated(history):
        return {"reached": False} | {f"target_{name}": math.nan for name in TO_TARGET}
    found = to_target(history, target)
    at = history[-1] if found is None else found
    spent = (at["round"], sent_bytes(at) / MEGABYTE, at["flops_total"])
    return {"reached": found is not None} | {f"target_{name}": x for name, x in zip(TO_TARGET, spent, strict=True)}


def _bottom(results: Results) -> dict[str, float]:
    """By run, the mean accuracy of the tenth of its participants (at least one) that are worst off at its end."""
    means: dict[str, float] = {}
    for run_id, frame in results.deployed.groupby("run_id"):
        accuracies = sorted(frame["accuracy"])
        means[str(run_id)] = statistics.fmean(accuracies[: math.ceil(WORST_SHARE * len(accuracies))])
    return means


def _budgets(runs: Runs, totals: Mapping[str, float], reference: str | None) -> dict[tuple, tuple[float, str]]:
    """By setting and seed: what the run of the reference that spent least has spent, and its method."""
    candidates = defaultdict(list)
    for of_setting in by_setting(runs).values():
        for run in referred(of_setting, reference):
            if totals[run["run_id"]]:  # nothing is no budget
                candidates[run["setting"], run["seed"]].append((totals[run["run_id"]], run["method"]))
    return {key: min(found) for key, found in candidates.items()}


def _fedavg_uploads(runs: Runs) -> dict[tuple, set[int]]:
    """FedAvg's upload by setting and seed, and by setting, seed and target."""
    uploads: dict[tuple, set[int]] = defaultdict(set)
    for run in runs:
        if run["algorithm"] == "fedavg":
            uploads[run["setting"], run["seed"]].add(run["bytes_per_upload"])
            uploads[run["setting"], run["seed"], run["model"]].add(run["bytes_per_upload"])
    return uploads


def _saved(run: Row, uploads: Mapping[tuple, set[int]]) -> float:
    """1 - upload / FedAvg's upload. FedAvg's of the same setting and seed and, where there are several, same target."""
    where = (run["setting"], run["seed"])
    found = uploads.get((*where, run["model"])) or uploads.get(where) or set()
    return 1 - run["bytes_per_upload"] / min(found) if len(found) == 1 and min(found) > 0 else math.nan
