"""Where numbers come from: sources, commit, versions, hardware."""

import functools
import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedsim", "fedgrow_algo", "baselines")
REPORTED = ("fedsim", "torch", "ray", "transformers", "datasets", "numpy", "pandas", "pyarrow", "scikit-learn")


def code_sha256(algorithm: Any) -> str:
    """Hash of the sources a run's numbers depend on: the packages', and the algorithm's own file."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    own = inspect.getsourcefile(type(algorithm))
    if own is not None:
        files.add(Path(own).resolve())
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: os.path.relpath(path, ROOT)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout the packages lie in, `+` when it has changes; None outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in REPORTED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """The driver's machine: bits are promised to be equal only on processors of one model."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
