"""`python -m fedsim`, and the command `fedsim`."""

import sys
from pathlib import Path


# Python looks where the command is typed first, and would take a module there for one of a library that has its name.
if __name__ == "__main__" and not sys.flags.safe_path and Path(__file__).parents[1] != Path.cwd():
    sys.path.append(sys.path.pop(0))

from fedsim.core import interrupts


interrupts.install()  # before the imports that take long

from fedsim.cli import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main())
