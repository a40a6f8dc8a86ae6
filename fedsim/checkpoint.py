"""Versions of a tree on disk: safetensors files that are complete or absent, never half written."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedsim.tree import Tree


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: temporary file beside it, synced, renamed. A failure leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error


class Versions:
    """The versions of one tree: `<folder>/<name>.<version>.safetensors`; a version is the round it was made in.

    Saving version r keeps r and the newest before it, so round r can be repeated from what stood when it began.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.place, self.name = os.fspath(folder), name  # as text: there may be thousands, most of which hold nothing

    @property
    def folder(self) -> Path:
        return Path(self.place)

    def path(self, version: int) -> Path:
        return self.folder / f"{self.name}.{version}.safetensors"

    def stored(self) -> list[int]:
        """Versions on disk, oldest first."""
        try:
            names = os.listdir(self.place)
        except FileNotFoundError:
            return []
        pattern = re.compile(re.escape(self.name) + r"\.(\d+)\.safetensors")
        return sorted(int(match.group(1)) for match in map(pattern.fullmatch, names) if match)

    def save(self, version: int, tree: Tree, metadata: Mapping[str, str] | None = None) -> None:
        """Write a version, then delete those nobody can ask for any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(version)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tree.items()}
        try:
            # Neither tensors nor metadata: given as an empty dict, they make a file that nobody can read.
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OSError(f"could not write {path}: {error}") from error
        for old in [v for v in self.stored() if v < version][:-1]:
            self.path(old).unlink(missing_ok=True)

    def load(self, before: int) -> tuple[int, Tree, dict[str, str]] | None:
        """`(version, tree, metadata)` of the newest version older than `before`; None if there is none.

        **Raises:** `ValueError` naming a file that cannot be read.
        """
        versions = [version for version in self.stored() if version < before]
        if not versions:
            return None
        path = self.path(versions[-1])
        try:
            with safe_open(path, framework="pt") as file:
                # Copies: mapped memory is not aligned, and aligned vector code may round differently.
                tree = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
                return versions[-1], tree, dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable checkpoint ({error})") from error


def private_of(folder: str | Path, participant: int) -> Versions:
    """A participant's private state, in a folder of its own: saving lists a folder, and there may be thousands."""
    return Versions(f"{os.fspath(folder)}/{participant}", "state")


def read_json(path: Path) -> dict | None:
    """A JSON object from a file; None if there is no such file. **Raises:** `ValueError` naming a file that is cut."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable ({error})") from error
