"""Examples in files: brought there once a machine, and read row by row by every process.

    FEDSIM_CACHE_DIR/prepared/FINGERPRINT/         about.json, and files of arrays
    FEDSIM_CACHE_DIR/sources/SETTINGS-STAMP.json   what some settings made of some files: a fingerprint

A folder is called by the hash of its `about.json`, which holds the hashes of all arrays: by its content. Short arrays
are held against their hash when it is opened; long ones have a checksum a row, which is held against what is read. Rows
are read and not mapped: a process that has read all of them is no larger than one that has read none.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from fedsim.core import environment
from fedsim.core.fields import refuse
from fedsim.core.sealed import Damaged, read_sealed_json, sealed_json
from fedsim.data.content import stamp as stamp_of
from fedsim.data.examples import INPUTS, Column, Examples, Look


T = TypeVar("T")
ABOUT, PUBLISHING = "about.json", "publishing.lock"
CHECKS, LENGTHS = "checks", "lengths"  # beside an array of rows: a checksum a row, and where they differ its length


class Writer:
    """Writes arrays into a folder of its own.

    - `beside`: files that were read though they lie outside of what the stamp is of.
    - `made`: what was made of what, for people.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, dict[str, Any]] = {}
        self.beside: set[Path] = set()
        self.made = ""

    def whole(self, name: str, array: np.ndarray) -> None:
        """A short array, which whoever opens the folder holds in memory."""
        data = np.ascontiguousarray(array).tobytes()
        (self.folder / name).write_bytes(data)
        self.arrays[name] = {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def rows(self, name: str, rows: Iterable[np.ndarray], ragged: bool = False) -> None:
        """An array whose rows are read one by one: of one shape, or `ragged`, 1-D, of any length."""
        digest, checks, lengths, shape, dtype = hashlib.sha256(), list[int](), list[int](), None, ""
        with (self.folder / name).open("wb") as file:
            for row in rows:
                data = np.ascontiguousarray(row).tobytes()
                shape, dtype = shape or row.shape, str(row.dtype)
                assert ragged or row.shape == shape, f"rows of {name} differ: {shape}, {row.shape}"
                file.write(data)
                digest.update(data)
                checks.append(zlib.crc32(data))
                lengths.append(len(row))
        rest = None if ragged or shape is None else [len(lengths), *shape]
        self.arrays[name] = {"dtype": dtype, "shape": rest, "sha256": digest.hexdigest()}
        self.whole(f"{name}.{CHECKS}", np.array(checks, np.uint32))
        if ragged:
            self.whole(f"{name}.{LENGTHS}", np.array(lengths, np.int64))


class Folder:
    """A prepared folder, opened and held against its name.

    - `about`: what was said when it was made. - `whole`: its short arrays.
    - `made`: what was made of what, for people; different files, and settings, may have made the same.

    **Raises:** `Damaged` if it is not as it was written; `OSError` if it is not there.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path, self.fingerprint, self.made = _cache() / "prepared" / fingerprint, fingerprint, ""
        data = (self.path / ABOUT).read_bytes()
        if hashlib.sha256(data).hexdigest() != fingerprint:
            raise Damaged(f"{self.path / ABOUT}: not as it was written")
        content = json.loads(data)
        self.about: dict[str, Any] = content["about"]
        arrays = content["arrays"]
        self.whole = {name: self._whole(name, arrays[name]) for name in arrays if f"{name}.{CHECKS}" not in arrays}
        self.columns = {name: self._column(name, arrays[name]) for name in arrays if name not in self.whole}

    def _whole(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        data = (self.path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Damaged(f"{self.path / name}: not as it was written")
        return np.frombuffer(bytearray(data), entry["dtype"]).reshape(entry["shape"])

    def _column(self, name: str, entry: Mapping[str, Any]) -> Column:
        return Column(self.path / name, entry, self.whole[f"{name}.{CHECKS}"], self.whole.get(f"{name}.{LENGTHS}"))

    def examples(self, split: str, look: Look) -> Examples:
        """The inputs of a split."""
        columns = {name: self.columns[f"{split}.{name}"] for name in INPUTS if f"{split}.{name}" in self.columns}
        return Examples(columns, np.arange(len(self.whole[f"{split}.labels"])), look)


def opened(settings: str, fingerprint: str) -> Folder | None:
    """What these settings once made, of whatever files, if it is this; None if it is not here."""
    for entry in (_cache() / "sources").glob(f"{_key(settings)}-*.json"):
        if (found := _entry(entry, as_made=True)) is not None and found.fingerprint == fingerprint:
            return found
    return None


def prepared(
    settings: str, stamp: str, name: str, make: Callable[[Writer], dict[str, Any]], anew: bool = False
) -> Folder:
    """What these settings make of files with this stamp: made now, by `make`, unless it has been before.

    - `name`: for people. - `make`: writes, and returns what is said about it; it is called by one process at a time.
    - `anew`: make it in any case.

    **Raises:** `OSError` naming the folder, where nothing can be written.
    """
    cache, key = _cache(), f"{_key(settings)}-{_key(stamp)}"
    entry = cache / "sources" / f"{key}.json"
    if not anew and (found := _entry(entry)) is not None:
        return found
    try:
        for folder in ("prepared", "sources", "making"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / "making" / f"{key}.lock"):
            if not anew and (found := _entry(entry)) is not None:  # by the one that was waited for
                return found
            for left in (cache / "making").glob(f"{key}.*.d"):  # by one that was killed
                shutil.rmtree(left)
            making = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".d", dir=cache / "making"))
            try:
                writer = Writer(making)
                fingerprint = _made(writer, make)
                beside = {"paths": sorted(map(str, writer.beside)), "stamp": repr(stamp_of(*sorted(writer.beside)))}
                place = cache / "prepared" / fingerprint
                with filelock.FileLock(cache / "making" / PUBLISHING):
                    if _sound(fingerprint) is None:  # made by other settings, or from other files, it may be there
                        shutil.rmtree(place, ignore_errors=True)
                        making.rename(place)
                    found = Folder(fingerprint)  # what is open, `clean` does not take away
            finally:
                shutil.rmtree(making, ignore_errors=True)
            writing = entry.with_suffix(f".{os.getpid()}")
            said = {"name": name, "fingerprint": fingerprint, "beside": beside, "made": writer.made}
            writing.write_bytes(sealed_json(said))
            writing.replace(entry)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(cache)):  # the source's
            raise
        where, named = error.filename or cache, "FEDSIM_CACHE_DIR names the folder where data are prepared"
        why = f"cannot be written ({error.strerror or error}); {named}, and may name another"
        raise OSError(error.errno, f"{where}: {why}") from error
    found.made = writer.made
    return found


def _made(writer: Writer, make: Callable[[Writer], dict[str, Any]]) -> str:
    """Have a folder filled. **Returns:** its fingerprint."""
    about = json.dumps({"about": make(writer), "arrays": writer.arrays}, sort_keys=True).encode()
    (writer.folder / ABOUT).write_bytes(about)
    return hashlib.sha256(about).hexdigest()


def _entry(path: Path, as_made: bool = False) -> Folder | None:
    """What an entry of a source leads to; None if one of the two is not there, or not as it was written, or, unless it
    is wanted `as_made`, if files beside the source have changed."""
    try:
        entry = read_sealed_json(path.read_bytes(), "fingerprint")
        beside = entry["beside"]
        if not as_made and repr(stamp_of(*map(Path, beside["paths"]))) != beside["stamp"]:
            return None
    except (OSError, Damaged):
        return None
    if (found := _sound(entry["fingerprint"])) is not None:
        found.made = entry["made"]
    return found


def _sound(fingerprint: str) -> Folder | None:
    try:
        return Folder(fingerprint)
    except (OSError, Damaged):
        return None


@dataclass(frozen=True)
class Kept:
    """A prepared folder: what it was made from and how, examples a split, and bytes."""

    fingerprint: str
    names: tuple[str, ...]
    made: tuple[str, ...]
    examples: dict[str, int]
    nbytes: int


def kept() -> list[Kept]:
    """What is prepared. Without examples: what is not as it was written."""
    names: dict[str, set[tuple[str, str]]] = {}
    for path in (_cache() / "sources").glob("*.json"):
        with contextlib.suppress(OSError, Damaged):
            found = read_sealed_json(path.read_bytes(), "fingerprint")
            names.setdefault(found["fingerprint"], set()).add((found["name"], found["made"]))
    rows = []
    for folder in sorted((_cache() / "prepared").glob("*/")):
        size = sum(file.stat().st_size for file in folder.iterdir())
        whole = found.whole if (found := _sound(folder.name)) else {}
        examples = {split: len(whole[f"{split}.labels"]) for split in ("train", "test") if whole}
        said = sorted(names.get(folder.name, ()))
        named, made = (tuple(dict.fromkeys(texts)) for texts in ([name for name, _ in said], [how for _, how in said]))
        rows.append(Kept(folder.name, named, made, examples, size))
    return rows


def clean(fingerprints: Sequence[str] = ()) -> int:
    """Delete what is prepared: all of it and what killed processes left, or what begins so.

    What a process prepares meanwhile, and what it has open, stays until it is done with it.

    **Returns:** bytes that are free again.

    **Raises:** `ValueError` for a beginning that nothing has.
    """
    rows = kept()
    for begin in fingerprints:
        if not begin or not any(row.fingerprint.startswith(begin) for row in rows):
            refuse("FINGERPRINT", begin, "the begin of one that `fedsim data list` shows")
    chosen = [row for row in rows if not fingerprints or row.fingerprint.startswith(tuple(fingerprints))]
    if chosen:
        (making := _cache() / "making").mkdir(exist_ok=True)
        with filelock.FileLock(making / PUBLISHING):
            for row in chosen:
                shutil.rmtree(_cache() / "prepared" / row.fingerprint)
    freed = sum(row.nbytes for row in chosen)
    if not fingerprints:
        freed += left(free=True)
        for entry in (_cache() / "sources").glob("*.json"):
            entry.unlink(missing_ok=True)
    return freed


def left(free: bool = False) -> int:
    """Bytes that killed processes left unfinished: nobody holds their locks. - `free`: delete it."""
    size = 0
    for lock in (_cache() / "making").glob("*.lock"):
        with contextlib.suppress(filelock.Timeout if free else OSError), filelock.FileLock(lock, timeout=0):
            for folder in lock.parent.glob(f"{lock.stem}.*.d"):
                size += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                if free:
                    shutil.rmtree(folder)
            for entry in (_cache() / "sources").glob(f"{lock.stem}.*[0-9]") if free else ():
                entry.unlink()  # begun, and not put in its place
            if free and lock.name != PUBLISHING:
                lock.unlink()
    return size


def progress(rows: Iterable[T], total: int, text: str) -> Iterable[T]:
    """The same rows, and on a terminal a bar of how many have passed."""
    if not sys.stderr.isatty():
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, text, total, console=Console(stderr=True), transient=True)


def _cache() -> Path:
    return Path(environment.cache_dir())


def _key(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
