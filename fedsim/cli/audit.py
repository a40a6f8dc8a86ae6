"""`fedsim audit`: attack what participants sent, and print the means."""

import argparse
import functools

from rich.console import Console
from rich.table import Table

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
        found = audit(directory, options.run, environment.data_dir(), modules, tell)
    table = Table("method", "seed", "round", "attack", "knowledge", "metric", "value", "95 % interval", title="attacks")
    for row in (row for rows in found.values() for row in rows if row["client"] is None):
        interval = "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
        cells = (row[name] for name in ("method", "seed", "round", "attack", "knowledge", "metric"))
        table.add_row(*map(str, cells), f"{row['value']:.3f}", interval)
    console.print(table)
    tell(f"written: {directory}/attacks")
    return 0
