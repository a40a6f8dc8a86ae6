"""From the few settings that name a data set to the tensors of its training and test examples.

Shape legend: N examples, L tokens, C channels, H = W pixels. A name is one of the embedded sets, a known set looked up
under the data folder, or any local file or folder; nothing is fetched from the network unless `hub` is True.
"""

import contextlib
import csv
import glob
import hashlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedsim.data import embedded, text, vision
from fedsim.data.partition import train_validation
from fedsim.seeding import numpy_generator


@dataclass(frozen=True)
class KnownSet:
    """What a bare name stands for: its hub name, the columns of its headerless files, the hub split that has labels."""

    hub_name: str
    columns: tuple[str, ...] = ()
    hub_test_split: str = "test"


EMBEDDED = ("digits", "pydoc")
KNOWN = {
    "cifar10": KnownSet("uoft-cs/cifar10"),
    "cifar100": KnownSet("uoft-cs/cifar100"),
    "sst2": KnownSet("stanfordnlp/sst2", columns=("sentence", "label"), hub_test_split="validation"),
    "ag_news": KnownSet("fancyzhx/ag_news"),
}
USUAL_IMAGES = ("image", "img")
USUAL_TEXTS = ("text", "sentence")
USUAL_LABELS = ("label", "labels", "fine_label", "target")
SUFFIXES = (".parquet", ".csv", ".tsv")

# Which examples are held out or kept must not depend on an experiment's seed: all runs share one test set.
SUBSET_SEED = 0


@dataclass(frozen=True)
class DataConfig:
    """What data an experiment names.

    **Arguments:**

    - `name`: `digits` or `pydoc` (embedded); `cifar10`, `cifar100`, `sst2` or `ag_news` (looked up under the data
        folder); or the path of a file or folder (parquet, csv, tsv, an image folder, a saved `datasets` folder).
    - `hub`: whether a name that is not found locally, or a tokenizer, may be fetched from the hub.
    - `config_name`: the hub data set's configuration.
    - `train_split`, `test_split`: names of files, folders or hub splits; `validation` stands in for a missing `test`.
    - `test_share`: share held out when the source has one split only, and by the embedded sets.
    - `image`, `text`, `label`: columns by name or by position from 0. Text columns are joined with a space. Left out,
        usual names are tried.
    - `label_offset`: subtracted from labels; 1 for classes counted from 1.
    - `header`: whether the first line of a csv or tsv names the columns.
    - `limit`: keep at most this many training, and at most this many test examples; the same for every seed.
    - `image_size`, `channels`: what images are brought to.
    - `num_classes`: for language modelling, 1.
    - `tokenizer`: "bytes", a folder, or a hub name (with `hub`).
    - `max_length`: tokens an example.
    """

    name: str = "digits"
    hub: bool = False
    config_name: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_share: float = 0.2
    image: str | int | None = None
    text: tuple[str | int, ...] = ()
    label: str | int | None = None
    label_offset: int = 0
    header: bool = True
    limit: int | None = None
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    tokenizer: str = "bytes"
    max_length: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            accepted: Any = {"test_share": int | float, "text": tuple}.get(field.name, field.type)
            if not isinstance(value, accepted) or (isinstance(value, bool) and field.type is not bool):
                _refuse(field.name, value, f"of type {getattr(field.type, '__name__', field.type)}")
            if value == "":
                _refuse(field.name, value, "not empty")
        for name, columns in (("image", (self.image,)), ("text", self.text), ("label", (self.label,))):
            for column in columns:
                position = isinstance(column, int) and not isinstance(column, bool) and column >= 0
                if not (position or isinstance(column, str) or (column is None and name != "text")):
                    _refuse(name, getattr(self, name), "column names, or positions counted from 0")

        for name, least in (("limit", 1), ("image_size", 1), ("num_classes", 1), ("max_length", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                _refuse(name, value, f"at least {least}")
        if not 0 < self.test_share < 1:  # refuses NaN as well
            _refuse("test_share", self.test_share, "between 0 and 1, both excluded")
        if self.channels not in (1, 3):
            _refuse("channels", self.channels, "1 (grey) or 3 (RGB)")
        if self.train_split == self.test_split:
            _refuse("test_split", self.test_split, "another split than task.data.train_split")
        if self.image is not None and self.text:
            _refuse("text", self.text, f"empty when task.data.image is given ({self.image!r})")
        if self.name in EMBEDDED and (self.image is not None or self.text or self.label is not None):
            _refuse("name", self.name, "a file or folder when task.data.image, text or label name columns")
        if self.name == "pydoc" and self.tokenizer != "bytes":
            _refuse("tokenizer", self.tokenizer, "'bytes' for the embedded set 'pydoc'")

    @property
    def kind(self) -> str:
        """What a model gets to see: "image", "text" or "lm". Known without loading anything."""
        if self.name == "pydoc":
            return "lm"
        if self.name in ("sst2", "ag_news") or self.text:
            return "text"
        return "image"

    @property
    def vocab_size(self) -> int | None:
        """Size of the tokenizer's vocabulary; None for images. Reads the tokenizer, never data."""
        return None if self.kind == "image" else text.vocabulary(self.tokenizer, self.hub)


def digits(**changes: Any) -> DataConfig:
    """Embedded 8x8 grey images of 10 digits: what tests and first experiments use."""
    return DataConfig(**{"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10, **changes})


def pydoc(**changes: Any) -> DataConfig:
    """Embedded English text by bytes, for language modelling; its topics are natural groups."""
    return DataConfig(**{"name": "pydoc", "num_classes": 1, **changes})


def cifar10(**changes: Any) -> DataConfig:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32."""
    return DataConfig(**{"name": "cifar10", "image_size": 32, "channels": 3, "num_classes": 10, **changes})


def sst2(**changes: Any) -> DataConfig:
    """SST-2: sentences of film reviews, 2 classes; local files have no header line."""
    settings = {"name": "sst2", "header": False, "text": ("sentence",), "label": "label", "num_classes": 2}
    return DataConfig(**{**settings, **changes})


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of one split.

    **Arguments:**

    - `inputs`: `pixel_values` uint8 `(N, C, H, W)`, or `input_ids` and `attention_mask` int64 `(N, L)`.
    - `labels`: int64 `(N,)`; zeros for language modelling.
    - `groups`: int64 `(N,)`, or None where the source has no natural groups.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A loaded data set. It is shared by all who load it in a process: read its tensors, do not write to them.

    **Arguments:**

    - `kind`: "image", "text" or "lm".
    - `vocab_size`: None for images.
    - `fingerprint`: sha256 over all tensors, so that a run can record which data it saw.
    """

    kind: str
    train: Split
    test: Split
    num_classes: int
    vocab_size: int | None
    fingerprint: str


@lru_cache(maxsize=8)
def load(config: DataConfig, data_dir: str | None) -> Dataset:
    """Load a data set; a second call in the same process with equal arguments returns the same object.

    **Arguments:**

    - `data_dir`: the folder that holds one folder a known name, or None.
    """
    if config.name in EMBEDDED:
        kind, splits, vocab_size = _embedded(config)
    else:
        # The library's Arrow files live in a throw-away folder: nothing is left in the home folder.
        with tempfile.TemporaryDirectory(prefix="fedsim-data-") as cache:
            kind, splits, vocab_size = _converted(config, _tables(config, data_dir, cache))
    return Dataset(
        kind=kind,
        train=splits["train"],
        test=splits["test"],
        num_classes=1 if kind == "lm" else config.num_classes,
        vocab_size=vocab_size,
        fingerprint=_fingerprint(splits),
    )


def _embedded(config: DataConfig) -> tuple[str, dict[str, Split], int | None]:
    if config.name == "digits":
        images, labels, is_test = embedded.digits(config.test_share)
        labels = _checked_labels(labels.numpy(), config)
        pixel_values = vision.pixels(images.numpy(), config.image_size, config.channels)
        kind, everything, vocab_size = "image", Split({"pixel_values": pixel_values}, labels), None
    else:
        inputs, topics, is_test = embedded.pydoc(config.max_length, config.test_share)
        kind, everything, vocab_size = "lm", Split(inputs, torch.zeros_like(topics), topics), text.BYTE_VOCABULARY

    splits = {}
    for split, flags in (("train", ~is_test), ("test", is_test)):
        rows = torch.nonzero(flags).flatten()
        rows = rows[torch.from_numpy(_kept(len(rows), config.limit, split))]
        splits[split] = Split(
            {name: tensor[rows] for name, tensor in everything.inputs.items()},
            everything.labels[rows],
            None if everything.groups is None else everything.groups[rows],
        )
    return kind, splits, vocab_size


def _tables(config: DataConfig, data_dir: str | None, cache: str) -> dict[str, Any]:
    """The source's `datasets.Dataset`s under "train" and, unless it has one split only, "test"."""
    known = KNOWN.get(config.name)
    path = Path(data_dir or "<FEDSIM_DATA_DIR>" if known else "", config.name).expanduser()
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


def _found(path: Path, config: DataConfig) -> dict[str, list[Path]]:
    """The files, or the one folder, of each split that lies at `path`."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            _refuse("name", config.name, f"a folder or a file that ends in one of {', '.join(SUFFIXES)}")
        return {"train": [path]}

    def of_split(split: str) -> list[Path]:
        if (path / split).is_dir():
            return [path / split]
        pattern = re.compile(re.escape(split) + r"(-\d+-of-\d+)?")
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and pattern.fullmatch(p.stem))
        if len({p.suffix for p in files}) > 1:
            _refuse("name", config.name, f"the path of one file; split {split!r} is in {[p.name for p in files]}")
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
        _refuse("train_split", config.train_split, f"a split of {where}")
    if not chosen["test"] and config.test_split != "test":
        _refuse("test_split", config.test_split, f"a split of {where}")
    return {name: found for name, found in chosen.items() if found}


def _read(found: dict[str, list[Path]], config: DataConfig, cache: str) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    kinds = {_format(path) for paths in found.values() for path in paths}
    if len(kinds) > 1:
        _refuse("name", config.name, f"a folder with splits in one format, not {sorted(kinds)}")
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

    known = KNOWN.get(config.name, KnownSet(config.name))
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


def _converted(config: DataConfig, tables: dict[str, Any]) -> tuple[str, dict[str, Split], int | None]:
    if "test" not in tables:
        tables = _held_out(tables["train"], config)
    for split, table in tables.items():
        if len(table) == 0:
            _refuse("name", config.name, f"a source with examples; its {split} split holds none")
    names = tables["train"].column_names
    image, texts = config.image, config.text
    if image is None and not texts:
        image = next((name for name in USUAL_IMAGES if name in names), None)
        texts = () if image is not None else tuple(name for name in USUAL_TEXTS if name in names)[:1]
        if image is None and not texts:
            _refuse("text", config.text, f"set, or task.data.image; the columns present are {names}")

    kind, splits, vocab_size = "image" if image is not None else "text", {}, None
    for split, table in tables.items():
        table = table.select(_kept(len(table), config.limit, split))
        labels = _labels(table, config)
        if image is not None:
            column = _column("image", image, table.column_names)
            inputs = {"pixel_values": vision.column_pixels(table, column, config.image_size, config.channels)}
        else:
            columns = [_column("text", wanted, table.column_names) for wanted in texts]
            joined = text.joined(table, columns)
            inputs, vocab_size = text.tokens(joined, config.tokenizer, config.max_length, config.hub)
        splits[split] = Split(inputs, labels)
    return kind, splits, vocab_size


def _held_out(table: Any, config: DataConfig) -> dict[str, Any]:
    if len(table) < 2:
        _refuse("name", config.name, f"a source with a test split or at least 2 examples; it holds {len(table)}")
    rng = numpy_generator(SUBSET_SEED, "data_held_out")
    train, test = train_validation(np.arange(len(table)), config.test_share, rng)
    return {"train": table.select(train), "test": table.select(test)}


def _kept(n: int, limit: int | None, split: str) -> np.ndarray:
    """Sorted indices of the examples that `limit` keeps; a larger limit keeps those of a smaller one and more."""
    return np.sort(numpy_generator(SUBSET_SEED, f"data_limit_{split}").permutation(n)[:limit])


def _column(field: str, wanted: str | int, names: list[str]) -> str:
    if isinstance(wanted, int) and wanted < len(names):
        return names[wanted]
    if wanted not in names:
        raise ValueError(
            f"task.data.{field}={wanted!r}: no such column; the columns present are {names} "
            "(a csv or tsv without a header line needs task.data.header=false)"
        )
    return str(wanted)


def _labels(table: Any, config: DataConfig) -> Tensor:
    names = table.column_names
    wanted = config.label if config.label is not None else next((n for n in USUAL_LABELS if n in names), None)
    if wanted is None:
        _refuse("label", None, f"set, as none of {USUAL_LABELS} is among the columns present: {names}")
    column = _column("label", wanted, names)
    values = []
    for cell in table[column]:
        # A csv's cells are text; int() would also cut 1.5 to 1, so other numbers are refused.
        if not (isinstance(cell, int) or (isinstance(cell, str) and re.fullmatch(r"\s*[+-]?\d+\s*", cell))):
            _refuse("label", column, f"a column of whole numbers; it holds {cell!r}")
        values.append(int(cell))
    return _checked_labels(np.asarray(values, dtype=np.int64), config)


def _checked_labels(labels: np.ndarray, config: DataConfig) -> Tensor:
    """Shift the labels to 0 .. num_classes - 1 and refuse any outside."""
    shifted = labels - config.label_offset
    outside = labels[(shifted < 0) | (shifted >= config.num_classes)]
    if len(outside):
        raise ValueError(
            f"task.data.num_classes={config.num_classes}: label {outside[0]} less task.data.label_offset="
            f"{config.label_offset} is {outside[0] - config.label_offset}; 0..{config.num_classes - 1} is accepted"
            + (" (-1 marks a split without labels: choose another task.data.test_split)" if outside[0] == -1 else "")
        )
    return torch.from_numpy(shifted)


def _fingerprint(splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        tensors = {**split.inputs, "labels": split.labels}
        if split.groups is not None:
            tensors["groups"] = split.groups
        for key, tensor in sorted(tensors.items()):
            digest.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse(field: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"task.data.{field}={value!r}: must be {accepted}")
