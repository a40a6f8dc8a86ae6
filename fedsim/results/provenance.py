"""Where numbers come from: sources, commit, versions, hardware."""

import functools
import inspect
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fedsim.core import environment
from fedsim.results.machine import ROOT, cpu_model, sha256_of, sources


def code_sha256(algorithm: Any) -> str:
    """Hash of the sources a run's numbers depend on: the packages', and the algorithm's own file."""
    files, own = sources(), inspect.getsourcefile(type(algorithm))
    if own is not None:
        files.add(Path(own).resolve())
    return sha256_of(files)


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
