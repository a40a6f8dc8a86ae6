"""Versions of a tree on disk: safetensors files that are complete or absent, never half written."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from fedsim.core.tree import State, Tree, flat, nested, ordered
from fedsim.storage.place import Place, Remote, fetched, place, write_atomically


class Versions:
    """The versions of one tree: `<folder>/<name>.<version>.safetensors`; a version is the round it was made in.

    Saving version r keeps r and the newest before it, so round r can be repeated from what stood when it began.
    """

    def __init__(self, folder: str | Place, name: str) -> None:
        self.place, self.name = str(folder), name  # as text: there may be thousands, most of which hold nothing

    @property
    def folder(self) -> Place:
        return place(self.place)

    def path(self, version: int) -> Place:
        return self.folder / f"{self.name}.{version}.safetensors"

    def stored(self) -> list[int]:
        """Versions on disk, oldest first."""
        folder = self.folder
        if isinstance(folder, Remote):
            names = [file.name for file, _ in folder.files(deep=False)]
        else:
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return []
        pattern = re.compile(re.escape(self.name) + r"\.(\d+)\.safetensors")
        return sorted(int(match.group(1)) for match in map(pattern.fullmatch, names) if match)

    def save(self, version: int, state: State, metadata: Mapping[str, str] | None = None) -> None:
        """Write a version, then delete those nobody can ask for any more."""
        path = self.path(version)
        contiguous = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in flat(state).items()})
        # Neither tensors nor metadata: given as an empty dict, they make a file that nobody can read.
        about = dict(metadata) if metadata else None
        if isinstance(path, Remote):
            write_atomically(path, save(contiguous, about))
        else:
            _save_file(path, contiguous, about)
        for old in [v for v in self.stored() if v < version][:-1]:
            self.path(old).unlink(missing_ok=True)

    def load(self, before: int) -> tuple[int, State, dict[str, str]] | None:
        """`(version, state, metadata)` of the newest version older than `before`; None if there is none.

        **Raises:** `ValueError` naming a file that cannot be read.
        """
        versions = [version for version in self.stored() if version < before]
        if not versions:
            return None
        path = self.path(versions[-1])
        with fetched(path) as here:
            try:
                with safe_open(here, framework="pt") as file:
                    # Copies: mapped memory is not aligned, and aligned vector code may round differently.
                    tree = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
                    return versions[-1], ordered(nested(tree)), dict(file.metadata() or {})
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: not a readable checkpoint ({error})") from error


def _apart(tree: Tree) -> Tree:
    """The same tensors, none of which shares memory with another: two parts of a state may be one."""
    seen, found = set[int](), {}
    for name, tensor in tree.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _save_file(path: Path, tensors: Tree, metadata: dict[str, str] | None) -> None:
    """Straight to disk: the file is not made in memory first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"could not write {path}: {error}") from error


def private_of(folder: str | Place, participant: int) -> Versions:
    """A participant's private state, in a folder of its own: saving lists a folder, and there may be thousands."""
    return Versions(f"{folder}/{participant}", "state")


def read_json(path: Place) -> dict | None:
    """A JSON object from a file; None if there is no such file. **Raises:** `ValueError` naming a file that is cut."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable ({error})") from error
