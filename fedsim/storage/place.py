"""Where results and checkpoints lie: a folder, or a prefix in an object store (`s3://bucket/prefix`, `gs://...`).

A `Place` is a `pathlib.Path`, or a `Remote` that answers to the few methods of it that are used here. In an object
store a file is there as a whole or not at all, and who reads after a write sees it; folders are but parts of names.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from fedsim.core import environment
from fedsim.core.fields import path_of, shown


SCHEMES = ("s3", "gs")
AT_ONCE = 16  # requests to an object store, where many files are read or written
CONNECT_SECONDS, REQUEST_SECONDS = 10.0, 60.0
MISSING = pafs.FileType.NotFound


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
    """A file or a folder in an object store.

    - `url`: ends without a slash. - `holder`: of a results folder that this process holds (`fedsim.storage.locking`).
    """

    url: str
    holder: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "Remote":
        return Remote(self.url.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> "Remote":
        return self.parent / (self.stem + suffix)

    def absolute(self) -> "Remote":
        return self

    def resolve(self) -> "Remote":
        return self

    @property
    def path(self) -> str:
        """As the file system wants it: `bucket/prefix/name`."""
        return self.url.partition("://")[2]

    @property
    def system(self) -> Any:
        scheme, _, rest = self.url.partition("://")
        return _system(scheme, rest.partition("/")[0])

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders but in the names of files."""

    def exists(self) -> bool:
        return self.system.get_file_info(self.path).type != MISSING

    def is_dir(self) -> bool:
        return self.system.get_file_info(self.path).type == pafs.FileType.Directory

    def read_bytes(self) -> bytes:
        with self.system.open_input_file(self.path) as file:
            return file.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        with self.system.open_output_stream(self.path) as file:
            file.write(data)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.system.delete_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def files(self, deep: bool = True) -> list[tuple["Remote", int]]:
        """The files in a folder, also of folders inside if `deep`, with their sizes in bytes."""
        return [(self / name, size) for name, kind, size in self._inside(deep) if kind == pafs.FileType.File]

    def glob(self, pattern: str) -> list["Remote"]:
        """What matches a pattern; `*` stays within one name."""
        wanted = pattern.split("/")
        names = [name for name, _, _ in self._inside(len(wanted) > 1)]
        return [
            self / name
            for name in sorted(names)
            if len(parts := name.split("/")) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
        ]

    def _inside(self, deep: bool) -> list[tuple[str, Any, int]]:
        found = self.system.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=deep))
        return [(info.path.removeprefix(f"{self.path}/"), info.type, info.size or 0) for info in found]


Place = Path | Remote


def place(text: "str | os.PathLike[str] | Remote", named: str = "--out") -> Place:
    """A results folder as it was typed: a path, or the URL of an object store.

    - `named`: the option by which it was named.

    **Raises:** `ValueError` for a URL that cannot be one of a results folder.
    """
    if isinstance(text, Remote):
        return text
    text = os.fspath(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return path_of(text, named)
    bucket = rest.partition("/")[0]
    if any(mark in rest for mark in "@?#"):  # it would be written into the tables, and into logs
        raise ValueError(
            f"{named}: '{scheme}://...': must be {scheme}://BUCKET/PREFIX and no more: credentials, region and "
            "endpoint come from the machine's role, its configuration files, or environment variables"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"{named}={shown(text)}: must be a path, or begin with one of s3://, gs://")
    if not bucket or "//" in rest.rstrip("/"):
        raise ValueError(f"{named}={shown(text)}: must be {scheme}://BUCKET/PREFIX")
    return Remote(f"{scheme}://{rest.rstrip('/')}")


def write_atomically(target: Place, data: bytes | pa.Buffer) -> None:
    """Replace a file as a whole; a failure leaves the old one.

    Locally: a temporary file beside it, synced, renamed. Its name is fixed, so that what a killed process left is
    overwritten by the next attempt. **Raises:** `OSError` naming the file.
    """
    if isinstance(target, Remote):
        try:
            target.write_bytes(bytes(data))
        except OSError as error:
            raise OSError(error.errno, f"could not write {target}: {error.strerror or error}") from error
        return
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"could not write {target}: {error.strerror}") from error


def delete(folder: Place) -> None:
    """Delete a folder and what is in it; nothing if it is not there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        folder.system.delete_dir(folder.path)


def move(source: Place, target: Place) -> None:
    """Give a file or a folder another path beside it; nothing if it is not there."""
    if isinstance(source, Path):
        if source.exists():
            Path(str(target)).parent.mkdir(parents=True, exist_ok=True)
            source.rename(str(target))
        return
    inside = [file for file, _ in source.files()] or ([source] if source.exists() else [])
    for file in inside:
        file.system.move(file.path, f"{place(target)}{file.url.removeprefix(source.url)}".partition("://")[2])


def size_of(folder: Place) -> int:
    """Bytes of a file, or of all files in a folder."""
    if isinstance(folder, Remote):
        return sum(size for _, size in folder.files())
    files = (file for file in (folder, *folder.rglob("*")) if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


@contextlib.contextmanager
def fetched(source: Place) -> Iterator[Path]:
    """A file or a folder on this machine's disk, for as long as the context: what needs a path can read it there.

    **Raises:** `FileNotFoundError` if it is not there.
    """
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, source.name)
        if source.is_dir():
            download(source, here)
        else:
            here.write_bytes(source.read_bytes())
        yield here


@contextlib.contextmanager
def sent(folder: Place) -> Iterator[Path]:
    """A folder on this machine's disk to write into; what is in it when the context ends without an error is sent."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        files = [path for path in sorted(Path(here).rglob("*")) if path.is_file()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda f: write_atomically(folder / str(f.relative_to(here)), f.read_bytes()), files))


def download(folder: Remote, to: Path, leave_out: tuple[str, ...] = ()) -> int:
    """Copy what is in a folder of an object store into one of this machine. **Returns:** the number of files.

    - `leave_out`: how the names of files begin that are not copied.

    **Raises:** `ValueError`, before anything is copied, for an object whose name leads out of the folder.
    """

    def one(name: str) -> None:
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, (folder / name).read_bytes())

    names = [file.url.removeprefix(f"{folder.url}/") for file, _ in folder.files()]
    for name in names:
        if {*name.split("/")} & {"", ".", ".."} or "\\" in name or "\0" in name:
            raise ValueError(f"{folder}: an object is called {name!r}, which names no file inside a folder")
    names = [name for name in names if not name.startswith(leave_out)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, names))
    return len(names)


@functools.cache
def _system(scheme: str, bucket: str) -> Any:
    """A bucket's file system: pyarrow's, with bounded waits. Credentials are found by the store's own rules."""
    if scheme == "gs":
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_SECONDS))
    endpoint, region = environment.s3_endpoint(), environment.aws_region()
    if region is None and endpoint is None:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        allow_delayed_open=True,  # one request for a small file, not three
    )
