"""`python -m fedsim`."""

import os
import sys
from pathlib import Path


# Python looks where the command is typed first, and would take a module there for one of a library that has its name.
if not sys.flags.safe_path and Path(__file__).parents[1] != Path.cwd():
    sys.path.append(sys.path.pop(sys.path.index(os.getcwd())))

from fedsim.cli import main  # noqa: E402


sys.exit(main())
