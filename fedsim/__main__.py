"""`python -m fedsim`, and the command `fedsim`."""

from fedsim.core import interrupts


interrupts.install()  # before the imports that take long

import sys  # noqa: E402

from fedsim.cli import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main())
