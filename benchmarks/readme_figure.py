"""What the README shows of `make demo`: `python benchmarks/readme_figure.py results/quick docs/quick.svg`.

A figure a regime, `quick.svg` and `quick-public.svg`; the numbers, `quick.json`, against which a test holds the
README's tables and what it says of them; and the tables as Markdown, on standard output.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

import fedsim  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import path_of  # noqa: E402
from fedsim.report.readings import by_setting, records  # noqa: E402
from fedsim.report.tables import COMPACT, cells  # noqa: E402
from fedsim.storage.place import place  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("out", metavar="FILE.svg")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write(options.directory, path_of(options.out, "FILE.svg")), Console())


def write(directory: str, out: Path) -> int:
    matplotlib.rcParams["svg.hashsalt"] = "fedsim"  # the same file from the same results
    study = fedsim.load(place(directory, "DIR"))
    rows = records(study.table())
    for setting, of_setting in by_setting(rows).items():
        figure = study.plot("accuracy_mean", against="MB", setting=setting)
        (axes,) = figure.axes
        axes.set_ylabel("accuracy, mean over participants")
        axes.set_xlabel("MB sent and received by all participants, so far")
        axes.grid(alpha=0.25)
        path = out if ", from " not in setting else out.with_stem(f"{out.stem}-public")
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        print(f"**{setting}**\n\n{markdown(cells(of_setting))}\n")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def markdown(lines: Sequence[Sequence[str]], headings: Iterable[str] = COMPACT) -> str:
    """A table of these columns, the first two of text."""
    marks = [":--" if number < 2 else "--:" for number, _ in enumerate(headings)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(headings), marks, *lines))


if __name__ == "__main__":
    sys.exit(main())
