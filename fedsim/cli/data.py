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
    for name in ("fingerprint", "from", "train", "test", "MB"):
        table.add_column(name, justify="left" if name in ("fingerprint", "from") else "right")
    rows = prepared.kept()
    for row in rows:
        counts = [f"{row.examples[split]:,}" if row.examples else "damaged" for split in ("train", "test")]
        names = shown(", ".join(row.names))
        table.add_row(row.fingerprint[:DIGITS], names, *counts, f"{row.nbytes / 1e6:.1f}")
    if rows:
        console.print(table)
    size = sum(row.nbytes for row in rows) / 1e6
    say(console, f"{len(rows)} prepared data sets, {size:.1f} MB, in {environment.cache_dir()} (FEDSIM_CACHE_DIR)")
    return 0


def prepare_command(options: argparse.Namespace, console: Console) -> int:
    named = [each for target in options.targets for each in load_experiments(target)]
    configs = [with_settings(experiment, options.settings).task.data for experiment in named]
    for config in dict.fromkeys(configs):
        found = load(config, environment.data_dir())
        say(
            console, f"{config.name}: {len(found.train):,} + {len(found.test):,} examples, {found.fingerprint[:DIGITS]}"
        )
    return 0


def clean_command(options: argparse.Namespace, console: Console) -> int:
    say(console, f"freed {prepared.clean(options.fingerprints) / 1e6:.1f} MB")
    return 0
