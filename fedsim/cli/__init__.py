"""CLI: the command line. `words` is what can be typed, `options` what commands share, `commands` and `sweep` what
they do.

Exit status: 0 done, 1 a run failed, 2 a wrong request, 130 interrupted.
"""

from fedsim.cli.options import exit_status
from fedsim.cli.words import main, parser


__all__ = ["exit_status", "main", "parser"]
