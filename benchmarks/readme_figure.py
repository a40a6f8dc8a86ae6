"""The README's figure: `python benchmarks/readme_figure.py results/quick docs/quick.svg`, of what `make demo` wrote."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

import fedsim  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import path_of  # noqa: E402
from fedsim.storage.place import place  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("out", metavar="FILE.svg")
    options = parser.parse_args(arguments)
    return exit_status(lambda: draw(options.directory, path_of(options.out, "FILE.svg")), Console())


def draw(directory: str, out: Path) -> int:
    matplotlib.rcParams["svg.hashsalt"] = "fedsim"  # the same file from the same results
    figure = fedsim.load(place(directory, "DIR")).plot("accuracy_mean", against="MB")
    (axes,) = figure.axes
    axes.set_ylabel("accuracy, mean over participants")
    axes.set_xlabel("MB sent and received by all participants, so far")
    axes.grid(alpha=0.25)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
