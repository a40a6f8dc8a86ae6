"""`python -m fedsim`."""

import sys
from pathlib import Path


# Python looks where the command is typed first, and would take a module there for one of a library that has its name.
if not sys.flags.safe_path and Path(__file__).parents[1] != Path.cwd():
    sys.path.append(sys.path.pop(0))

from fedsim.cli import main


sys.exit(main())
