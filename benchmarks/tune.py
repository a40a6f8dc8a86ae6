"""Which learning rate each method is best at: `python benchmarks/tune.py DIR [--even]`, of a folder of a grid's sweep.

Reads validation scores after the last round, mean over participants and seeds; test scores are not looked at. A best
rate on the edge of the grid is marked: the grid must then be wider. A participant's own validation data reward saying
its most frequent classes; `--even` weights its classes evenly, where scores on everybody's test set matter.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from fedsim.cli import exit_status  # noqa: E402
from fedsim.report.names import variant_names  # noqa: E402
from fedsim.report.readings import finished_runs, histories  # noqa: E402
from fedsim.report.tables import percent  # noqa: E402
from fedsim.results.tables import Results, load  # noqa: E402
from fedsim.storage.place import place  # noqa: E402


Grid = dict[str, dict[float, list[float]]]  # method -> learning rate -> validation accuracy of each seed


def grids_of(results: Results, even: bool = False) -> dict[str, Grid]:
    """By setting: validation accuracy after the last round of every finished run, of classes as they are, or `even`."""
    column = "accuracy_val_even_mean" if even else "accuracy_val_mean"
    rounds, runs = histories(results), finished_runs(results)
    grids: dict[str, Grid] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run, method in zip(runs, variant_names(runs), strict=True):
        score = rounds[run["run_id"]][-1][column]
        grids[run["setting"]][method][run["parsed"]["algorithm"]["lr"]].append(score)
    return grids


def best_of(rates: dict[float, list[float]]) -> float:
    """The rate with the highest mean; of equal ones the smallest."""
    return max(sorted(rates), key=lambda rate: mean(rates[rate]))


def on_edge(rates: dict[float, list[float]]) -> bool:
    return best_of(rates) in (min(rates), max(rates))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--even", action="store_true", help="weight a participant's classes evenly")
    options, console = parser.parse_args(arguments), Console()
    return exit_status(lambda: tell(options.directory, options.even, console), console)


def tell(directory: str, even: bool, console: Console) -> int:
    if not console.is_terminal:
        console.width = 120
    for setting, grid in sorted(grids_of(load(place(directory, "DIR")), even).items()):
        columns = sorted({rate for rates in grid.values() for rate in rates})
        table = Table(Column("method", no_wrap=True), *(f"{rate:g}" for rate in columns), "best", title=setting)
        for method, rates in sorted(grid.items()):
            cells = [percent(mean(rates.get(rate, []))) for rate in columns]
            table.add_row(method, *cells, f"{best_of(rates):g}{' (edge)' if on_edge(rates) else ''}")
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
