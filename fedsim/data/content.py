"""What files hold, by hash: of data sets, tokenizers and checkpoints that a run reads."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path


Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(*paths: Path) -> Stamp:
    """Name, size, time and inode of every file: what is remembered of files is forgotten when these change."""
    found = [(str(file), file.stat()) for path in paths for file in _files(path)]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


def sha256s(path: Path) -> dict[str, str]:
    """Hash of content by path: of a file; of a folder's files, and of each folder in it as a whole."""
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    return {str(entry): sha256_of(entry) for entry in entries if not entry.name.startswith(".")}


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, or of the names and bytes of a folder's files. Remembered as long as they stay."""
    return _sha256_of(path, stamp(path))


@functools.lru_cache(maxsize=256)
def _sha256_of(path: Path, stamp: Stamp) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(path)}\0{digest}\n".encode())
    return whole.hexdigest()


def _files(path: Path) -> Iterable[Path]:
    """A file itself; of a folder all files in it, at any depth, but hidden ones."""
    if not path.is_dir():
        return [path]
    inside = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
