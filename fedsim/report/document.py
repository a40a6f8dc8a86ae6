"""Results -> one self-contained HTML page, and the same as Markdown.

Nothing is fetched: tables, figures (embedded), the machines, the commands, every run's config; a script of the page's
own sorts tables and hides methods. What it says is in `templates/report.j2`; here is what that is filled with.
"""

import functools
import json
import operator
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsim.report.comparison import differences, reference_of
from fedsim.report.drawing import Drawn, svg
from fedsim.report.figures import (
    AGAINST,
    MOST_LINES,
    accuracy_figure,
    difference_figure,
    labels_figure,
    places_of,
    savings_figure,
    shown_methods,
    spread_figure,
    time_figure,
)
from fedsim.report.leakage import curves, leakage, pictures, rows_of, trade_off
from fedsim.report.leakage_figures import pictures_figure, roc_figure, trade_off_figure
from fedsim.report.notes import notes
from fedsim.report.page import Picture, rendered, write_figures
from fedsim.report.readings import WORST_SHARE, Readings, by_method, by_setting, read, records
from fedsim.report.tables import (
    COMPACT,
    COMPARED,
    COSTS,
    DIFFERENCES,
    LEGEND,
    TARGETS,
    cells,
    percent,
    significant,
    summary,
)
from fedsim.results.tables import Results, load
from fedsim.storage.place import Place, sent, write_atomically


Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

READ = (("equal_bytes_accuracy", "At equal bytes"), ("accuracy", "After the last round"))
NAMED = 4  # methods in a sentence

SUMMARY: Columns = COMPACT | {
    "own labels, %": lambda row: percent(row["accuracy_local"]),
    "loss": lambda row: significant(row["loss"]),
    "rounds": lambda row: f"{row['rounds']:.0f}",
    "seeds": lambda row: str(row["seeds"]),
    "sd over seeds": lambda row: percent(row["accuracy_seed_std"]),
}
PER_SEED: Columns = (
    {"method": COMPACT["method"], "seed": lambda row: str(row["seed"])}
    | {heading: cell for heading, cell in COMPACT.items() if heading != "method"}
    | {"run": lambda row: row["run_id"][:16], "last state": lambda row: row["state_sha256"][:12]}
)


def content_of(results: Results, readings: Readings, title: str, commands: Sequence[str] = ()) -> dict[str, Any]:
    """What the page's template is filled with."""
    settings, runs_of, runs = by_setting(records(summary(readings))), by_setting(readings.runs), records(results.runs)
    typed = dict.fromkeys(run["command"] for run in runs if run["command"])
    leaked = rows_of(results, "attacks"), rows_of(results, "roc")
    return {
        "title": title,
        "settings": [
            _setting(number, name, rows, runs_of[name], results, readings, *leaked)
            for number, (name, rows) in enumerate(settings.items())
        ],
        "legend": [f"{column}: {meaning}." for column, meaning in LEGEND.items()],
        "notes": notes(results, readings),
        "runs": runs,
        "commands": [" ".join(each.split("\n")) for each in (*typed, *commands)],
        "most_lines": MOST_LINES,
        "worst_percent": f"{100 * WORST_SHARE:.0f}",
    }


def _setting(
    number: int,
    name: str,
    rows: Sequence[Row],
    runs: Sequence[Row],
    results: Results,
    readings: Readings,
    attacks: Sequence[Row],
    roc: Sequence[Row],
) -> dict[str, Any]:
    """Tables and figures of one setting. - `rows`: of `summary`. - `number`: in the names of its figures.

    - `attacks`, `roc`: of `fedsim.report.leakage.rows_of`.
    """
    by_seed = {run["seed"]: run for run in runs}.values()
    budgets = {
        "MB": [run["budget_mb"] for run in by_seed if run["budget_method"]],
        "FLOPs": [run["budget_flops"] for run in by_seed if run["flops_method"]],
    }
    means = {against: sum(found) / len(found) for against, found in budgets.items() if found}
    labelled = next((run for run in runs if run["labels"] and _histograms(run["labels"])), None)
    leaked = leakage(runs, attacks)
    drawn: Mapping[str, Callable[..., Drawn | None]] = {
        f"accuracy-{against.lower()}": functools.partial(
            accuracy_figure, runs, readings.rounds, against=against, budget=means.get(against)
        )
        for against in AGAINST
    } | {
        "savings": functools.partial(savings_figure, rows),
        "differences": functools.partial(difference_figure, rows, "equal_bytes_accuracy"),
        "participants": functools.partial(spread_figure, runs, results.deployed),
        "time": functools.partial(time_figure, rows),
        "roc": functools.partial(roc_figure, curves(runs, roc), places_of(runs)),
        "trade-off": functools.partial(trade_off_figure, trade_off(runs, attacks, readings.rounds)),
        "pictures": functools.partial(pictures_figure, pictures(runs, results) if leaked else {}),
        "data": functools.partial(labels_figure, _histograms(labelled["labels"]) if labelled else []),
    }
    return {
        "name": name,
        "in_short": _in_short(rows, runs),
        "methods": list(places_of(runs)),
        "summary": _grid(rows, SUMMARY),
        "compared": _grid(rows, COMPARED),
        "differences": _grid(rows, DIFFERENCES),
        "costs": _grid(rows, COSTS),
        "targets": _grid(rows, TARGETS) if any(row["target"] == row["target"] for row in rows) else None,
        "leakage": _grid(leaked, {name: operator.itemgetter(name) for name in leaked[0]}) if leaked else None,
        "per_seed": _grid(runs, PER_SEED, reference_of(runs, readings.reference)),
        "figures": {key: _picture(f"{number}-{key}", draw) for key, draw in drawn.items()},
        "seeds": len(by_seed),
        "hidden": len(by_method(runs)) - len(shown_methods(runs)),
        "labelled": labelled,
    }


def _histograms(text: str) -> list[list[int]]:
    """How many examples of each class each participant holds; empty for a text that says something else."""
    try:
        found = [[int(count) for count in row] for row in json.loads(text)]
        return found if any(found) else []
    except (ValueError, TypeError, OverflowError, RecursionError):
        return []


def _picture(name: str, draw: Callable[..., Drawn | None]) -> Picture | None:
    wide, narrow = draw(narrow=False), draw(narrow=True)
    return Picture(name, svg(wide.figure), svg(narrow.figure), wide.data) if wide and narrow else None


def _in_short(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    """What most readers look for, from the numbers alone; nothing if there are none.

    - `rows`: of `summary`. - `runs`: those they are means of.
    """
    parts = [_highest(rows, runs, column, where) for column, where in READ if any(_known(row, column) for row in rows)]
    by_name = {row["method"]: row for row in rows}
    reference = by_name.get(rows[0]["reference"])
    if reference:
        figures = [f"{percent(reference['accuracy'])} % after the last round"]
        if _known(reference, "saved"):
            figures.append(f"{percent(reference['saved'])} % of FedAvg's upload saved")
        parts.append(f"The reference, **{reference['method']}**: {', '.join(figures)}")
        alone = by_name.get(reference["method"].replace("fedgrow (", "fedgrow_no_federation ("))
        if alone and alone is not reference:
            parts.append(f"The same without federation: {percent(alone['accuracy'])} %")
    return ". ".join(parts)


def _highest(rows: Sequence[Row], runs: Sequence[Row], column: str, where: str) -> str:
    """Who is highest at one reading, and who is not told apart from it."""
    best = max((row for row in rows if _known(row, column)), key=lambda row: row[column])
    said = f"{where} **{best['method']}** is highest, {percent(best[column])} %"
    others = differences(runs, column, best["method"])
    level = [method for method, found in others.items() if not found.p < 0.05]
    if not others:
        return said
    if best["seeds"] < 2:
        return f"{said}; of one seed, which tells nothing apart"
    if not level:
        return f"{said}, ahead of every other"
    if len(level) == len(others):
        return f"{said}, and not told apart from any other (paired, Holm)"
    named = ", ".join(level[:NAMED]) + (f" and {len(level) - NAMED} more" if len(level) > NAMED else "")
    return f"{said}; not told apart from it (paired, Holm): {named}"


def _known(row: Row, column: str) -> bool:
    return row[column] == row[column]


def _grid(rows: Sequence[Row], columns: Columns, strong: str | None = None) -> dict[str, Any]:
    """A table of text. - `strong`: the method whose rows are emphasised; None: the reference."""
    return {
        "columns": list(columns),
        "rows": cells(rows, columns),
        "strong": strong or next((row.get("reference") for row in rows), None),
    }


def write_report(
    directory: Place, out: Place | None = None, results: Results | None = None, reference: str | None = None
) -> Place:
    """Write the page of a results folder and return where: by default `report.html` in it.

    Beside it, under the same name, the same as Markdown (`.md`, with a folder of figures). Each is replaced atomically.

    - `results`: what the page is about; None: what lies in the folder.
    - `reference`: see `fedsim.report.readings.read`.

    **Raises:** `ValueError` for a reference that no finished run has.
    """
    path = out or directory / "report.html"
    results = results or load(directory)
    words = ["fedsim", "report", *map(str, results.directories), *(["--out", str(path)] if out else [])]
    command = shlex.join([*words, *(["--reference", reference] if reference else [])])
    names = " + ".join(each.resolve().name for each in results.directories)
    figures = f"{path.stem}_figures"
    content = content_of(results, read(results, reference=reference), f"fedsim: {names}", [command])
    pictures = [each for setting in content["settings"] for each in setting["figures"].values() if each]
    with sent(path.parent) as folder:
        write_figures(folder / figures, pictures)
        markdown = rendered("markdown", content | {"figures_folder": figures})
        write_atomically(folder / f"{path.stem}.md", markdown.encode())
        write_atomically(folder / path.name, rendered("html", content).encode())
    return path
