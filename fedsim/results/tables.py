"""Results on disk: three Parquet tables, one file a run and table, and the frames they are read back into.

    DIR/runs/<run_id>.parquet      one row: a run that finished or failed
    DIR/rounds/<run_id>.parquet    one row a round, round 0 included
    DIR/clients/<run_id>.parquet   one row a participant and round

A file is replaced as a whole and atomically, never appended to: whoever reads a folder while a run is writing into it
sees every finished round and nothing half-written. Temporary files start with a dot, which every reader of Parquet
folders (pandas, pyarrow, duckdb's `*.parquet`) leaves out.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.core.sealed import UNSEALED, Damaged, check_sealed, sealed
from fedsim.results import manifest as manifests
from fedsim.results.columns import DEPLOYED, SCHEMA_KEY, SCHEMA_VERSION, SCHEMAS, TABLES
from fedsim.storage.place import AT_ONCE, Place, Remote, place, write_atomically


if TYPE_CHECKING:  # importing it takes long, and hosts make no frames
    import pandas as pd


VOUCHED = ("rounds", "clients")  # tables whose rows a run's manifest vouches for
SEAL_KEY = b"fedsim_seal"


@dataclass(frozen=True, eq=False)
class Results:
    """The tables of a folder, or of several. A table without rows still has its columns.

    `clients` is by far the largest; it is read when it is first asked for.
    """

    directories: tuple[Place, ...]
    runs: "pd.DataFrame"
    rounds: "pd.DataFrame"

    @functools.cached_property
    def clients(self) -> "pd.DataFrame":
        """One row a participant and round."""
        return _joined("clients", self.directories)

    @functools.cached_property
    def profile(self) -> "pd.DataFrame":
        """One row a place and round: where its time went. Empty unless a run was asked for it."""
        return _joined("profile", self.directories)

    @functools.cached_property
    def attacks(self) -> "pd.DataFrame":
        """One row a value that an attack measured. Empty unless the folder was audited."""
        return _joined("attacks", self.directories)

    @functools.cached_property
    def roc(self) -> "pd.DataFrame":
        """The curves of attacks on membership, one row a point."""
        return _joined("roc", self.directories)

    @functools.cached_property
    def deployed(self) -> "pd.DataFrame":
        """One row a run and participant: `DEPLOYED`, of the last round in which it was scored. Reads no more."""
        return self._last_rows[0]

    @functools.cached_property
    def small_models(self) -> "pd.DataFrame":
        """One row a run and participant that trained a small model of its own: `run_id`, `client`, `small_sha256`."""
        return self._last_rows[1]

    @functools.cached_property
    def _last_rows(self) -> "tuple[pd.DataFrame, pd.DataFrame]":
        import pandas as pd

        parts = [_last_rows(directory) for directory in self.directories]
        deployed, small = zip(*parts, strict=True)
        return pd.concat(deployed, ignore_index=True), pd.concat(small, ignore_index=True)


def write_table(directory: Place, table: str, run_id: str, rows: Sequence[Mapping[str, Any]]) -> Place:
    """Replace one run's part of a table by `rows`, atomically.

    **Arguments:**

    - `directory`: the results folder; made if it is not there.
    - `table`: `runs`, `rounds` or `clients`.
    - `run_id`: names the file, and must be what every row carries.
    - `rows`: all of the run's rows so far, each with exactly the table's columns; only nullable ones may be `None`.

    **Returns:** the file's path. Raises `OSError` naming it when it cannot be written; what lay there before stays.
    """
    replace_table(directory, table, run_id, arrow_of(table, run_id, rows))
    return place(directory) / table / f"{run_id}.parquet"


def replace_table(directory: Place, table: str, run_id: str, content: pa.Table) -> str:
    """`write_table` of rows that `arrow_of` has made. **Returns:** the file's seal."""
    path = place(directory) / table / f"{run_id}.parquet"
    assert run_id and Path(run_id).name == run_id and run_id[0] not in "._", f"run_id {run_id!r} cannot name a file"
    # Serialised in memory, so that a disk that fills up fails in one plain write.
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, content.schema, write_page_checksum=True) as file:
        file.write_table(content)
        file.add_key_value_metadata({SEAL_KEY: UNSEALED})
    data, seal = sealed(buffer.getvalue())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise OSError(error.errno, f"results not written: {error.strerror or error}", str(path)) from error
    if isinstance(path, Path):
        _sync_folder(path.parent)
    return seal


def arrow_of(table: str, run_id: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of one run as a table of the right schema, checked as `write_table` says."""
    names = set(TABLES[table].names)
    for row in rows:
        if row.keys() != names:
            _check_names(table, set(row))
    return arrow_of_columns(table, run_id, {name: [row[name] for row in rows] for name in names})


def arrow_of_columns(table: str, run_id: str, columns: Mapping[str, Sequence]) -> pa.Table:
    """The same from columns."""
    schema = TABLES[table]
    _check_names(table, set(columns))
    others = {run for run in columns["run_id"] if run != run_id}
    assert not others, f"{table}: a row of run {min(others)!r} in the file of run {run_id!r}"
    arrays = []
    for field in schema:
        values = columns[field.name]
        assert field.nullable or None not in values, f"{table}: column {field.name!r} must not be null"
        if field.type == pa.int64():  # pyarrow would cut 1.5 down to 1 without a word
            odd = {kind for kind in set(map(type, values)) if not issubclass(kind, Integral | type(None))}
            first = next((value for value in values if type(value) in odd), None) if odd else None
            assert not odd, f"{table}: column {field.name!r} must hold int64, got {first!r}"
        try:
            arrays.append(pa.array(values, field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise AssertionError(f"{table}: column {field.name!r} must hold {field.type}: {error}") from error
    return pa.Table.from_arrays(arrays, schema=schema)


def _check_names(table: str, found: set[str]) -> None:
    names = set(TABLES[table].names)
    assert not names - found, f"{table}: a row lacks the columns {sorted(names - found)}"
    assert not found - names, f"{table}: a row has the unknown columns {sorted(found - names)}"


def arrow_of_run(directory: Place, table: str, run_id: str, last: int) -> pa.Table:
    """One run's rows of a table up to round `last`, as they lie on disk; empty if it has none yet."""
    part = _read(place(directory), table, run_id)
    return part.filter(pa.array(part["round"].to_numpy() <= last))


def read_table(directory: Place, table: str) -> "pd.DataFrame":
    """All rows of one table, ordered by run id. Empty if only the other tables have rows yet.

    Raises `ValueError` for a folder without any results, a file that cannot be read, or one of a newer schema.
    """
    folder = place(directory)
    _check_has_results(folder)
    parts = _each(_run_ids(folder, table), folder, lambda run_id: _read(folder, table, run_id))
    return pa.concat_tables([TABLES[table].empty_table(), *parts]).to_pandas()


def read_run(directory: Place, table: str, run_id: str) -> "pd.DataFrame":
    """One run's rows of one table; empty if it has none yet."""
    return _read(place(directory), table, run_id).to_pandas()


def rows_of(frame: "pd.DataFrame", table: str) -> list[dict[str, Any]]:
    """A frame of a table as rows that `write_table` takes back: nulls as None, whole numbers as int."""
    import pandas as pd

    whole = {field.name for field in SCHEMAS[table] if field.type == pa.int64()}
    columns = {
        name: [None if pd.isna(value) else int(value) if name in whole else value for value in frame[name]]
        for name in SCHEMAS[table].names
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def load(*directories: Place | str) -> Results:
    """The results of folders that `fedsim run` or `fedsim sweep` wrote into.

    **Raises:** `ValueError` for a folder without results, a file that cannot be read, or a run that two folders hold.
    """
    if not directories:
        raise ValueError("directories=(): must be at least one results folder")
    folders = tuple(place(directory) for directory in directories)
    runs, rounds = (_joined(table, folders) for table in ("runs", "rounds"))
    if twice := sorted(set(runs.run_id[runs.run_id.duplicated()]) | set(rounds.run_id[_repeated(rounds)])):
        raise ValueError(f"run {twice[0]} is in more than one of {', '.join(map(str, folders))}")
    return Results(folders, runs, rounds)


def _repeated(rounds: "pd.DataFrame") -> "pd.Series":
    """Which rows are of a run and a round that another row is of, too."""
    return rounds.duplicated(["run_id", "round"])


def _joined(table: str, directories: Sequence[Place]) -> "pd.DataFrame":
    import pandas as pd

    parts = [read_table(directory, table) for directory in directories]
    return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def _last_rows(directory: Place) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """`deployed` and `small_models` in one pass over the files of `clients`, a few columns of each."""
    hashed = ("run_id", "client", "small_sha256")
    scored, trained = (
        [pa.schema([TABLES["clients"].field(name) for name in names]).empty_table()] for names in (DEPLOYED, hashed)
    )
    columns = tuple(dict.fromkeys((*DEPLOYED, *hashed)))
    run_ids = _run_ids(directory, "clients")
    for part in _each(run_ids, directory, lambda run_id: _read(directory, "clients", run_id, columns)):
        trained.append(part.select(hashed).filter(part["small_sha256"].is_valid()))
        part = part.select(DEPLOYED).filter(part["accuracy"].is_valid())
        if part.num_rows:
            rounds = part["round"].to_numpy()
            scored.append(part.filter(pa.array(rounds == rounds.max())))
    return pa.concat_tables(scored).to_pandas(), pa.concat_tables(trained).to_pandas()


def _each(run_ids: Sequence[str], directory: Place, read: Callable[[str], pa.Table]) -> Iterable[pa.Table]:
    """What is read of each run, in order; from an object store, where one waits for every answer, many at once."""
    if isinstance(directory, Remote):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(read, run_ids))
    return map(read, run_ids)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Not every file system (or system) can: then the write itself still counts."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(directory: Place, table: str) -> Sequence[Place]:
    return sorted(path for path in (directory / table).glob("*.parquet") if path.name[0] not in "._")


def _run_ids(directory: Place, table: str) -> list[str]:
    """The runs that have a part of a table, or whose manifest may say that there must be one."""
    looked_in = SCHEMAS if table in VOUCHED else (table,)
    return sorted({path.stem for each in looked_in for path in _files(directory, each)})


def _check_has_results(directory: Place) -> None:
    if not any(_files(directory, table) for table in SCHEMAS):
        what = "is not a folder" if not directory.is_dir() else "holds no results"
        looked_for = ", ".join(f"{table}/*.parquet" for table in SCHEMAS)
        raise ValueError(f"{directory} {what}: looked for {looked_for} in it")


def _read(directory: Place, table: str, run_id: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One run's part of a table, of all columns or of those named alone; without rows if it has none yet.

    Whoever writes a run replaces its tables, then its manifest: it is read first here, so that the table is as old or
    newer. What does not fit is looked at again as long as the manifest changes meanwhile.
    """
    manifest = manifests.read(directory, run_id) if table in VOUCHED else None
    while True:
        try:
            return _vouched(manifest, directory, table, run_id, columns)
        except Damaged as error:
            before, manifest = manifest, manifests.read(directory, run_id) if table in VOUCHED else None
            if manifest == before:
                raise manifests.damaged(str(error), directory, run_id) from error


def _vouched(
    manifest: manifests.Manifest | None, directory: Place, table: str, run_id: str, columns: Sequence[str] | None
) -> pa.Table:
    """The same, held against a manifest. **Raises:** `Damaged` for what is missing, or not as it was written."""
    name = manifests.table_file(table, run_id)
    path, schema = directory / table / f"{run_id}.parquet", TABLES[table]
    known = manifest[manifests.FILES].get(name) if manifest and manifests.FILES in manifest else None
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if known is None:
            return schema.empty_table() if columns is None else schema.empty_table().select(columns)
        raise Damaged(f"{path} is missing, with all that run {run_id} wrote into it") from error
    part, seal = _read_file(path, data, schema, columns)
    if manifest is not None and known not in (None, seal):
        newest = part["round"].to_numpy().max() if part.num_rows else -1
        if newest <= manifest["round"]:  # else it holds a round that is under way
            raise Damaged(f"{path} is not the file that the run's manifest vouches for")
    return part


def _read_file(
    path: Place, data: bytes, schema: pa.Schema, columns: Sequence[str] | None
) -> tuple[pa.Table, str | None]:
    """A file's rows, and its seal."""
    try:
        seal = check_sealed(data)
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            _check_version(path, metadata.get(SCHEMA_KEY))
            known = set(file.schema_arrow.names)
            # One file is small: threads cost more than they save.
            part = file.read(
                None if columns is None else [name for name in columns if name in known], use_threads=False
            )
    except (Damaged, pa.ArrowException, OSError) as error:
        raise Damaged(f"{path} is not a readable Parquet file (cut off or damaged): {error}") from error
    kept = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return _conform(path, part, kept), seal


def _conform(path: Place, part: pa.Table, schema: pa.Schema) -> pa.Table:
    """Bring a file of this or an older schema to the columns of this one; what it did not know yet is null."""
    found = dict(zip(part.column_names, part.columns, strict=True))
    columns = []
    for field in schema:
        column = found.get(field.name)
        if column is None and not field.nullable:
            raise ValueError(f"{path} has no column {field.name!r}, which fedsim schema {SCHEMA_VERSION} requires")
        if column is not None and column.type != field.type:
            raise ValueError(f"{path} has {column.type} in column {field.name!r}, fedsim wants {field.type}")
        columns.append(pa.nulls(part.num_rows, field.type) if column is None else column)
    return pa.Table.from_arrays(columns, schema=schema)


def _check_version(path: Place, found: bytes | None) -> None:
    if found is None or not found.isdigit():
        raise ValueError(f"{path} was not written by fedsim: its metadata has {SCHEMA_KEY.decode()} = {found!r}")
    if int(found) > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has fedsim schema {int(found)}, this fedsim reads up to {SCHEMA_VERSION}: read it with a newer one"
        )
