"""Run what is missing of one or more suites, and report: `python benchmarks/sweep.py --suite quick --out DIR`.

The same as `fedsim sweep --suite quick`, which is what it does where no suite is named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from fedsim.cli import main as fedsim  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    named = "--suite" in words or any(word.startswith("--suite=") for word in words)
    return fedsim(["sweep", *words, *([] if named else ["--suite", "quick"])])


if __name__ == "__main__":
    sys.exit(main())
