"""The README's figure: `python benchmarks/readme_figure.py results/quick docs/quick.svg`, of what `make demo` wrote."""

import sys
from pathlib import Path

import matplotlib


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

import fedsim  # noqa: E402


def main(directory: str, out: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "fedsim"  # the same file from the same results
    figure = fedsim.load(directory).plot("accuracy_mean", against="MB")
    (axes,) = figure.axes
    axes.set_ylabel("accuracy, mean over participants")
    axes.set_xlabel("MB sent and received by all participants, so far")
    axes.grid(alpha=0.25)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
