"""Code that the user names: modules and functions that are imported and called, and what goes wrong in them."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


PACKAGE = Path(__file__).resolve().parents[1]


def module_named(name: str, what: str) -> ModuleType:
    """A module that the user names; it may lie where the command is typed, which is looked at last.

    - `what`: the option or field that names it, and its value.

    **Raises:** `ValueError` if there is none, if two have that name, or naming the line of it that went wrong.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    called(lambda: _check_name(name.partition(".")[0], here), what)
    return called(lambda: importlib.import_module(name), what)


def called(function: Callable[[], Any], what: str) -> Any:
    """What the user's own code returns. **Raises:** `ValueError` saying what went wrong in it, and in which line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {_reason(error)}") from error


def check_shadowed() -> None:
    """**Raises:** `ValueError` for a module where the command is typed that has the name of one of Python's or of one
    that is imported: Ray has its workers look there first, and would take it for the other."""
    here = os.getcwd()
    names = {Path(name).stem for name in os.listdir(here) if name.endswith(".py") or "." not in name}
    for name in sorted(names & ((sys.stdlib_module_names | sys.modules.keys()) - {"__main__"})):
        _check_name(name, here)


def _check_name(name: str, here: str) -> None:
    """**Raises:** `ValueError` if both a module here and another one, which Python finds first, have a name."""
    mine = importlib.machinery.PathFinder.find_spec(name, [here])
    if mine is None or mine.origin is None:  # nothing here, or a folder without an __init__.py
        return
    imported = sys.modules.get(name)
    found = imported.__spec__ if imported is not None else importlib.util.find_spec(name)
    other = name if found is None or found.origin is None else found.origin
    if other != mine.origin and not (os.path.exists(other) and os.path.samefile(other, mine.origin)):
        raise ValueError(f"{mine.origin} has the name of {other}, which Python finds first: rename it")


def _reason(error: BaseException) -> str:
    """The last line of a traceback, and the line of the user's code that it leads to, if it does."""
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SystemExit):
        said = f"it ends the process: {said}"
    if isinstance(error, ValueError | ImportError):
        said = str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{said} (looked in {os.getcwd()} as well)"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    if isinstance(error, SyntaxError):
        frames = [traceback.FrameSummary(error.filename or "", error.lineno or 0, "")]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _is_ours(filename: str) -> bool:
    return filename.startswith(("<frozen", f"{PACKAGE}{os.sep}")) or filename == importlib.__file__
