"""What files hold, by hash: of data sets, tokenizers and checkpoints that a run reads."""

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


Stamp = tuple[tuple[str, int, int, int, int], ...]


def stamp(*paths: Path) -> Stamp:
    """Name, size, times and inode of every file: what is remembered of files is forgotten when these change."""
    found = [(str(file), file.stat()) for path in paths for file in _files(path)]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in found)


def sha256s(path: Path) -> dict[str, str]:
    """Hash of content by path: of a file; of a folder's files, and of each folder in it as a whole.

    Remembered as long as they stay.
    """
    return dict(_sha256s(path, stamp(path)))


@functools.lru_cache(maxsize=64)
def _sha256s(path: Path, stamp: Stamp) -> dict[str, str]:
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    return {str(entry): _hash(entry) for entry in entries if entry.exists() and not entry.name.startswith(".")}


def _hash(path: Path) -> str:
    """Of a file's bytes, or of the names and bytes of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = "".join(f"{file.relative_to(path)}\0{_hash(file)}\n" for file in _files(path))
    return hashlib.sha256(inside.encode(errors="surrogateescape")).hexdigest()


def _files(path: Path) -> Iterable[Path]:
    """A file itself; of a folder all files in it, at any depth and behind links, but hidden ones."""
    if not path.is_dir():
        return [path]
    found, seen = [], set()
    for folder, inner, names in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:  # a link may lead in a circle
            inner.clear()
        seen.add(real)
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())
