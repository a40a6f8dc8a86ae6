"""`fedsim audit`: attack what participants sent, and print the means."""

import argparse
import functools

from rich.console import Console

from fedsim.core import environment
from fedsim.core.modules import module_named
from fedsim.core.terminal import say
from fedsim.privacy.audit import audit
from fedsim.results.store import runs_in
from fedsim.storage.locking import locked
from fedsim.storage.place import place


def audit_command(options: argparse.Namespace, console: Console) -> int:
    modules = [module_named(name, f"--import={name!r}") for name in options.modules]
    directory = place(options.directory, "DIR")
    runs_in(directory)  # a folder without results is refused before a lock is made in it
    tell = functools.partial(say, console)
    with locked(directory) as directory:
        for rows in audit(directory, options.run, environment.data_dir(), modules, tell).values():
            tell(f"run {rows[0]['run_id']}" if rows else "nothing could be attacked")
            for row in (row for row in rows if row["client"] is None):
                interval = "" if row["low"] is None else f"  ({row['low']:.3f} .. {row['high']:.3f})"
                what = f"round {row['round']:<4} {row['attack']:<20}{row['knowledge']:<13}{row['metric']:<20}"
                tell(f"  {what}{row['value']:8.3f}{interval}")
    tell(f"written: {directory}/attacks")
    return 0
