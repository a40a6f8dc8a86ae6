"""Where a data set's tables come from: files and folders under the data folder, or, when allowed, the hub.

Everything is read through the `datasets` library, which is imported only when it is needed.
"""

import contextlib
import csv
import glob
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedsim.core.fields import refuse
from fedsim.data.config import EMBEDDED, KNOWN, DataConfig, KnownSet


SUFFIXES = (".parquet", ".csv", ".tsv")


def tables(config: DataConfig, data_dir: str | None, cache: str) -> dict[str, Any]:
    """The source's `datasets.Dataset`s under "train" and, unless it has one split only, "test"."""
    known, path = KNOWN.get(config.name), path_of(config, data_dir)
    if path.exists():
        return _read(_found(path, config), config, cache)
    if config.hub:
        return _fetched(config)
    if known:
        unset = "" if data_dir else " (FEDSIM_DATA_DIR is not set)"
        remedy = f"no folder {path}{unset}; set FEDSIM_DATA_DIR to the folder that holds {config.name}/train.*, or"
    else:
        remedy = f"no file or folder {path.absolute()}, nor one of {', '.join((*EMBEDDED, *KNOWN))};"
    raise ValueError(f"task.data.name={config.name!r}: {remedy} allow the hub with --set task.data.hub=true")


def path_of(config: DataConfig, data_dir: str | None) -> Path:
    """Where a data set is looked for."""
    return Path(data_dir or "<FEDSIM_DATA_DIR>" if config.name in KNOWN else "", config.name).expanduser()


def _found(path: Path, config: DataConfig) -> dict[str, list[Path]]:
    """The files, or the one folder, of each split that lies at `path`."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            refuse("task.data.name", config.name, f"a folder or a file that ends in one of {', '.join(SUFFIXES)}")
        return {"train": [path]}

    def of_split(split: str) -> list[Path]:
        if (path / split).is_dir():
            return [path / split]
        pattern = re.compile(re.escape(split) + r"(-\d+-of-\d+)?")
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and pattern.fullmatch(p.stem))
        if len({p.suffix for p in files}) > 1:
            refuse(
                "task.data.name", config.name, f"the path of one file; split {split!r} is in {[p.name for p in files]}"
            )
        return files

    entries = list(path.iterdir())
    splits = any(of_split(split) for split in (config.train_split, config.test_split))
    if not splits and ((path / "state.json").exists() or any(entry.is_dir() for entry in entries)):
        return {"train": [path]}
    return _chosen(of_split, config.test_split, config, f"{path}, which holds {sorted(e.name for e in entries)[:20]}")


def _chosen(split: Callable[[str], Any], test: str, config: DataConfig, where: str) -> dict[str, Any]:
    """Pick the configured splits; the default test split may be absent, one that was asked for may not."""
    chosen = {"train": split(config.train_split), "test": split(test)}
    if not chosen["test"] and test == "test":
        chosen["test"] = split("validation")
    if not chosen["train"]:
        refuse("task.data.train_split", config.train_split, f"a split of {where}")
    if not chosen["test"] and config.test_split != "test":
        refuse("task.data.test_split", config.test_split, f"a split of {where}")
    return {name: found for name, found in chosen.items() if found}


def _read(found: dict[str, list[Path]], config: DataConfig, cache: str) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    kinds = {_format(path) for paths in found.values() for path in paths}
    if len(kinds) > 1:
        refuse("task.data.name", config.name, f"a folder with splits in one format, not {sorted(kinds)}")
    kind = kinds.pop()
    # One call reads all splits, so that the classes of image folders are numbered alike in each.
    inside = "/**" if kind == "imagefolder" else ""
    files = {split: [glob.escape(str(p.absolute())) + inside for p in paths] for split, paths in found.items()}
    try:
        with _offline():
            if kind == "saved":
                return {split: datasets.load_from_disk(str(paths[0])) for split, paths in found.items()}
            settings: dict[str, Any] = {"drop_labels": False} if kind == "imagefolder" else {}
            if kind in ("csv", "tsv"):
                settings = _csv_settings(found["train"][0], kind, config)
            builder = "csv" if kind == "tsv" else kind
            return dict(datasets.load_dataset(builder, data_files=files, cache_dir=cache, **settings))
    except (DatasetsError, ValueError, OSError, Warning) as error:
        cause = error.__cause__ or error
        raise ValueError(f"task.data.name={config.name!r}: could not be read as {kind} ({cause})") from error


def _format(path: Path) -> str:
    if path.is_dir():
        return "saved" if (path / "state.json").exists() else "imagefolder"
    return path.suffix[1:]


def _csv_settings(path: Path, kind: str, config: DataConfig) -> dict[str, Any]:
    """Every cell is read as the text it is: guessing types would turn "007" or "null" into something else.

    A tsv has no quoting (a quotation mark is text), a csv has.
    """
    import datasets
    import pandas as pd

    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"sep": ","}
    plain = {**dialect, "header": 0 if config.header else None, "na_filter": False, "encoding": "utf-8-sig"}
    names = [str(name) for name in pd.read_csv(path, nrows=1, dtype=str, index_col=False, **plain).columns]
    known = KNOWN.get(config.name)
    if known and not config.header and len(known.columns) == len(names):
        names = list(known.columns)
    features = datasets.Features({name: datasets.Value("string") for name in names})
    # Without index_col=False, lines longer than the first would lose their first cell to an index unnoticed.
    return {**plain, "column_names": names, "features": features, "index_col": False}


def _fetched(config: DataConfig) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    known = KNOWN.get(config.name, KnownSet(config.name, config.kind))
    try:
        splits: Any = datasets.load_dataset(known.hub_name, config.config_name)
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"task.data.name={config.name!r}: no hub set {known.hub_name!r} was read ({error})") from error
    test = known.hub_test_split if config.test_split == "test" else config.test_split
    return _chosen(splits.get, test, config, f"the hub's {known.hub_name}, which has {sorted(splits)}")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from counting a local read as a download over the network, and from drawing progress bars."""
    import datasets
    from datasets import config as settings
    from pandas.errors import ParserWarning

    counts, bars = settings.HF_UPDATE_DOWNLOAD_COUNTS, not datasets.are_progress_bars_disabled()
    settings.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # pandas so announces cells that it drops
            yield
    finally:
        settings.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()
