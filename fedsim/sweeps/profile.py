"""Where the time of rounds went, in words: the table that `--profile` prints."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedsim.core.terminal import shown


if TYPE_CHECKING:
    import pandas as pd


PHASES = ("broadcast", "compute", "sum", "write", "idle")


def print_profile(profile: "pd.DataFrame", console: Console) -> None:
    """Seconds of a federated round at every place, on average, for each algorithm; round 0 has a line of its own.

    - `profile`: the table of that name (`fedsim.results.columns`).
    """
    federated = profile["round"] > 0
    parts = [
        (algorithm, what, profile[(profile["algorithm"] == algorithm) & chosen])
        for algorithm in dict.fromkeys(profile["algorithm"].tolist())
        for what, chosen in (("round 0", ~federated), ("a round, on average", federated))
    ]
    for algorithm, what, rows in parts:
        table = Table(title=shown(f"{algorithm}: seconds of {what}"), title_justify="left")
        table.add_column("place")
        for phase in PHASES:
            table.add_column(phase, justify="right")
        for place in dict.fromkeys(rows["place"].tolist()):
            there = rows[rows["place"] == place]
            table.add_row(shown(place), *(f"{there[f'{phase}_seconds'].mean():.3f}" for phase in PHASES))
        console.print(table)
