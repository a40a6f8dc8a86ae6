"""Run what is missing of one or more suites, and report: `python benchmarks/sweep.py --suite quick --out DIR`.

It is `fedsim sweep`, of the suite `quick` where nothing is named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from fedsim.core import interrupts  # noqa: E402


if __name__ == "__main__":
    interrupts.install()  # before the imports that take long

from fedsim.cli import main as fedsim  # noqa: E402
from fedsim.cli import parser  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    options = parser().parse_args(["sweep", *words])
    suite = [] if options.suite or options.targets else ["--suite", "quick"]
    return fedsim(["sweep", *words, *suite], alone=arguments is None)


if __name__ == "__main__":
    sys.exit(main())
