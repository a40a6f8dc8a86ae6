"""Where numbers come from: sources, commit, versions, hardware."""

import functools
import hashlib
import inspect
import os
import pickle
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core import environment
from fedsim.core import tree as trees
from fedsim.results.machine import ROOT, cpu_model, sha256_of, sources


WRAPPED = ("fget", "func", "__func__", "__wrapped__", "args", "keywords")  # what methods and functions are wrapped in
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def code_sha256(algorithm: Any, family: str = "", start: Any = None) -> str:
    """Hash of the sources a run's numbers depend on: the packages', and those that the algorithm, the model family and
    what everyone begins with are made of, if they are somebody's own.

    A class that was typed into a notebook's cell or a prompt has no file: its code is hashed, and the functions,
    classes and values that it names.

    **Raises:** `ValueError` for a value that cannot be hashed.
    """
    try:
        own = inspect.getsourcefile(type(algorithm))
    except (OSError, TypeError):
        typed = "\n".join(_typed(type(algorithm), type(algorithm).__module__, set()))
        return hashlib.sha256((sha256_of(sources()) + typed).encode()).hexdigest()
    modules = {kind.__module__ for each in (algorithm, start) for kind in type(each).__mro__}
    modules |= {family} if "." in family else set()
    return sha256_of(sources() | _reached(modules) | ({Path(own).resolve()} if own is not None else set()))


def _reached(names: Iterable[str]) -> set[Path]:
    """Files of these modules, and of all that they take names from, but for Python's own and those of libraries."""
    ours, found, seen, waiting = sources(), set[Path](), set[str](), [*names]
    while waiting:
        name = waiting.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in seen or file is None or file.startswith(LIBRARIES) or (path := Path(file).resolve()) in ours:
            continue
        seen.add(name)
        found.add(path)
        for value in list(vars(sys.modules[name]).values()):
            from_where = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            waiting += [from_where] if isinstance(from_where, str) else []
    return found


def _typed(item: Any, module: str, seen: set[Any]) -> Iterator[str]:
    """What decides what a class or function of a module without a file does, the same in every process."""
    if isinstance(item, type | FunctionType | ModuleType):
        if item in seen:
            yield item.__name__
            return
        where = item.__name__ if isinstance(item, ModuleType) else item.__module__
        if where != module:
            yield f"{where} {item.__name__} {sha256_of(_reached({where}))}"
            return
        seen.add(item)
    inner: list[Any] = []
    if isinstance(item, str | int | float | bytes | None):
        yield repr(item)
    elif isinstance(item, Tensor):
        yield trees.sha256({"": item})
    elif isinstance(item, set | frozenset):
        yield repr(sorted(map(repr, item)))  # their order is not the same in every process
    elif isinstance(item, tuple | list | dict):
        yield f"{type(item).__name__} of {len(item)}"
        inner = [*item, *item.values()] if isinstance(item, dict) else [*item]
    elif isinstance(item, type):
        own = {name: each for name, each in vars(item).items() if not name.startswith(("__", "_abc_"))}
        members = own | {name: each for name, each in vars(item).items() if isinstance(each, FunctionType)}
        yield f"{item.__qualname__}: {sorted(members)}"  # without what Python notes in a class, as `__slotnames__`
        inner = [*item.__bases__, *(members[name] for name in sorted(members))]
    elif isinstance(item, CodeType):
        yield f"{item.co_name} {item.co_code.hex()} {item.co_names} {item.co_varnames} {item.co_freevars}"
        inner = [*item.co_consts]
    elif isinstance(item, FunctionType):
        named = [item.__globals__.get(name) for name in _names(item.__code__)]
        closure = [cell.cell_contents for cell in item.__closure__ or ()]
        inner = [item.__code__, item.__defaults__, item.__kwdefaults__, *closure, *named]
    elif wrapped := [each for name in WRAPPED if (each := getattr(item, name, None)) is not None]:
        inner = wrapped
    elif type(item).__module__ == module or isinstance(item, nn.Module):
        if id(item) not in seen:
            seen.add(id(item))
            inner = [type(item), vars(item)]
    else:
        yield _pickled(item)
    for each in inner:
        yield from _typed(each, module, seen)


def _pickled(item: Any) -> str:
    """Hash of an object of a library's. **Raises:** `ValueError` for one that cannot be compared from run to run."""
    try:
        return hashlib.sha256(pickle.dumps(item)).hexdigest()
    except Exception as error:  # of any kind: the object's own code runs
        kind = type(item).__name__
        raise ValueError(
            f"algorithm: its methods use a global of type {kind}, which cannot be compared from run to run "
            f"({type(error).__name__}): make it a field of the algorithm, or lay the class in a file"
        ) from error


def _names(code: CodeType) -> list[str]:
    """The global names in a function, and in those that it defines."""
    within = [name for each in code.co_consts if isinstance(each, CodeType) for name in _names(each)]
    return [*code.co_names, *within]


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout the packages lie in, `+` when it has changes; None outside a checkout.

    A checkout that was sent to a cluster leaves its history behind: `fedsim submit` says what its commit was.
    """
    told = environment.git_commit()
    if told is not None:
        return told
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def hardware() -> dict[str, Any]:
    """The driver's machine: native numerics give the same bits on processors of one model only."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
    }
