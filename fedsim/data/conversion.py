"""From the files of a data set to prepared ones: decoded and tokenised once.

Shape legend: N examples, L tokens.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.core.seeding import numpy_generator
from fedsim.data import bpe, files, labels, tags, text, vision
from fedsim.data.config import DataConfig
from fedsim.data.partition import train_validation
from fedsim.data.prepared import LENGTHS, Writer, progress
from fedsim.data.table import Columns, Table


# Which examples are held out or kept must not depend on an experiment's seed: all runs share one test set.
SUBSET_SEED = 0
TOGETHER = 2000  # texts that are tokenised at once


def convert(config: DataConfig, data_dir: str | None, into: Writer) -> dict[str, Any]:
    """Write the examples of both splits. **Returns:** what else there is to know of them."""
    # What the library writes meanwhile lies where whoever prepares next clears it away, if this process is killed.
    with tempfile.TemporaryDirectory(dir=into.folder) as scratch:
        tables, columns = files.tables(config, data_dir, scratch)
        own, reading = bpe.parsed(config.tokenizer), config
        if own is not None:
            public = _public_texts(config, own.split, tables, columns, data_dir, scratch)
            trained = bpe.trained(public, own.size)
            into.whole("tokenizer", np.frombuffer(trained.encode(), np.uint8))
            bpe.tokenizer(trained, masks=config.kind == "mlm").save_pretrained(f"{scratch}/tokenizer")
            reading = replace(config, tokenizer=f"{scratch}/tokenizer")
        names = _write(reading, tables, columns, into)
    return {"kind": config.kind, "ids": token_ids(config), "class_names": names}


def token_ids(config: DataConfig) -> tuple[int | None, ...]:
    """Size of the vocabulary, and the ids that pad, that close and that mask."""
    return config.vocab_size, *config.special_ids, config.mask_id


def _public_texts(
    config: DataConfig, split: str, tables: dict[str, Table], columns: Columns, data_dir: str | None, cache: str
) -> Sequence[str]:
    """The texts of another split of the same data.

    **Raises:** `ValueError` if there is none of that name, or it stands in for the test split.
    """
    try:
        alone = replace(config, train_split=split, tokenizer="bytes")
        public, of_public = files.tables(alone, data_dir, cache, alone=True)
    except ValueError as error:
        raise ValueError(f"task.data.tokenizer={config.tokenizer!r}: {error}") from error

    def texts(table: Table, of: Columns) -> list[str]:
        if config.kind == "tokens":
            return [" ".join(words) for words in tags.word_lists(table, of.inputs[0])]
        return table.texts(of.inputs)

    if "test" in tables and texts(tables["test"], columns) == texts(public["train"], of_public):
        accepted = f"a split other than the one that is scored on: split {split!r} stands in for the test split"
        refuse("task.data.tokenizer", config.tokenizer, accepted)
    return texts(public["train"], of_public)


def _write(config: DataConfig, tables: dict[str, Table], columns: Columns, into: Writer) -> tuple[str, ...]:
    """Write the examples of both splits, and say what was made. **Returns:** the names of their classes."""
    for split, table in tables.items():
        if len(table) == 0:
            refuse("task.data.name", config.name, f"a source with examples; its {split} split holds none")
    dealt = _dealt(config, tables)
    numbers, names = _numbered(config, tables, columns)
    groups = _groups(config, tables, columns.group)
    kinds = set[vision.Kind]()
    for split, (source, rows) in dealt.items():
        if config.kind not in ("lm", "mlm"):
            rows = rows[limited(len(rows), config, split)]
        table, labels = tables[source].select(rows), None
        if config.kind == "image":
            kept = np.arange(len(rows))
            _write_images(config, table, columns.inputs[0], f"{split}.pixel_values", into, kinds)
            labels = numbers[source][rows]
        elif config.kind in ("lm", "mlm"):
            kept = _write_pieces(config, table, columns.inputs, split, into)
        elif config.kind == "tokens":
            kept = _write_tagged(config, table, columns.inputs[0], [numbers[source][row] for row in rows], split, into)
        else:
            kept = np.arange(len(rows))
            _write_texts(config, table, columns.inputs, split, into)
            labels = numbers[source][rows]
        into.whole(f"{split}.labels", np.zeros(len(kept), np.int64) if labels is None else labels)
        if groups:
            into.whole(f"{split}.groups", groups[source][rows][kept])
    into.made = _made(config, into, kinds)
    return names


def _made(config: DataConfig, into: Writer, kinds: set[vision.Kind]) -> str:
    """What the examples became of what they were, for people: settings that nobody gave make less of some data."""
    if config.kind == "image":
        sizes = dict.fromkeys(f"{width}x{height}" for width, height, _ in (min(kinds), max(kinds)))
        was = f"{' to '.join(sizes)} {' and '.join(sorted({colours for *_, colours in kinds}))}"
        size, colours = config.image_size, "grey" if config.channels == 1 else "colour"
        became = f"{size}x{size} {colours}"
        made = f"images, {was}" + (f" -> {became}" if became != was else "")
    elif config.kind in ("lm", "mlm"):
        made = f"pieces of up to {config.max_length} tokens"
    else:
        files = [into.folder / f"{split}.input_ids.{LENGTHS}" for split in ("train", "test")]
        full = np.concatenate([np.fromfile(file, np.int64) for file in files]) >= config.max_length
        made = f"texts; {100 * full.mean():.1f} % reach {config.max_length} tokens, where they are cut"
    train, test = (
        array["sha256"] for name, array in into.arrays.items() if name.endswith((".pixel_values", "input_ids"))
    )
    return made + ("; the test split holds the same examples as the training split" if train == test else "")


def _dealt(config: DataConfig, tables: dict[str, Table]) -> dict[str, tuple[str, np.ndarray]]:
    """Of which table each split is, and which rows of it."""
    if "test" in tables:
        return {split: (split, np.arange(len(table))) for split, table in tables.items()}
    count = len(tables["train"])
    if count < 2:
        refuse("task.data.name", config.name, f"a source with a test split or at least 2 examples; it holds {count}")
    rng = numpy_generator(SUBSET_SEED, "data_held_out")
    train, test = train_validation(np.arange(count), config.test_share, rng)
    return {"train": ("train", train), "test": ("train", test)}


def _numbered(config: DataConfig, tables: dict[str, Table], columns: Columns) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The label of each row, or its tags, a split; and the names of the classes. Nothing where no labels are read."""
    if (column := columns.label) is None:
        return {}, ()
    if config.kind == "tokens":
        return tags.tag_lists(tables, columns.inputs[0], column, config)
    parts = {
        split: [
            labels.Labels(part.rows[column][:], tuple(getattr(part.rows.features[column], "names", ())), part.where)
            for part in table.parts
        ]
        for split, table in tables.items()
    }
    return labels.numbered(column, parts, config)


def _write_images(
    config: DataConfig, table: Table, column: str, name: str, into: Writer, kinds: set[vision.Kind]
) -> None:
    """Images as they are, if they are of one size and none too large: they are enlarged when they are used.

    - `kinds`: receives what the images were.
    """
    places = [Path(part.place) for part in table.parts]

    def read(path: Path) -> None:
        if not any(path.is_relative_to(place) for place in places):
            into.beside.add(path)

    for keep in (True, False):
        rows = vision.column_rows(table, column, config.image_size, config.channels, keep, read, kinds)
        try:
            return into.rows(name, progress(rows, len(table), f"{config.name}: images"))
        except vision.MixedSizes:
            continue


def _write_texts(config: DataConfig, table: Table, columns: Sequence[str], split: str, into: Writer) -> None:
    """Texts to classify."""

    def ids() -> Iterator[np.ndarray]:
        for first, texts in _some(table.texts(columns)):
            inputs = text.tokens(texts, config.tokenizer, config.max_length, config.hub)
            for row, found in enumerate(_unpadded(inputs["input_ids"], inputs), first):
                if len(found) == 0:
                    accepted = f"columns of texts that are tokens to task.data.tokenizer; {table.where(row)} is none"
                    refuse("task.data.text", tuple(columns), accepted)
                yield found

    into.rows(f"{split}.input_ids", _below(config, progress(ids(), len(table), f"{config.name}: texts")), ragged=True)


def _write_pieces(config: DataConfig, table: Table, columns: Sequence[str], split: str, into: Writer) -> np.ndarray:
    """Pieces of texts, for language modelling. **Returns:** the row that each piece is from."""
    pieces, row_of = list[np.ndarray](), list[np.ndarray]()
    for first, texts in _some(progress(table.texts(columns), len(table), f"{config.name}: texts")):
        inputs, of_text = text.pieces(texts, config.tokenizer, config.max_length, config.hub)
        pieces += _unpadded(inputs["input_ids"], inputs)
        row_of.append(of_text + first)
    if not pieces:
        accepted = f"columns with text to learn from; no row of the {split} split holds 2 tokens"
        refuse("task.data.text", tuple(columns), accepted)
    kept = limited(len(pieces), config, split)
    into.rows(f"{split}.input_ids", _below(config, (pieces[piece] for piece in kept)), ragged=True)
    return np.concatenate(row_of)[kept]


def _write_tagged(
    config: DataConfig, table: Table, column: str, of_rows: list[np.ndarray], split: str, into: Writer
) -> np.ndarray:
    """Words with tags. Rows without a tagged token, which leave nothing to learn or to score, are dropped.

    **Returns:** the rows that are kept.
    """
    words, kept, ids, labels = tags.word_lists(table, column), list[int](), list[np.ndarray](), list[np.ndarray]()
    for first, some in _some(progress(words, len(words), f"{config.name}: texts")):
        inputs, starts_NL = text.word_tokens(some, config.tokenizer, config.max_length, config.hub)
        of_tokens = tags.token_labels(of_rows[first : first + len(some)], starts_NL)
        rows: list[int] = np.flatnonzero((starts_NL >= 0).any(axis=1)).tolist()
        kept += [first + row for row in rows]
        ids += map(list(_unpadded(inputs["input_ids"], inputs)).__getitem__, rows)
        labels += map(list(_unpadded(of_tokens, inputs)).__getitem__, rows)
    if not kept:
        refuse("task.data.text", column, f"a column with words to learn from; no row of the {split} split holds one")
    into.rows(f"{split}.input_ids", _below(config, ids), ragged=True)
    into.rows(f"{split}.labels_of_tokens", labels, ragged=True)
    return np.array(kept)


def _some(texts: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """So many texts that are tokenised at once, and the number of the first."""
    remaining, first = iter(texts), 0
    while some := list(itertools.islice(remaining, TOGETHER)):
        yield first, some
        first += len(some)


def _unpadded(rows_NL: Tensor, inputs: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """The tokens of each row without what pads it, which is at its end, int32."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return (row[:length] for row, length in zip(rows_NL.to(torch.int32).numpy(), lengths, strict=True))


def _below(config: DataConfig, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same ids. **Raises:** `ValueError` for one that is no token of the vocabulary that models are built for.

    The ids of a Hugging Face vocabulary need not be consecutive, so its length does not bound them.
    """
    size = config.vocab_size
    for row in rows:
        if size is not None and (highest := int(row.max())) >= size:
            accepted = f"a tokenizer with ids below its vocabulary's size, {size}; it gave {highest}"
            refuse("task.data.tokenizer", config.tokenizer, accepted)
        yield row


def _groups(config: DataConfig, tables: dict[str, Table], name: str | None) -> dict[str, np.ndarray]:
    """The number of each row's group, int64 `(rows,)` a split; empty if no column names groups."""
    if name is None:
        return {}
    cells = {split: table.cells(name) for split, table in tables.items()}
    for split, column in cells.items():
        for row, cell in enumerate(column):
            if not isinstance(cell, str | int):
                accepted = f"a column of texts or whole numbers; {tables[split].where(row)} holds {cell!r}"
                refuse("task.data.group", config.group, accepted)
    values = {cell for column in cells.values() for cell in column}
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    number = {value: i for i, value in enumerate(ordered)}
    return {split: np.array([number[cell] for cell in column], dtype=np.int64) for split, column in cells.items()}


def limited(n: int, config: DataConfig, split: str) -> np.ndarray:
    """Sorted indices of what `first`, `skip` and a limit keep; a larger limit keeps what a smaller one does and more.

    **Raises:** `ValueError` if there are not so many as `first`, or `skip` leaves none.
    """
    first, limit, there = (
        0,
        config.test_limit or config.limit,
        f"the training examples of task.data.name={config.name!r}",
    )
    if split == "train":
        if config.skip >= n:
            refuse("task.data.skip", config.skip, f"below {n}, {there}")
        if config.first and config.first > n:
            refuse("task.data.first", config.first, f"at most {n}, {there}")
        first, limit, n = config.skip, config.limit, config.first or n
    rng = numpy_generator(SUBSET_SEED, f"data_limit_{split}")
    return first + np.sort(rng.permutation(n - first)[:limit])
