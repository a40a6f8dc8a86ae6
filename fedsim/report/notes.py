"""What a reader must know beside a table: the budgets, and everything that is missing or not comparable."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.core.canonical import parsed
from fedsim.report.comparison import interval
from fedsim.report.names import method_name
from fedsim.report.readings import Readings, by_setting, read, records
from fedsim.report.tables import significant
from fedsim.results.tables import Results


# What must be said wherever a method's numbers are.
REMARKS = {
    "fedbrb_like": "a reconstruction of FedBRB, whose method section could not be read; not the authors' algorithm"
}

Row = Mapping[str, Any]


def notes(results: Results, readings: Readings | None = None) -> list[str]:
    """What a reader must know beside the table: the budgets, and everything that is missing or not comparable."""
    readings = readings or read(results)
    settings = by_setting(readings.runs)
    lines = []
    for setting, runs in settings.items():
        lines += [
            f"{setting}: {line}" if len(settings) > 1 else line for line in _setting_notes(runs, readings.reference)
        ]
    lines += _small_models(results, readings)
    lines += _contents(results)
    for run in records(results.runs):
        if run["status"] != "finished":
            name, error = method_name(run), f": {run['error']}" if run["error"] else ""
            lines.append(f"Failed: {name}, seed {run['seed']}, run {run['run_id']}{error}")
    ended = set(results.runs["run_id"])
    for run_id, history in readings.rounds.items():
        if run_id not in ended:
            name, seed, last = (history[-1][column] for column in ("algorithm", "seed", "round"))
            lines.append(f"Not finished: {name}, seed {seed}, run {run_id}, got to round {last}")
    return lines


def _contents(results: Results) -> Iterable[str]:
    """Runs of one data set, with the same settings for it, are comparable if they have read the same."""
    read: dict[str, dict[str, str]] = {}
    for run in records(results.runs):
        if isinstance(run["data_sha256"], str):
            data = json.dumps(parsed(run["config"]).get("task", {}).get("data"))
            read.setdefault(data, {}).setdefault(run["data_sha256"], f"{method_name(run)}, run {run['run_id']}")
    for found in read.values():
        if len(found) > 1:
            of_each = "; ".join(f"sha256 {digest[:16]} ({run})" for digest, run in found.items())
            yield f"Not comparable: these runs have read different contents of one data set: {of_each}."


def _setting_notes(runs: Sequence[Row], reference: str | None) -> Iterable[str]:
    budgets = {row["seed"]: row["budget_mb"] for row in runs if not math.isnan(row["budget_mb"])}
    if budgets:
        of = " or ".join(sorted({row["budget_method"] for row in runs if row["budget_method"]}))
        over = f" (seed by seed; mean over {len(budgets)} seeds)" if len(budgets) > 1 else ""
        yield (
            f"Equal bytes: every method is read at the last evaluated round at which it had sent and received no more "
            f"than {of} in its whole run, {significant(interval([*budgets.values()]).mean)} MB{over}."
        )
    else:
        of = f"of {reference}, the reference," if reference else "that could be the reference"
        yield f"Equal bytes: empty, because no finished run {of} sent anything in this setting."
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


def _small_models(results: Results, readings: Readings) -> Iterable[str]:
    """Where methods that let participants train small models of their own did not end up with the same ones."""
    hashes = {
        str(run_id): dict(zip(frame["client"], frame["small_sha256"], strict=True))
        for run_id, frame in results.small_models.groupby("run_id")
    }
    for setting, runs in by_setting(readings.runs).items():
        groups: dict[str, None] = {}
        for seed in {run["seed"] for run in runs}:
            alike = _alike({run["method"]: hashes.get(run["run_id"], {}) for run in runs if run["seed"] == seed})
            if len(alike) > 1:
                groups["; ".join(", ".join(group) for group in alike)] = None
        yield from (
            f"{setting}: methods begin with different small models, those of each group with the same: {text}."
            for text in groups
        )


def _alike(held: Mapping[str, Mapping[int, str]]) -> list[list[str]]:
    """Methods in groups within which nobody's small model differs; those that note none are in no group."""
    groups: list[tuple[dict[int, str], list[str]]] = []
    for method, models in held.items():
        if not models:
            continue
        fits = (group for group in groups if all(group[0].get(id_, models[id_]) == models[id_] for id_ in models))
        merged, members = next(fits, ({}, []))
        if not members:
            groups.append((merged, members))
        merged.update(models)
        members.append(method)
    return [members for _, members in groups]
