"""Which learning rate each method is best at: `python benchmarks/tune.py DIR`, for a folder that a grid's sweep wrote.

Reads validation scores after the last round, mean over participants and seeds; test scores are not looked at. A best
rate on the edge of the grid is marked: the grid must then be wider.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.readings import histories, records  # noqa: E402
from benchmarks.tables import percent  # noqa: E402
from fedsim.results import Results, load  # noqa: E402


Grid = dict[str, dict[float, list[float]]]  # method -> learning rate -> validation accuracy of each seed


def grid_of(results: Results) -> Grid:
    """Validation accuracy after the last round of every finished run."""
    rounds = histories(results)
    grid: Grid = defaultdict(lambda: defaultdict(list))
    for run in records(results.runs):
        if run["status"] == "finished":
            rate = json.loads(run["config"])["algorithm"]["lr"]
            score = rounds[run["run_id"]][-1]["accuracy_val_mean"]
            grid[f"{run['algorithm']} {run['preset']}".strip()][rate].append(score)
    return grid


def best_of(rates: dict[float, list[float]]) -> float:
    """The rate with the highest mean; of equal ones the smallest."""
    return max(sorted(rates), key=lambda rate: mean(rates[rate]))


def on_edge(rates: dict[float, list[float]]) -> bool:
    return best_of(rates) in (min(rates), max(rates))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    grid = grid_of(load(parser.parse_args(arguments).directory))
    columns = sorted({rate for rates in grid.values() for rate in rates})
    table = Table("method", *(f"{rate:g}" for rate in columns), "best")
    for method, rates in sorted(grid.items()):
        cells = [percent(mean(rates.get(rate, []))) for rate in columns]
        table.add_row(method, *cells, f"{best_of(rates):g}{' (edge)' if on_edge(rates) else ''}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
