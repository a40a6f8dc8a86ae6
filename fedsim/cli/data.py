"""`fedsim data`: what is prepared on this machine. It imports torch."""

import argparse

from rich.console import Console
from rich.table import Table

from fedsim.core import environment
from fedsim.core.terminal import say, shown
from fedsim.data import load, prepared
from fedsim.experiment import load_experiments, with_settings


DIGITS = 12  # of a fingerprint: enough to tell them apart


def list_command(options: argparse.Namespace, console: Console) -> int:
    table = Table(box=None, header_style="bold")
    table.add_column("fingerprint", no_wrap=True)
    for name in ("from", "train", "test", "MB", "made"):
        table.add_column(name, justify="left" if name in ("from", "made") else "right")
    rows = prepared.kept()
    for row in rows:
        counts = [f"{row.examples[split]:,}" if row.examples else "damaged" for split in ("train", "test")]
        names, made = shown(", ".join(row.names)), shown("; or ".join(row.made))
        table.add_row(row.fingerprint[:DIGITS], names, *counts, f"{row.nbytes / 1e6:.1f}", made)
    if rows:
        console.print(table)
    size = sum(row.nbytes for row in rows) / 1e6
    say(console, f"{len(rows)} prepared data sets, {size:.1f} MB, in {environment.cache_dir()} (FEDSIM_CACHE_DIR)")
    if left := prepared.left():
        say(console, f"{left / 1e6:.1f} MB that killed processes left unfinished: `fedsim data clean` frees them")
    return 0


def prepare_command(options: argparse.Namespace, console: Console) -> int:
    named = [each for target in options.targets for each in load_experiments(target)]
    configs = [with_settings(experiment, options.settings).task.data for experiment in named]
    for config in dict.fromkeys(configs):
        found = load(config, environment.data_dir())
        made = found.made or f"{len(found.train):,} + {len(found.test):,} examples"
        say(console, f"{config.name}: {made}; {found.fingerprint[:DIGITS]}")
    return 0


def clean_command(options: argparse.Namespace, console: Console) -> int:
    say(console, f"freed {prepared.clean(options.fingerprints) / 1e6:.1f} MB")
    return 0
