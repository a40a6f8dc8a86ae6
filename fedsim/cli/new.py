"""`fedsim new NAME`: a small study of one's own, in a folder that runs at once."""

import argparse
import keyword
import sys
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.console import Console

from fedsim.core.fields import refuse
from fedsim.core.terminal import say


SUFFIX = ".j2"


def new_command(options: argparse.Namespace, console: Console) -> int:
    name = options.name
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        refuse("NAME", name, "a name that Python can import: letters, digits and _, no digit first")
    if name in sys.stdlib_module_names or name in ("fedsim", "fedgrow_algo", "baselines", "benchmarks"):
        refuse("NAME", name, "a name that no other module has")
    folder = Path(name)
    if folder.exists() or folder.is_symlink():
        refuse("NAME", name, f"one that is not there yet: {folder.absolute()} exists")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    written = {
        file.name.removesuffix(SUFFIX): environment.from_string(file.read_text(encoding="utf-8")).render(name=name)
        for file in files("fedsim.cli").joinpath("project").iterdir()
        if file.name.endswith(SUFFIX)
    }
    folder.mkdir()
    for file, text in sorted(written.items()):
        (folder / file).write_text(text, encoding="utf-8")
        say(console, f"written: {folder / file}")
    say(console, f"next: fedsim sweep {name}.experiments:suite --runtime inline --out results/{name}")
    return 0
