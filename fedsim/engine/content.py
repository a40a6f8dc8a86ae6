"""What a run reads, by content: a path says where data and checkpoints lie, not what they hold."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core.tree import sha256_of_text
from fedsim.data.content import sha256s
from fedsim.data.source import DataConfig, load, paths
from fedsim.experiment import Experiment
from fedsim.models import checkpoint as checkpoints
from fedsim.models.checkpoint import Checkpoint


SHORT = 16  # digits of a hash in a message


@dataclasses.dataclass(frozen=True)
class Content:
    """What a run has read.

    - `data_sha256`: of all examples, as tensors. - `checkpoints_sha256`: of all checkpoints, and of data that a method
      names; None: there are none.
    - `files`: hash of each file, by path. Two runs read the same if the two hashes above agree; files tell what
      differs if they do not.
    """

    data_sha256: str | None = None
    checkpoints_sha256: str | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def change_from(self, before: "Content") -> str | None:
        """Which files hold something else than `before`, with both hashes; None if the same was read.

        What is not known of one of them is not compared.
        """
        pairs = (before.data_sha256, self.data_sha256), (before.checkpoints_sha256, self.checkpoints_sha256)
        differing = [pair for pair in pairs if None not in pair and pair[0] != pair[1]]
        if not differing:
            return None
        changed = [(path, was, self.files.get(path)) for path, was in before.files.items() if path in self.files]
        found = [_changed(path, was, now) for path, was, now in changed if was != now]
        found += [f"{path} is new" for path in self.files if before.files and path not in before.files]
        found += [f"{path} is gone" for path in before.files if path not in self.files]
        return "; ".join(found[:4]) or "; ".join(_changed("what is read", *pair) for pair in differing)


def _changed(what: str, was: str | None, now: str | None) -> str:
    return f"{what} has changed: sha256 {str(was)[:SHORT]} then, {str(now)[:SHORT]} now"


def pinned(experiment: Experiment, data_dir: str | None) -> Experiment:
    """The experiment with the content of its data and checkpoints: whoever reads anything else in its name raises.

    **Raises:** `ValueError` where the data are missing, or not as the experiment says.
    """
    return _pinned(experiment, data_dir)


def _pinned(value: Any, data_dir: str | None) -> Any:
    """The same with the content of everything in it that is read."""
    if isinstance(value, DataConfig):
        return dataclasses.replace(value, sha256=load(value, data_dir).fingerprint)
    if isinstance(value, Checkpoint):
        checkpoints.check_content(value)
        return dataclasses.replace(value, sha256=checkpoints.sha256_of(value))
    if isinstance(value, tuple):
        return tuple(_pinned(each, data_dir) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or not list(_read(value)):
        return value
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    return dataclasses.replace(value, **{name: _pinned(getattr(value, name), data_dir) for name in fields})


def _read(value: Any) -> Iterator[Checkpoint | DataConfig]:
    """All data and checkpoints in an experiment: its own, its tiers', and those that its algorithm names."""
    if isinstance(value, Checkpoint | DataConfig):
        yield value
    elif isinstance(value, tuple):
        yield from (each for item in value for each in _read(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (each for field in dataclasses.fields(value) for each in _read(getattr(value, field.name)))


def content_of(experiment: Experiment, data_dir: str | None) -> Content:
    """What an experiment reads if it is run now."""
    experiment = pinned(experiment, data_dir)
    read = dict.fromkeys(path for each in _read(experiment) for path in _paths(each, data_dir))
    files = [sha256s(path) for path in read]
    named = [each for each in _read(experiment) if each is not experiment.task.data]
    together = "".join(f"{_where(each)} {each.sha256}\n" for each in named)
    return Content(
        data_sha256=experiment.task.data.sha256,
        checkpoints_sha256=sha256_of_text(together) if named else None,
        files=functools.reduce(lambda one, other: one | other, files, {}),
    )


def _where(read: Checkpoint | DataConfig) -> str:
    return read.path if isinstance(read, Checkpoint) else read.name


def _paths(read: Checkpoint | DataConfig, data_dir: str | None) -> Sequence[Path]:
    return checkpoints.files_of(read) if isinstance(read, Checkpoint) else paths(read, data_dir)
