"""What attacks measured (`fedsim audit`), of one setting: a table, and what its figures are made of.

Of every run the last round that was attacked counts; over seeds, means.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.report.comparison import interval
from fedsim.report.names import method_name
from fedsim.report.readings import by_method, records
from fedsim.results.pictures import TRUE, read_pictures
from fedsim.results.tables import Results


LEVELS = ("shared", "ancestor", "intermediate")  # what an attacker knows, the most last
AUC, CHANCE = "auc", "_chance"
DEPLOYED = "loss_deployed", AUC  # attack and metric by which leakage is read
GUESSING = 0.5  # the AUC of one who guesses

Row = Mapping[str, Any]
Points = list[tuple[float, float]]


def leakage(runs: Sequence[Row], attacks: Sequence[Row]) -> list[dict[str, str]]:
    """One row a method, attack and level of knowledge: what was measured, with 95 % intervals: over seeds where there
    are several, else over what was attacked.

    - `runs`: finished runs of one setting. - `attacks`: rows of table `attacks`.
    """
    rows = []
    for method, group in by_method(runs).items():
        found: dict[tuple[str, str], dict[str, list[Row]]] = {}
        for row in _last(attacks, group):
            metrics = found.setdefault((row["attack"], row["knowledge"]), {})
            metrics.setdefault(row["metric"], []).append(row)
        for (attack, knowledge), metrics in found.items():
            shown = {metric: _with_interval(metric, of) for metric, of in metrics.items()}
            (first, value), *others = [each for each in shown.items() if not each[0].endswith(CHANCE)]
            chance = shown.get(first + CHANCE, f"{GUESSING:.3f}" if first == AUC else "-")
            further = [f"{name} {text}" + _by_chance(shown, name) for name, text in others]
            rows.append(
                {"method": method, "attack": attack, "attacker knows": knowledge, "measure": first}
                | {"value (95 % interval)": value, "by guessing": chance, "further": "; ".join(further) or "-"}
            )
    return rows


def curves(runs: Sequence[Row], roc: Sequence[Row]) -> dict[str, dict[str, list[Points]]]:
    """Points (fpr, tpr) of all participants' scores as one: by attack and method, a curve a seed; of the attacker who
    knows most."""
    found: dict[str, dict[str, list[Points]]] = {}
    for method, group in by_method(runs).items():
        for run in group:
            levels: dict[tuple[str, str], Points] = {}
            for row in _last(roc, [run]):
                levels.setdefault((row["attack"], row["knowledge"]), []).append((row["fpr"], row["tpr"]))
            for attack in dict.fromkeys(attack for attack, _ in levels):
                most = max((level for of, level in levels if of == attack), key=_rank)
                found.setdefault(attack, {}).setdefault(method, []).append(sorted(levels[attack, most]))
    return found


def trade_off(
    runs: Sequence[Row], attacks: Sequence[Row], histories: Mapping[str, Sequence[Row]]
) -> dict[str, list[tuple[str, float, float]]]:
    """By method, variants together: what epsilon promises after the last round, AUC of membership of the deployed
    models, and accuracy; means over seeds, by epsilon, no noise last. Nothing unless epsilon differs within a method.
    """
    auc = {row["run_id"]: row["value"] for row in _last(attacks, runs) if (row["attack"], row["metric"]) == DEPLOYED}
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in runs:
        if run["run_id"] in auc and not math.isnan(run["accuracy"]):
            spent = histories[run["run_id"]][-1]["epsilon"]
            epsilon = math.inf if math.isnan(spent) else float(f"{spent:.2g}")
            found.setdefault(method_name(run), {}).setdefault(epsilon, []).append((auc[run["run_id"]], run["accuracy"]))
    if all(len(of_method) < 2 for of_method in found.values()):
        return {}
    return {method: [_point(epsilon, of[epsilon]) for epsilon in sorted(of)] for method, of in found.items()}


def pictures(runs: Sequence[Row], results: Results) -> dict[str, dict[str, np.ndarray]]:
    """What attacks made of an image, of one run a method: by attack and knowledge, the true one first."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for method, group in by_method(runs).items():
        tried = (read_pictures(folder, run["run_id"]) for run in group for folder in results.directories)
        if images := next((each for each in tried if each), None):
            order = sorted(images, key=lambda name: (name != TRUE, name.partition("/")[0], _rank(name)))
            found[method] = {name: images[name] for name in order}
    return found


def rows_of(results: Results, table: str) -> list[dict[str, Any]]:
    """The rows of `attacks`, or of `roc`, that are of several participants together."""
    frame = getattr(results, table)
    return records(frame[frame["client"].isna()])


# parts ----------------------------------------------------------------------------------------------------------------


def _last(rows: Iterable[Row], runs: Sequence[Row]) -> list[Row]:
    """Of these runs, the rows of the last round that was attacked."""
    ids = {run["run_id"] for run in runs}
    own = [row for row in rows if row["run_id"] in ids]
    last: dict[str, int] = {}
    for row in own:
        last[row["run_id"]] = max(row["round"], last.get(row["run_id"], 0))
    return [row for row in own if row["round"] == last[row["run_id"]]]


def _with_interval(metric: str, rows: Sequence[Row]) -> str:
    digits, unit = (1, " dB") if metric == "psnr" else (3, "")
    known = interval([row["value"] for row in rows])
    low, high = known.mean - known.half, known.mean + known.half
    if len(rows) == 1:
        low, high = rows[0]["low"], rows[0]["high"]
    ends = "" if math.isnan(low) else f" ({low:.{digits}f} .. {high:.{digits}f})"
    return f"{known.mean:.{digits}f}{unit}{ends}"


def _by_chance(shown: Mapping[str, str], metric: str) -> str:
    return f", by guessing {shown[metric + CHANCE]}" if metric + CHANCE in shown else ""


def _rank(name: str) -> int:
    """Of a level of knowledge, or of what ends in one; of a level that is not known, -1."""
    level = name.rpartition("/")[2]
    return LEVELS.index(level) if level in LEVELS else -1


def _point(epsilon: float, seeds: Sequence[tuple[float, float]]) -> tuple[str, float, float]:
    """A level of epsilon by name, and the means of what its seeds have."""
    aucs, accuracies = zip(*seeds, strict=True)
    name = "no noise" if epsilon == math.inf else f"{epsilon:g}"
    return name, statistics.fmean(aucs), statistics.fmean(accuracies)
