"""A pretrained model as an experiment names it: where it lies, and what its files hold."""

import contextlib
import dataclasses
import functools
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim.core import environment
from fedsim.core import tree as trees
from fedsim.core.fields import check_sha256, check_types, refuse
from fedsim.data.content import sha256s


# Where weights lie, as `transformers` looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a pretrained model lies.

    - `path`: a folder; `cache:NAME`, what `fedsim models fetch NAME` made; `MODULE:FOLDER`, a folder beside a module;
      or a hub name (with `hub`).
    - `hub`: whether a name may be fetched from the hub; a folder never needs it.
    - `revision`: the hub's branch, tag or commit; only a commit names the same weights for ever.
    - `sha256`: what `sha256_of` must give; None: anything. No part of what a run is called.
    """

    path: str
    hub: bool = False
    revision: str | None = None
    sha256: str | None = dataclasses.field(default=None, metadata={"placement": True})

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        check_sha256(self, "checkpoint")
        if not self.path:
            refuse("checkpoint.path", self.path, "a folder, or a hub name together with checkpoint.hub=true")

    @property
    def source(self) -> str:
        """The folder that the path stands for (`fedsim.core.environment.located`), or a hub name."""
        return environment.located(self.path)


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where `transformers` may look, and that it runs no code it finds there.

    **Raises:** `ValueError` for a name that is no folder and may not be fetched.
    """
    # Asking the library to look for a name in its local cache still sends requests, so a name is not even asked for.
    local = Path(checkpoint.source).is_dir()
    if not local and not checkpoint.hub:
        accepted = "a folder that transformers saved, or a hub name together with checkpoint.hub=true"
        if checkpoint.path.startswith("cache:"):
            accepted = f"fetched first: fedsim models fetch {checkpoint.path.removeprefix('cache:')}"
        refuse("checkpoint.path", checkpoint.path, accepted)
    return {"local_files_only": local, "revision": checkpoint.revision or "main", "trust_remote_code": False}


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """What a model is read from: its config and its weights; fetched from the hub if they may be."""
    return _files_of(checkpoint) if Path(checkpoint.source).is_dir() else _fetched(checkpoint)


@functools.lru_cache(maxsize=32)
def _fetched(checkpoint: Checkpoint) -> list[Path]:
    return _files_of(checkpoint)


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    with readable(checkpoint, "its config.json or weights could not be read"):
        found = [file_of(checkpoint, "config.json", needed=True)]
        if found[0] is None:
            raise ValueError(f"{named(checkpoint)}: holds no config.json, so it is no folder of a saved model")
        found += [path for name in WEIGHTS if (path := file_of(checkpoint, name))][:1]
        if str(found[-1]).endswith(".index.json"):
            shards = {*json.loads(Path(str(found[-1])).read_text())["weight_map"].values()}
            found += [file_of(checkpoint, shard, needed=True) for shard in sorted(shards)]
    return [Path(str(path)) for path in found]


def sha256_of(checkpoint: Checkpoint) -> str:
    """Hash of what a model is read from."""
    hashes = {path.name: sha256s(path)[str(path)] for path in files_of(checkpoint)}
    return trees.sha256_of_text("".join(f"{name} {digest}\n" for name, digest in hashes.items()))


def file_of(checkpoint: Checkpoint, name: str, needed: bool = False) -> str | None:
    """The path of one of its files; None if it has none of that name and needs none."""
    from transformers.utils.hub import cached_file

    where = {key: value for key, value in source_of(checkpoint).items() if key != "trust_remote_code"}
    return cached_file(checkpoint.source, name, _raise_exceptions_for_missing_entries=needed, **where)


def on_disk(checkpoint: Checkpoint, name: str) -> Path | None:
    """The path of one of its files on this machine: in its folder, or fetched before. Asks no hub."""
    from huggingface_hub import try_to_load_from_cache

    if Path(checkpoint.source).is_dir():
        path = Path(checkpoint.source, name)
        return path if path.is_file() else None
    found = try_to_load_from_cache(checkpoint.path, name, revision=checkpoint.revision) if checkpoint.hub else None
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def readable(checkpoint: Checkpoint, otherwise: str) -> Iterator[None]:
    """Turn what the library raises about a broken checkpoint into a `ValueError`, and keep it from printing tables."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # of any kind: files can be broken in more ways than their readers foresee
        if str(error).startswith("checkpoint."):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(f"{named(checkpoint)}: {otherwise} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def named(checkpoint: Checkpoint) -> str:
    return f"checkpoint.path={checkpoint.path!r}"


def check_content(checkpoint: Checkpoint) -> None:
    """**Raises:** `ValueError` with both hashes if a checkpoint does not hold what its `sha256` says."""
    if checkpoint.sha256 not in (None, found := sha256_of(checkpoint)):
        raise ValueError(f"{named(checkpoint)}: its content has changed: sha256 {checkpoint.sha256} then, {found} now")
