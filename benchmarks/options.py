"""What the measurements ask of their options, so that a wrong one is refused as `fedsim`'s are (exit status 2)."""

import argparse

from fedsim.core.fields import path_of, refuse


def check_numbers(options: argparse.Namespace, *names: str, least: float, most: float = 10**6) -> None:
    """**Raises:** `ValueError` naming an option whose number is outside these limits."""
    for name in names:
        value = getattr(options, name)
        if not least <= value <= most:
            refuse(f"--{name.replace('_', '-')}", value, f"at least {least} and at most {most}")


def check_json(options: argparse.Namespace) -> None:
    """Make a path of `--json FILE`, if it is given. **Raises:** `ValueError` if no such file can be written."""
    if options.json is not None:
        path = path_of(options.json, "--json")
        if path.is_dir() or not path.absolute().parent.is_dir():
            refuse("--json", options.json, "a file in a folder that is there")
        options.json = path
