"""Where a data set's tables come from: files and folders under the data folder, or, when allowed, the hub.

Everything is read through the `datasets` library, which is imported only when it is needed. `docs/data.md` has the
rules for each kind of source.
"""

import contextlib
import csv
import errno
import glob
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsim.core.fields import refuse
from fedsim.data import imagefolder, splits
from fedsim.data.config import EMBEDDED, KNOWN, DataConfig, KnownSet
from fedsim.data.table import Columns, Table, joined, separated


SUFFIXES = (".parquet", ".csv", ".tsv")
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
LONGEST = 2**31 - 1  # characters of a cell


def tables(
    config: DataConfig, data_dir: str | None, cache: str, alone: bool = False
) -> tuple[dict[str, Table], Columns]:
    """The source's tables under "train" and, unless it has one split only, "test"; and the columns in them.

    **Arguments:**

    - `alone`: the split to train on without any other.
    """
    known, path = KNOWN.get(config.name), path_of(config, data_dir)
    if path.exists():
        return joined(config, _read(_found(path, config, alone), config, cache))
    if config.hub and not (known and not known.hub_name):
        return joined(config, _fetched(config, alone))
    if known:
        unset = "" if data_dir else " (FEDSIM_DATA_DIR is not set)"
        remedy = f"no folder {path}{unset}; set FEDSIM_DATA_DIR to the folder that holds {config.name}/train.*, or"
    else:
        remedy = f"no file or folder {path.absolute()}, nor one of {', '.join((*EMBEDDED, *KNOWN))};"
        if data_dir and (there := Path(data_dir, config.name)).exists():
            remedy += f" {there} is there, but only these names are looked up in FEDSIM_DATA_DIR: give the path, or"
    if not known or known.hub_name:
        remedy += " allow the hub with --set task.data.hub=true"
    raise ValueError(f"task.data.name={config.name!r}: {remedy.removesuffix(', or')}")


def path_of(config: DataConfig, data_dir: str | None) -> Path:
    """Where a data set is looked for."""
    return Path(data_dir or "<FEDSIM_DATA_DIR>" if config.name in KNOWN else "", config.name).expanduser()


def _found(path: Path, config: DataConfig, alone: bool) -> dict[str, list[Path]]:
    """The files, or the one folder, of each split that lies at `path`."""
    if not path.is_dir():
        if not _is_table(path):
            accepted = f"a folder or a file that ends in one of {', '.join(SUFFIXES)}"
            refuse("task.data.name", config.name, f"{accepted}; fedsim.data.from_frame takes a frame of what you read")
        return {"train": [path]}

    entries = imagefolder.visible(path)
    lie: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.is_dir() or _is_table(entry):
            split = entry.name if entry.is_dir() else re.sub(r"-\d+-of-\d+$", "", entry.stem)
            lie.setdefault(split, []).append(entry)
    if (path / "state.json").exists() or (any(e.is_dir() for e in entries) and not splits.present([*lie], config)):
        return {"train": [path]}
    where = f"{path}, which holds {[entry.name for entry in entries][:20]}"
    if any(imagefolder.is_image(inner) for entry in entries if entry.is_dir() for inner in imagefolder.visible(entry)):
        where += f" ({splits.AS_CLASSES})"
    found = {name: _whole(lie[split], config) for name, split in splits.chosen([*lie], config, where, alone).items()}
    strays = [entry for entry in entries if imagefolder.is_image(entry)]
    if strays and any(part.is_dir() for parts in found.values() for part in parts):
        refuse("task.data.name", config.name, f"an image folder of SPLIT/CLASS/IMAGE; {strays[0]} lies in no split")
    everything = [part for parts in found.values() for part in parts]
    if len({part.resolve() for part in everything}) < len(everything):
        accepted = f"a source whose splits lie apart; links make one of {[str(part) for part in everything]}"
        refuse("task.data.name", config.name, accepted)
    return found


def _is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES


def _whole(paths: list[Path], config: DataConfig) -> list[Path]:
    """The files of one split, in order. **Raises:** `ValueError` if they are of several kinds, or one is missing."""
    names = [path.name for path in paths]
    shards = [re.fullmatch(r".*-(\d+)-of-(\d+)", path.stem) for path in paths]
    if len({(path.suffix, path.is_dir(), shard is None) for path, shard in zip(paths, shards, strict=True)}) > 1:
        refuse("task.data.name", config.name, f"a source with one file, or one set of files, a split, not {names}")
    numbered = sorted((int(shard[1]), int(shard[2]), path) for shard, path in zip(shards, paths, strict=True) if shard)
    if [pair[:2] for pair in numbered] != [(number, len(numbered)) for number in range(len(numbered))]:
        refuse("task.data.name", config.name, f"a source with all files of a split; there are {names}")
    return [path for *_, path in numbered] or paths


def _read(found: dict[str, list[Path]], config: DataConfig, cache: str) -> dict[str, list[tuple[str, Any]]]:
    from datasets.exceptions import DatasetsError
    from pandas.errors import EmptyDataError

    kinds = {_format(path) for paths in found.values() for path in paths}
    if len(kinds) > 1:
        refuse("task.data.name", config.name, f"a folder with splits in one format, not {sorted(kinds)}")
    kind = kinds.pop()

    def rows(path: Path) -> Any:
        try:
            return _rows(path, kind, config, cache)
        except (DatasetsError, ValueError, OSError, Warning) as error:
            if str(error).startswith("task.data."):
                raise
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno in FULL:  # the cache, not the source
                raise OSError(cause.errno, cause.strerror) from error
            said = textwrap.shorten(str(cause), 400, placeholder=" ...")
            if isinstance(cause, UnicodeDecodeError):
                said = f"it is not UTF-8: save it as UTF-8; {said}"
            elif isinstance(cause, EmptyDataError):
                said = "it is empty"
            raise ValueError(f"task.data.name={config.name!r}: {path} could not be read as {kind} ({said})") from error

    with offline():
        return {split: [(str(path), rows(path)) for path in paths] for split, paths in found.items()}


def _format(path: Path) -> str:
    if path.is_dir():
        return "saved" if (path / "state.json").exists() else "imagefolder"
    return path.suffix[1:].lower()


def _rows(path: Path, kind: str, config: DataConfig, cache: str) -> Any:
    """What lies in one file, or in the folder of one split, as a `datasets.Dataset`."""
    import datasets
    import pyarrow.parquet as pq

    if kind == "saved":
        return datasets.load_from_disk(str(path))
    if kind == "imagefolder":
        return imagefolder.rows(path, config)
    if kind == "parquet" and pq.read_metadata(path).num_rows == 0:
        refuse("task.data.name", config.name, f"a source with examples; {path} holds none")
    settings = {} if kind == "parquet" else _csv_settings(path, kind, config)
    builder, file = "csv" if kind == "tsv" else kind, glob.escape(str(path.absolute()))
    read: Any = datasets.load_dataset(builder, data_files=file, cache_dir=cache, split="train", **settings)
    return read


def _csv_settings(path: Path, kind: str, config: DataConfig) -> dict[str, Any]:
    """Every cell is read as the text it is: guessing types would turn "007" or "null" into something else.

    A tsv has no quoting (a quotation mark is text), a csv has. Of a single column, an empty line is the empty text.
    """
    import datasets
    import pandas as pd

    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"sep": ","}
    plain = {**dialect, "na_filter": False, "encoding": "utf-8-sig", "index_col": False}
    first = pd.read_csv(path, nrows=1, dtype=str, header=None, **plain).iloc[0]
    names = [str(name) if config.header else str(number) for number, name in enumerate(first)]
    known = KNOWN.get(config.name)
    if known and not config.header and len(known.columns) == len(names):
        names = list(known.columns)
    if len({*names}) < len(names):
        refuse("task.data.name", config.name, f"a source whose columns have names of their own; {path} has {names}")
    if config.header:
        _check_header(names, path, config)
    plain["skip_blank_lines"] = len(names) > 1
    _check_rows(path, dialect, names, config)
    features = datasets.Features({name: datasets.Value("string") for name in names})
    # Without index_col=False, lines longer than the first would lose their first cell to an index unnoticed.
    return {**plain, "header": 0 if config.header else None, "column_names": names, "features": features}


def _check_rows(path: Path, dialect: dict[str, Any], names: list[str], config: DataConfig) -> None:
    """Refuse a row with fewer or more cells than there are columns: pandas reads the empty text for what is missing.

    And quotation marks that end no cell, which it reads in some way or other.
    """
    settings = {"delimiter": dialect["sep"], "quoting": dialect.get("quoting", csv.QUOTE_MINIMAL), "strict": True}
    csv.field_size_limit(LONGEST)
    number = -1 if config.header else 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, **settings)
        try:
            for row in reader:
                if not row and len(names) > 1:
                    continue
                if len(row) != len(names) and (row or number < 0):
                    comma = "; a comma at its end begins one more, empty, cell" if row[-1:] == [""] else ""
                    where = f"row {number}" if number >= 0 else "its first line"
                    accepted = f"a source of rows with {len(names)} cells; {path}, {where} has {len(row)}{comma}"
                    refuse("task.data.name", config.name, f"{accepted}{separated(names)}")
                number += 1
        except csv.Error as error:
            quoting = 'a quotation mark inside of quotation marks is written twice, ""'
            accepted = f"a csv that can be read; {path}, row {number} (line {reader.line_num}): {error}; {quoting}"
            refuse("task.data.name", config.name, accepted)
    if number == 0 and config.header:
        refuse("task.data.name", config.name, f"a source with examples; {path} holds none but its header line")


def _check_header(names: list[str], path: Path, config: DataConfig) -> None:
    """Refuse a first line that reads like an example where columns are not asked for by its names."""
    label = config.label
    if isinstance(label, int) and label < len(names) and re.fullmatch(r"\s*[+-]?\d+\s*", names[label]):
        accepted = f"false, as the first line of {path} gives the label's column the name {names[label]!r}"
        refuse("task.data.header", True, accepted)


def _fetched(config: DataConfig, alone: bool) -> dict[str, list[tuple[str, Any]]]:
    import datasets
    from datasets.exceptions import DatasetsError

    known = KNOWN.get(config.name, KnownSet(config.name, config.kind))
    try:
        found: Any = datasets.load_dataset(known.hub_name, config.config_name)
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"task.data.name={config.name!r}: no hub set {known.hub_name!r} was read ({error})") from error
    if config.test_split == "test":
        config = replace(config, test_split=known.hub_test_split)
    picked = splits.chosen([*found], config, f"the hub's {known.hub_name}, which has {sorted(found)}", alone)
    return {name: [(f"{known.hub_name}/{split}", found[split])] for name, split in picked.items()}


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep `datasets` from counting a local read as a download over the network, and from drawing and printing."""
    import datasets
    from datasets import config as settings
    from pandas.errors import ParserWarning

    counts, bars = settings.HF_UPDATE_DOWNLOAD_COUNTS, not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what cannot be read is said by whoever refuses it
    settings.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # pandas so announces cells that it drops
            yield
    finally:
        settings.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
