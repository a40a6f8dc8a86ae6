"""The one place where environment variables are read, or set (`fedsim.runtime.forks` hands them on, whole)."""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping

from fedsim.core.fields import refuse


def data_dir() -> str | None:
    """Where known data sets are looked up, as an absolute path: `FEDSIM_DATA_DIR`."""
    folder = os.environ.get("FEDSIM_DATA_DIR")
    return os.path.abspath(os.path.expanduser(folder)) if folder else None


def cache_dir() -> str:
    """Where data are prepared: `FEDSIM_CACHE_DIR`, or a folder of the user's (`XDG_CACHE_HOME`, ~/.cache)."""
    if folder := os.environ.get("FEDSIM_CACHE_DIR"):
        return os.path.abspath(os.path.expanduser(folder))
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(os.path.abspath(os.path.expanduser(users)), "fedsim")


def located(name: str) -> str:
    """The folder that a checkpoint's or tokenizer's name stands for, which is the same name on every machine.

    `cache:NAME`: what `fedsim models fetch NAME` made. `MODULE:FOLDER`: a folder beside an importable module. Else a
    path, whose `~` is written out.
    """
    first, colon, rest = name.partition(":")
    if colon and first == "cache":
        return os.path.join(cache_dir(), "models", rest)
    if colon and first.isidentifier() and (found := importlib.util.find_spec(first)) and found.origin:
        beside = os.path.join(os.path.dirname(found.origin), rest)
        return beside if os.path.isdir(beside) else name
    return os.path.expanduser(name)


def use_cache_dir(folder: str) -> None:
    """Have this process, and those that it starts, prepare data elsewhere."""
    os.environ["FEDSIM_CACHE_DIR"] = folder


def ray_address() -> str | None:
    """A cluster to join without being told on the command line: `RAY_ADDRESS`."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_token_file() -> str | None:
    """The file Ray would read its token from; None where the token itself is in `RAY_AUTH_TOKEN`."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")


def ray_asks_for_token() -> bool:
    """Whether a Ray that is started here will ask for a token: it does, unless `RAY_AUTH_MODE` says otherwise."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def use_ray_token() -> None:
    """Have Ray send its token, if this user has one, to the cluster that is joined: by itself it does so only where it
    is told to (`RAY_AUTH_MODE`). A cluster that asks for none does not mind."""
    named = ray_token_file()
    if named is None or os.path.exists(named):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def git_commit() -> str | None:
    """The commit of sources that were sent here without their history: `FEDSIM_GIT_COMMIT`."""
    return os.environ.get("FEDSIM_GIT_COMMIT") or None


def use_large_pages() -> None:
    """Have torch ask the system for large pages under large tensors. It looks when a process makes its first tensor.

    Sums of updates are made anew in every round, and to map 80 MB in small pages takes longer than to add them up.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def s3_endpoint() -> str | None:
    """A server that speaks S3 and is not Amazon's: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def aws_region() -> str | None:
    """`AWS_REGION`, `AWS_DEFAULT_REGION`."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


LONGEST_FOLDER = 37  # bytes: the sockets in Ray's sessions have names of 70 more, and the system allows 107


def temporary_folder() -> str:
    """Where Ray's sessions and temporary files go, full or not: `RAY_TMPDIR`, `TMPDIR`, or /tmp where none is set or it
    is too long."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return folder if len(os.fsencode(folder)) <= LONGEST_FOLDER else "/tmp"


def liveness_seconds() -> float:
    """After how many seconds without an answer a process is taken for lost: `FEDSIM_LIVENESS_SECONDS`.

    **Raises:** `ValueError` for what is no such number.
    """
    text = os.environ.get("FEDSIM_LIVENESS_SECONDS") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        refuse("FEDSIM_LIVENESS_SECONDS", text, "a number of seconds, at least 1")
    return seconds


def numerics() -> str | None:
    """What to compute with where nobody says otherwise: `FEDSIM_NUMERICS`."""
    return os.environ.get("FEDSIM_NUMERICS") or None


def variables(names: Iterable[str]) -> dict[str, str | None]:
    """What is set; None where nothing is."""
    return {name: os.environ.get(name) for name in names}


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set variables, also for the processes this one starts; None: unset."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
