"""Results -> one page: `python benchmarks/report.py DIR [DIR ...]`, the same as `fedsim report`."""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from fedsim.cli import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
