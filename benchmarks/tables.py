"""Runs -> readings -> one table: what each method reaches, and what it had to send for that.

Every method is read twice. At **equal rounds**: after its last round. At **equal bytes**: at the last round at which it
had sent and received no more than Fed-Grow did in its whole run. Runs are compared within a *setting* (one suite on one
federation); a row is one method of a setting, averaged over seeds.
"""

import json
import math
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.results import Results


MEGABYTE = 10**6
METHOD_ORDER = (
    "fedgrow fedgrow_joint fedgrow_no_federation fedgrow_released_code fedavg fedavg_small fedavg_mid fedprox "
    "heterofl heterofl_clean fedrolex fjord federated_dropout fedbrb_like depthfl progfed grow_then_fedavg "
    "exclusive ensemble_small local_only fedit ffa_lora flora hetlora"
)
# What must be said wherever a method's numbers are.
REMARKS = {
    "fedbrb_like": "a reconstruction of FedBRB, whose method section could not be read; not the authors' algorithm"
}
NOT_A_VARIANT = {"seed", "name", "suite"}  # what may differ between two configs of the same variant
KEYS = ["setting", "method", "algorithm", "preset"]
# Columns of a reading -> columns of `rounds`.
EQUAL_ROUNDS = {
    "accuracy": "accuracy_mean",
    "accuracy_std": "accuracy_std",
    "accuracy_min": "accuracy_min",
    "accuracy_local": "accuracy_local_mean",
    "accuracy_local_min": "accuracy_local_min",
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
# What `summary` averages over seeds, in its columns' order.
AVERAGED = [
    *EQUAL_ROUNDS,
    "rounds",
    *EQUAL_BYTES,
    "budget_mb",
    "trainable_params",
    "upload_mb",
    "total_mb",
    "up_mb",
    "down_mb",
    "flops",
    "held_mb",
    "peak_mb",
    "saved",
    "seconds",
]

Row = Mapping[str, Any]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows. Text that is null becomes empty, a number that is null is `nan`."""
    text = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    return frame.assign(**{name: frame[name].fillna("") for name in text}).to_dict("records")


def sent_bytes(round_: Row) -> int:
    return round_["bytes_up_total"] + round_["bytes_down_total"]


def last_evaluated(history: Sequence[Row]) -> Row | None:
    """The last of one run's rounds that has an accuracy; `None` if there is none."""
    return next((row for row in reversed(history) if not math.isnan(row["accuracy_mean"])), None)


def at_equal_bytes(history: Sequence[Row], budget: float) -> Row | None:
    """The last evaluated round of one run within a budget of bytes (up and down together).

    Round 0 costs no federated round and always counts as affordable: a method whose first federated round already
    exceeds the budget is read there. `None` if none of these rounds was evaluated.
    """
    return last_evaluated([row for row in history if sent_bytes(row) <= budget or row["round"] == 0])


def histories(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each run, in order, by run id; a run without rounds has none."""
    by_run = defaultdict(list)
    for row in sorted(records(results.rounds), key=lambda row: row["round"]):
        by_run[row["run_id"]].append(row)
    return by_run


def finished_runs(results: Results) -> list[dict[str, Any]]:
    """The finished runs, with their `setting` and `method` in words."""
    runs = [run | {"setting": _setting(run)} for run in records(results.runs) if run["status"] == "finished"]
    alike = defaultdict(list)
    for run in runs:
        alike[run["setting"], run["algorithm"], run["preset"]].append(run)
    methods = {id(run): method for group in alike.values() for run, method in zip(group, _methods(group), strict=True)}
    return [run | {"method": methods[id(run)]} for run in runs]


def readings(results: Results) -> list[dict[str, Any]]:
    """One row a finished run: its accuracies at both readings, its cost, and the saving against FedAvg's upload."""
    runs, rounds = finished_runs(results), histories(results)
    totals = {run["run_id"]: max((sent_bytes(row) for row in rounds[run["run_id"]]), default=0) for run in runs}
    budgets = _budgets(runs, totals)
    rows = []
    for run in runs:
        history = rounds[run["run_id"]]
        budget, budget_method = budgets.get((run["setting"], run["seed"]), (math.nan, ""))
        last = last_evaluated(history)
        within = None if math.isnan(budget) else at_equal_bytes(history, budget)
        rows.append(
            {name: run[name] for name in (*KEYS, "seed", "run_id", "federation_sha256")}
            | {"rounds": history[-1]["round"] if history else math.nan}
            | {ours: _value(last, theirs) for ours, theirs in EQUAL_ROUNDS.items()}
            | {ours: _value(within, theirs) for ours, theirs in EQUAL_BYTES.items()}
            | {"budget_mb": budget / MEGABYTE, "budget_method": budget_method}
            | {"trainable_params": run["trainable_params"], "upload_mb": run["bytes_per_upload"] / MEGABYTE}
            | {f"{way}_mb": sum(row[f"bytes_{way}"] for row in history) / MEGABYTE for way in ("up", "down")}
            | {"flops": sum(row["flops"] for row in history)}
            | {f"{name}_mb": run[f"{name}_bytes"] / MEGABYTE for name in ("held", "peak")}
            | {"total_mb": totals[run["run_id"]] / MEGABYTE, "saved": _saved(run, runs), "seconds": run["wall_seconds"]}
            | {"state_sha256": history[-1]["state_sha256"] if history else ""}
        )
    rank = {name: place for place, name in enumerate(METHOD_ORDER.split())}
    return sorted(
        rows, key=lambda row: (row["setting"], rank.get(row["algorithm"], len(rank)), row["method"], row["seed"])
    )


def summary(results: Results) -> pd.DataFrame:
    """One row a method: means over seeds of what `readings` holds a run.

    `accuracy_std` and `equal_bytes_std` are means over seeds of the spread over participants; `accuracy_seed_std` is
    the spread of `accuracy` over seeds (not a number for a single seed). Accuracies and `saved` are fractions, 1 MB is
    10^6 bytes. Where there is no Fed-Grow or no FedAvg to compare with, the columns that need it are not a number.
    """
    by_method = defaultdict(list)
    for row in readings(results):
        by_method[row["setting"], row["method"]].append(row)
    rows = [
        {name: group[0][name] for name in KEYS}
        | {"seeds": len(group), "accuracy_seed_std": _deviation([row["accuracy"] for row in group])}
        | {name: _mean([row[name] for row in group]) for name in AVERAGED}
        for group in by_method.values()
    ]
    return pd.DataFrame(rows, columns=[*KEYS, "seeds", *AVERAGED[:2], "accuracy_seed_std", *AVERAGED[2:]])


def notes(results: Results) -> list[str]:
    """What a reader must know beside the table: the byte budget, and everything that is missing or not comparable."""
    settings = by_setting(readings(results))
    lines = []
    for setting, runs in settings.items():
        lines += [f"{setting}: {line}" if len(settings) > 1 else line for line in _setting_notes(runs)]
    for run in records(results.runs):
        if run["status"] != "finished":
            name, error = _name(run), f": {run['error']}" if run["error"] else ""
            lines.append(f"Failed: {name}, seed {run['seed']}, run {run['run_id']}{error}")
    ended = set(results.runs["run_id"])
    for run_id, history in histories(results).items():
        if run_id not in ended:
            name, seed, last = (history[-1][column] for column in ("algorithm", "seed", "round"))
            lines.append(f"Not finished: {name}, seed {seed}, run {run_id}, got to round {last}")
    return lines


def _setting_notes(runs: Sequence[Row]) -> Iterable[str]:
    budgets = {row["seed"]: row["budget_mb"] for row in runs if not math.isnan(row["budget_mb"])}
    if budgets:
        of = " or ".join(sorted({row["budget_method"] for row in runs if row["budget_method"]}))
        over = f" (seed by seed; mean over {len(budgets)} seeds)" if len(budgets) > 1 else ""
        yield (
            f"Equal bytes: every method is read at the last evaluated round at which it had sent and received no more "
            f"than {of} in its whole run, {significant(_mean(list(budgets.values())))} MB{over}."
        )
    else:
        yield "Equal bytes: empty, because no run of fedgrow has finished."
    if all(math.isnan(row["saved"]) for row in runs):
        yield "Saved against FedAvg: empty, because there is no finished run of fedavg to compare with."
    yield from (f"{name}: {text}." for name, text in REMARKS.items() if any(row["algorithm"] == name for row in runs))
    seeds = Counter(row["method"] for row in runs)
    if len(set(seeds.values())) > 1:
        counts = ", ".join(f"{method} {count}" for method, count in seeds.items())
        yield f"The methods were run with different numbers of seeds, so their rows are not alike: {counts}."
    federations = {(row["seed"], row["federation_sha256"]) for row in runs}
    if len(federations) > len({seed for seed, _ in federations}):
        yield "Not every method met the same federation (partition, small models, cohorts): rows are not comparable."


def _setting(run: Row) -> str:
    alpha = "" if math.isnan(run["alpha"]) else f" (alpha {run['alpha']:g})"
    cohort = "" if run["cohort"] == run["participants"] else f", {run['cohort']} a round"
    data = f"{run['dataset']}, {run['family']}, {run['partition']}{alpha}"
    return f"{run['suite']}: {data}, {run['participants']} participants{cohort}"


def _name(run: Row) -> str:
    return f"{run['algorithm']} ({run['preset']})" if run["preset"] else run["algorithm"]


def _methods(runs: Sequence[Row]) -> list[str]:
    """The names of runs of one algorithm and preset. Those that differ in more than the seed are told apart by what."""
    configs = [_flat(json.loads(run["config"])) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config if field not in NOT_A_VARIANT)
    differing = [field for field in fields if len({config.get(field) for config in configs}) > 1]
    return [
        " ".join([_name(run), *(f"{field}={config.get(field, '-')}" for field in differing)])
        for run, config in zip(runs, configs, strict=True)
    ]


def _flat(config: Any, path: str = "") -> dict[str, str]:
    """The leaves of a JSON document by dotted path, as text."""
    if isinstance(config, dict) and config:
        items = [(f"{path}.{key}" if path else key, value) for key, value in config.items()]
        return {leaf: text for name, value in items for leaf, text in _flat(value, name).items()}
    return {path: config if isinstance(config, str) else json.dumps(config)}


def _budgets(runs: Sequence[Row], totals: Mapping[str, int]) -> dict[tuple[str, int], tuple[int, str]]:
    """By setting and seed: the bytes of the Fed-Grow run that sent the fewest, and its method."""
    candidates = defaultdict(list)
    for run in runs:
        if run["algorithm"] == "fedgrow":
            candidates[run["setting"], run["seed"]].append((totals[run["run_id"]], run["method"]))
    return {key: min(found) for key, found in candidates.items()}


def _saved(run: Row, runs: Sequence[Row]) -> float:
    """1 - upload / FedAvg's upload. FedAvg's of the same setting and seed and, where there are several, same target."""
    peers = [row for row in runs if row["algorithm"] == "fedavg" and _same(run, row, "setting", "seed")]
    same_target = [row for row in peers if _same(run, row, "model")]
    uploads = {row["bytes_per_upload"] for row in same_target or peers}
    return 1 - run["bytes_per_upload"] / min(uploads) if len(uploads) == 1 and min(uploads) > 0 else math.nan


def _same(one: Row, other: Row, *columns: str) -> bool:
    return all(one[column] == other[column] for column in columns)


def _value(row: Row | None, column: str) -> float:
    return math.nan if row is None else row[column]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


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
    "accuracy ± sd, %": lambda row: _spread(row["accuracy"], row["accuracy_std"]),
    "worst, %": lambda row: percent(row["accuracy_min"]),
    "at equal bytes, %": lambda row: _spread(row["equal_bytes_accuracy"], row["equal_bytes_std"]),
    "read at round": lambda row: _round(row["equal_bytes_round"]),
    "trainable": lambda row: _count(row["trainable_params"]),
    "MB per upload": lambda row: significant(row["upload_mb"]),
    "MB in total": lambda row: significant(row["total_mb"]),
    "saved vs FedAvg": lambda row: "-" if math.isnan(row["saved"]) else f"{percent(row['saved'])} %",
    "seconds": lambda row: significant(row["seconds"]),
}


# What it takes, for everyone and for one participant: by count, so that it does not depend on the machine.
COSTS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "global, %": lambda row: percent(row["accuracy_global"]),
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


def cells(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]] = COMPACT) -> list[list[str]]:
    return [[cell(row) for cell in columns.values()] for row in rows]


def by_setting(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["setting"]].append(row)
    return groups


def markdown(results: Results, columns: Mapping[str, Callable[[Row], str]] = COMPACT) -> str:
    """The summary as GitHub Markdown, one table a setting, the notes below."""
    blocks = []
    for setting, rows in by_setting(records(summary(results))).items():
        lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *cells(rows, columns)]
        escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
        blocks.append("\n".join([f"**{setting}**\n", *(f"| {' | '.join(line)} |" for line in escaped)]))
    blocks.append("\n".join(f"* {note}" for note in notes(results)))
    return "\n\n".join(blocks).strip() + "\n"


def print_summary(
    results: Results, *, directory: Path | None = None, report: Path | None = None, console: Console | None = None
) -> None:
    """The summary on the terminal, in 120 columns, then the notes and where the tables and the report lie."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    for setting, rows in by_setting(records(summary(results))).items():
        grid = Table(title=setting, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left", title_style="bold")
        grid.add_column("method", overflow="fold")
        for heading in list(COMPACT)[1:]:
            narrow = "\n".join(textwrap.wrap(heading, 8, break_long_words=False))
            grid.add_column(_text(narrow, console), justify="right", no_wrap=True)
        for row in cells(rows):
            grid.add_row(*(_text(cell, console) for cell in row))
        console.print(grid)
    for note in notes(results):
        console.print(_text(note, console), style="red" if note.startswith("Failed") else None)
    if directory is not None:
        folders = "  ".join(str(directory / name) for name in ("runs", "rounds", "clients"))
        console.print(_text(f"Tables (Parquet): {folders}", console), soft_wrap=True)
    if report is not None:
        console.print(_text(f"Report: {report}", console), soft_wrap=True)


def _text(line: str, console: Console) -> Text:
    """Without markup (labels may hold brackets), and printable on terminals that know ASCII only."""
    if not console.encoding.lower().startswith("utf"):
        line = line.replace("±", "+-").encode("ascii", "replace").decode()
    return Text(line)
