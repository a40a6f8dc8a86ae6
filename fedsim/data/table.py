"""One split of a source as a table that knows where each of its rows lies, so that what does not fit can be named.

Only the columns that an experiment reads are in it. Columns are joined by their names, from file to file and from split
to split; a file that lacks one, or has it of another kind, is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.core.fields import refuse
from fedsim.data.config import DataConfig


USUAL_IMAGES = ("image", "img")
USUAL_TEXTS = ("text", "sentence")
USUAL_WORDS = ("tokens", "words")
USUAL_LABELS = ("label", "labels", "fine_label", "target")
USUAL_TAGS = ("ner_tags", "tags", "labels")


@dataclass(frozen=True)
class Part:
    """Rows that lie in one place.

    - `place`: a file, a folder, or a split of a hub set.
    - `rows`: a `datasets.Dataset`.
    - `numbers`: of its rows there, from 0.
    """

    place: str
    rows: Any
    numbers: np.ndarray

    def where(self, row: int) -> str:
        """The place and number of a row."""
        return f"{self.place}, row {self.numbers[row]}"


@dataclass(frozen=True)
class Table:
    """The rows of one split, part after part."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.numbers) for part in self.parts)

    def select(self, rows: np.ndarray) -> "Table":
        """Some of the rows, in ascending order."""
        chosen, first = [], 0
        for part in self.parts:
            inside = rows[(rows >= first) & (rows < first + len(part.numbers))] - first
            first += len(part.numbers)
            chosen.append(Part(part.place, part.rows.select(inside), part.numbers[inside]))
        return Table(tuple(chosen))

    def feature(self, column: str) -> Any:
        """What a column holds: a feature of `datasets`, of the same kind in every part."""
        return self.parts[0].rows.features[column]

    def cells(self, column: str) -> list[Any]:
        """A column, a value a row."""
        return [cell for part in self.parts for cell in part.rows[column][:]]

    def texts(self, columns: Sequence[str]) -> list[str]:
        """One text an example: its text columns joined with a space, cells without a value left out.

        **Raises:** `ValueError` for a column of something else, and for a row in which no cell has a value.
        """
        import datasets

        for column in columns:
            feature = self.feature(column)
            # Any cell can be written as text, also an image; a model would learn from its printed form unnoticed.
            if not isinstance(feature, datasets.Value) or "binary" in feature.dtype:
                refuse("task.data.text", column, f"a column of texts; it holds {feature}")
        texts = []
        for row, cells in enumerate(zip(*map(self.cells, columns), strict=True)):
            held = [str(cell) for cell in cells if cell is not None and cell == cell]  # NaN is no value either
            if not held:
                refuse(
                    "task.data.text", tuple(columns), f"columns with a text in every row; {self.where(row)} holds none"
                )
            texts.append(" ".join(held))
        return texts

    def encoded_images(self, column: str) -> Iterator[Any]:
        """The cells of a column of images, not decoded, read a batch at a time."""
        import datasets

        for part in self.parts:
            rows = part.rows.select_columns([column])
            if isinstance(rows.features[column], datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            for batch in rows.iter(batch_size=256):
                yield from batch[column]

    def where(self, row: int) -> str:
        """The place and number of a row."""
        for part in self.parts:
            if row < len(part.numbers):
                return part.where(row)
            row -= len(part.numbers)
        raise IndexError(row)


@dataclass(frozen=True)
class Columns:
    """The columns that an experiment reads: images or texts, and the labels and groups where it reads any."""

    inputs: tuple[str, ...]
    label: str | None
    group: str | None

    @staticmethod
    def of(config: DataConfig, names: Sequence[str]) -> "Columns":
        """Chosen among the columns of the first file of the split that is trained on.

        **Raises:** `ValueError` if one is not there.
        """
        return Columns(
            inputs=_inputs(config, names),
            label=None if config.kind in ("lm", "mlm") else _label(config, names),
            group=None if config.group is None else _column("group", config.group, names),
        )

    @property
    def all(self) -> list[str]:
        return [*dict.fromkeys(name for name in (*self.inputs, self.label, self.group) if name is not None)]


def joined(config: DataConfig, splits: dict[str, list[tuple[str, Any]]]) -> tuple[dict[str, Table], Columns]:
    """The tables of splits, of pairs of a place and the `datasets.Dataset` that lies there.

    **Raises:** `ValueError` for a place that lacks a column, or has it of another kind.
    """
    first_place, first = splits["train"][0]
    columns, tables = Columns.of(config, first.column_names), {}
    kinds = {name: _kind(first.features[name]) for name in columns.all}
    for split, places in splits.items():
        parts = []
        for place, rows in places:
            for name, kind in kinds.items():
                if name not in rows.column_names:
                    accepted = f"a source whose files all have the column {name!r}; {place} has {rows.column_names}"
                    refuse("task.data.name", config.name, accepted)
                if (other := _kind(rows.features[name])) != kind:
                    accepted = f"a source with one kind of {name!r}: {kind} in {first_place}, {other} in {place}"
                    refuse("task.data.name", config.name, accepted)
            parts.append(Part(place, rows.with_format(None).select_columns(columns.all), np.arange(len(rows))))
        tables[split] = Table(tuple(parts))
    return tables, columns


def _kind(feature: Any) -> str:
    """What a column holds, in words that are the same for files that may be read alike."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "classes with names"
    if isinstance(feature, datasets.List | datasets.LargeList):
        return f"lists of {_kind(feature.feature)}"
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"}):
        return "images"
    dtype = getattr(feature, "dtype", "")
    if dtype in ("string", "large_string"):
        return "texts"
    return "whole numbers" if dtype.startswith(("int", "uint")) else dtype or type(feature).__name__


def separated(names: Sequence[str]) -> str:
    """What to say of a table of one column whose name reads like several."""
    marks = [mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]]
    return f"; its cells seem to be separated by {marks[0]!r}: save them with commas as a csv" if marks else ""


def _inputs(config: DataConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The image column, or the text columns, of data of the promised kind."""
    if config.image is not None:
        return (_column("image", config.image, names),)
    if config.text:
        return tuple(_column("text", wanted, names) for wanted in config.text)
    usual = USUAL_WORDS if config.kind == "tokens" else USUAL_TEXTS
    usual_texts = [name for name in usual if name in names][:1]
    found = [name for name in USUAL_IMAGES if name in names][:1] if config.kind == "image" else usual_texts
    if not found:
        example = usual_texts[0] if usual_texts else "COLUMN"
        images = " (or task.data.image, the column of images)" if config.kind == "image" else ""
        accepted = (
            f"the text columns, named with --set task.data.text={example}{images}; the columns present are {[*names]}"
        )
        refuse("task.data.text", config.text, accepted + separated(names))
    return tuple(found)


def _label(config: DataConfig, names: Sequence[str]) -> str:
    usual = USUAL_TAGS if config.kind == "tokens" else USUAL_LABELS
    wanted = config.label if config.label is not None else next((name for name in usual if name in names), None)
    if wanted is None:
        accepted = f"set, as none of {usual} is among the columns present: {[*names]}{separated(names)}"
        refuse("task.data.label", None, accepted)
    return _column("label", wanted, names)


def _column(field: str, wanted: str | int, names: Sequence[str]) -> str:
    if isinstance(wanted, int) and wanted < len(names):
        return names[wanted]
    if wanted not in names:
        raise ValueError(
            f"task.data.{field}={wanted!r}: no such column; the columns present are {[*names]} "
            f"(a csv or tsv without a header line needs task.data.header=false){separated(names)}"
        )
    return str(wanted)
