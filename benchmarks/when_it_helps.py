"""What the study found:  python benchmarks/when_it_helps.py [DIR ...]

Of results folders of the suite `study` the tables are gathered in `benchmarks/study_tables` (runs, rounds, and what
every participant deployed), beside those of other runs that lie there; all of these are read. Written from them:
`docs/when-it-helps.svg`, the numbers, `docs/when-it-helps.json`, and on standard output the tables of
`docs/when-it-helps.md`, of which the first is the README's.

A form of Fed-Grow is held against the others at equal bytes: every run is read at its last scored round within what
`fedgrow_lowrank` sent and received in its whole run. The form is the one that was best by validation on the tuning
seed (`benchmarks/study.py`).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.readme_figure import markdown  # noqa: E402
from benchmarks.study import FORMS, NAMED  # noqa: E402
from fedsim.algorithm import PRIVATE  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.report.comparison import BUDGETS, Difference, differences  # noqa: E402
from fedsim.report.readings import by_setting, read, records  # noqa: E402
from fedsim.report.tables import COMPACT, COMPARED, COSTS, cells, summary  # noqa: E402
from fedsim.results.tables import Results, load  # noqa: E402


TABLES = ROOT / "benchmarks" / "study_tables"
PAGE = ROOT / "docs" / "when-it-helps"
REFERENCE = "fedgrow_lowrank"  # whose bytes are the budget
QUESTIONS = {"P": "of those that let no model leave", "A": "of all"}
LEVEL = 0.05
SHOWN = (
    "method",
    "leaves",
    "accuracy ± ci, %",
    "own labels, %",
    "at equal bytes ± ci, %",
    "equal FLOPs, %",
    "MB in total",
)
COLUMNS = {heading: (COMPACT | COSTS | COMPARED)[heading] for heading in SHOWN}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", metavar="DIR")
    options = parser.parse_args(arguments)
    return exit_status(lambda: tell(options.directories), Console())


def tell(directories: Sequence[str]) -> int:
    if directories:
        gather(load(*directories), TABLES)
    readings = read(gathered(TABLES), reference=REFERENCE)
    settings = by_setting(readings.runs)
    compared = {setting: answers(runs, form_of(setting)) for setting, runs in settings.items()}
    draw(compared).savefig(PAGE.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    rows = by_setting(records(summary(readings)))
    found = {
        setting: {
            "form": form_of(setting),
            "seeds": sorted({run["seed"] for run in runs}),
            "verdicts": {question: verdict(compared[setting], question) for question in QUESTIONS},
            "table": rows[setting],
        }
        for setting, runs in settings.items()
    }
    PAGE.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{overview(found)}\n")
    for setting, part in found.items():
        print(f"**{setting}**, seeds {part['seeds']}\n\n{markdown(cells(part['table'], COLUMNS), COLUMNS)}\n")
        for question, text in part["verdicts"].items():
            print(f"* {question}, {part['form']} {QUESTIONS[question]}, at equal bytes: {text}")
        print()
    return 0


# tables ---------------------------------------------------------------------------------------------------------------


def gather(results: Results, folder: Path) -> None:
    """Write what figures are made of: three Parquet files, a row a run, a round, and a participant at the end."""
    folder.mkdir(exist_ok=True)
    for name, frame in {"runs": results.runs, "rounds": results.rounds, "deployed": results.deployed}.items():
        path = folder / f"{name}.parquet"
        if path.exists():
            before = pd.read_parquet(path)
            frame = pd.concat([before[~before.run_id.isin(frame.run_id)], frame], ignore_index=True)
        frame.to_parquet(path, index=False, compression="zstd")


def gathered(folder: Path) -> Results:
    runs, rounds, deployed = (pd.read_parquet(folder / f"{name}.parquet") for name in ("runs", "rounds", "deployed"))
    results = Results((), runs, rounds)
    vars(results)["deployed"] = deployed  # what a folder's results read when they are first asked
    return results


def overview(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a setting: what the form reaches at equal bytes, beside the best of each question's rivals."""
    lines = ["| task and regime | form of Fed-Grow | best rival (P) | best of all (A) |", "|:--|:--|:--|:--|"]
    for setting, part in found.items():
        rows = part["table"]
        ours = next(row for row in rows if row["method"] == part["form"])
        rivals = [row for row in rows if not row["algorithm"].startswith("fedgrow")]
        among = [row for row in rivals if row["leaves"] in PRIVATE], rivals
        best = [max(each, key=lambda row: row["equal_bytes_accuracy"]) for each in among]
        told = [f"`{row['method'].split()[0]}` {reached(row)}" for row in (ours, *best)]
        lines.append(f"| {NAMED[naming(setting)]} | {' | '.join(told)} |")
    return "\n".join(lines)


def reached(row: Mapping[str, Any]) -> str:
    return f"{100 * row['equal_bytes_accuracy']:.1f} ± {100 * row['equal_bytes_accuracy_ci']:.1f}"


# answers --------------------------------------------------------------------------------------------------------------


def naming(setting: str) -> str:
    """The public models that a setting is told by."""
    return next(part for part in FORMS if part in setting)


def form_of(setting: str) -> str:
    """The Fed-Grow form that goes for a setting."""
    return FORMS[naming(setting)]


def answers(runs: Sequence[Mapping[str, Any]], form: str) -> dict[str, dict[str, Difference]]:
    """By question, every rival minus the form, at equal bytes, with Holm's correction over the question's rivals."""
    ours = [run for run in runs if run["method"] == form]
    rivals = [run for run in runs if not run["algorithm"].startswith("fedgrow")]
    among = {"P": [run for run in rivals if run["leaves"] in PRIVATE], "A": rivals}
    return {question: differences([*ours, *found], BUDGETS["bytes"], form) for question, found in among.items()}


def verdict(compared: Mapping[str, Mapping[str, Difference]], question: str) -> str:
    """As the protocol words it (`LOG.md`)."""
    rivals = compared[question]
    told = {method: found.difference.mean for method, found in rivals.items() if found.p < LEVEL}
    above = [method for method, mean in told.items() if mean > 0]
    if above:
        return f"behind {', '.join(above)}"
    return "best" if len(told) == len(rivals) else "not told apart from the best"


def draw(compared: Mapping[str, Mapping[str, Mapping[str, Difference]]]) -> Figure:
    """A panel a setting: each rival minus the form in percentage points, with its 95 % interval."""
    matplotlib.rcParams["svg.hashsalt"] = "fedsim"  # the same file from the same results
    counts = [len(found["A"]) for found in compared.values()]
    figure = Figure(figsize=(8, 1 + 0.28 * sum(counts) + 0.6 * len(counts)), layout="constrained")
    panels = figure.subplots(len(compared), 1, sharex=True, height_ratios=counts, squeeze=False)[:, 0]
    for axes, (setting, found) in zip(panels, compared.items(), strict=True):
        names = sorted(found["A"], key=lambda method: found["A"][method].difference.mean)
        for place, method in enumerate(names):
            difference, private = found["A"][method].difference, method in found["P"]
            axes.errorbar(
                100 * difference.mean,
                place,
                xerr=100 * difference.half,
                color="#0072B2" if private else "#D55E00",  # of the colours that most colour-blind people tell apart
                marker="o" if private else "s",
                capsize=3,
            )
        axes.set_yticks(range(len(names)), names)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(f"{setting.removeprefix('study: ')}\nminus {form_of(setting)}", fontsize=9, loc="left")
    panels[-1].set_xlabel(
        "test accuracy at equal bytes, percentage points (circles: no model leaves; squares: one does)"
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
