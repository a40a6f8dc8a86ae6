"""Who sees what, drawn: `python -m benchmarks.threat_model docs/threat-model.svg`.

A row for everything that may leave a participant, with the methods that say so of themselves (`Algorithm.leaves`); a
column for everybody who may look. What stands in the cells is docs/privacy.md in short.
"""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.methods import named as named_methods  # noqa: E402
from fedsim.algorithm import Leaves  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import path_of  # noqa: E402


COLOURS = {"nothing": "#ffffff", "sum": "#d5e5f2", "each": "#8fbbdc", "own": "#eeeeee", "all": "#e8a06a"}
LEGEND = {
    "own": "its own",
    "nothing": "nothing",
    "sum": "of all together",
    "each": "of every single participant",
    "all": "everything, data too",
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What somebody sees of participants. `how`: a key of `COLOURS`."""

    how: str
    text: str


OWN, NOTHING, ALL = Seen("own", "all of its own"), Seen("nothing", "nothing"), Seen("all", "states, scores,\nlabels")
TABLES = Seen("sum", "mean test scores,\nwho took part")
WATCHERS = (
    *("the participant", "server", "server behind\nsecure sums", "other\nparticipants"),
    *("reader of\npublished tables", "reader of the\nresults folder"),
)


def seen(leaves: Leaves) -> tuple[Seen, ...]:
    """A row: what each of `WATCHERS` sees where this leaves a participant."""
    if leaves == "nothing":
        return OWN, NOTHING, NOTHING, NOTHING, TABLES, ALL
    sent = "small model" if leaves == "auxiliary model" else leaves
    single = Seen("each", f"each one's\n{sent}")
    summed = Seen("sum", f"sum of the\n{sent}{'' if sent.endswith('s') else 's'}")
    return OWN, single, summed, summed, TABLES, ALL


def figure() -> Figure:
    """The whole table. Rows go from what tells least to what tells most."""
    of: dict[Leaves, list[str]] = {what: [] for what in typing.get_args(Leaves)}
    for method in named_methods().values():
        if method.name not in of[method.leaves]:
            of[method.leaves].append(method.name)
    rows: list[tuple[Leaves, list[str]]] = [(what, names) for what, names in of.items() if names]
    height, wide, left = 0.9, 1.75, 3.9
    drawn = Figure(figsize=(left + wide * len(WATCHERS) + 0.1, height * (len(rows) + 1) + 0.5))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, left + wide * len(WATCHERS) + 0.1)
    axes.set_ylim(height * (len(rows) + 1) + 0.1, -0.4)
    axes.set_axis_off()
    for place, name in enumerate(WATCHERS):
        axes.text(left + wide * (place + 0.5), height / 2, name, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(0.1, height / 2, "what leaves a participant", va="center", fontsize=10, weight="bold")
    for number, (what, names) in enumerate(rows, start=1):
        axes.text(0.1, height * (number + 0.3), what, va="center", fontsize=10, weight="bold")
        axes.text(0.1, height * (number + 0.66), _folded(names), va="center", fontsize=7, color="#444444")
        for place, cell in enumerate(seen(what)):
            corner = (left + wide * place + 0.03, height * number + 0.03)
            box = Rectangle(corner, wide - 0.06, height - 0.06, facecolor=COLOURS[cell.how], edgecolor="#999999")
            axes.add_patch(box)
            axes.text(corner[0] + wide / 2 - 0.03, corner[1] + height / 2 - 0.03, cell.text, ha="center", va="center",
                      fontsize=8.5)  # fmt: skip
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=COLOURS[how], edgecolor="#999999", label=LEGEND[how]) for how in LEGEND
    ]
    axes.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=8, borderaxespad=0.2)
    return drawn


def _folded(names: Sequence[str], width: int = 62) -> str:
    """Names, a comma between, in at most two lines; further ones are counted."""
    lines, left = [""], list(names)
    while left:
        longer = f"{lines[-1]}, {left[0]}" if lines[-1] else left[0]
        if len(longer) > width and len(lines) == 2:
            return "\n".join(lines) + f", +{len(left)}"
        lines = [*lines, left[0]] if len(longer) > width else [*lines[:-1], longer]
        left.pop(0)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="FILE.svg")
    options = parser.parse_args(arguments)

    def write() -> int:
        matplotlib.rcParams["svg.hashsalt"] = "fedsim"  # the same file from the same table
        figure().savefig(path_of(options.out, "FILE.svg"), metadata={"Date": None})
        return 0

    return exit_status(write, Console())


if __name__ == "__main__":
    sys.exit(main())
