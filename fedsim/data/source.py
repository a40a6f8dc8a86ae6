"""From the few settings that name a data set to the tensors of its training and test examples.

Shape legend: N examples, L tokens, C channels, H = W pixels. A name is one of the embedded sets, a known set looked up
under the data folder, or any local file or folder; nothing is fetched from the network unless `hub` is True.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.core.seeding import numpy_generator
from fedsim.data import bpe, embedded, files, labels, tags, text, vision
from fedsim.data.config import EMBEDDED, PER_TOKEN, DataConfig, Dataset, Split, cifar10, digits, pydoc, sst2
from fedsim.data.content import Stamp, stamp
from fedsim.data.partition import train_validation
from fedsim.data.table import Columns, Table


__all__ = ["DataConfig", "Dataset", "Split", "cifar10", "digits", "load", "pydoc", "sst2"]

# Which examples are held out or kept must not depend on an experiment's seed: all runs share one test set.
SUBSET_SEED = 0


def load(config: DataConfig, data_dir: str | None) -> Dataset:
    """Load a data set; as long as its files stay, a second call in the same process returns the same object.

    **Arguments:**

    - `data_dir`: the folder that holds one folder a known name, or None.

    **Raises:** `ValueError` if there are no such data, or they are not what `config` promises.
    """
    if config.sha256 is not None:
        return _pinned(config, data_dir)
    return _loaded(config, data_dir, stamp(*paths(config, data_dir)))


def paths(config: DataConfig, data_dir: str | None) -> list[Path]:
    """The files and folders on this machine that a data set is read from, a tokenizer's among them."""
    if config.name in EMBEDDED:
        return []
    named = [files.path_of(config, data_dir)]
    named += [Path(config.tokenizer).expanduser()] if config.kind != "image" else []
    return [path for path in named if path.exists()]


@lru_cache(maxsize=8)
def _pinned(config: DataConfig, data_dir: str | None) -> Dataset:
    """The content is known to be right once it was held against its hash: files are not looked at again."""
    found = load(replace(config, sha256=None), data_dir)
    if found.fingerprint != config.sha256:
        raise ValueError(
            f"task.data.name={config.name!r}: its content has changed: sha256 {config.sha256} then, "
            f"{found.fingerprint} now"
        )
    return found


@lru_cache(maxsize=8)
def _loaded(config: DataConfig, data_dir: str | None, stamp: Stamp) -> Dataset:
    vocab_size, tokenizer = config.vocab_size, None
    if config.name in EMBEDDED:
        splits, names = _embedded(config), config.class_names
    else:
        # The library's Arrow files live in a throw-away folder: nothing is left in the home folder.
        with tempfile.TemporaryDirectory(prefix="fedsim-data-") as cache:
            tables, columns = files.tables(config, data_dir, cache)
            own = bpe.parsed(config.tokenizer)
            if own is None:
                splits, names = _converted(config, tables, columns)
            else:
                public = _public_texts(config, own.split, tables, columns, data_dir, cache)
                tokenizer = bpe.trained(public, own.size, masks=config.kind == "mlm")
                tokenizer.save_pretrained(f"{cache}/tokenizer")
                splits, names = _converted(replace(config, tokenizer=f"{cache}/tokenizer"), tables, columns)
    _check_promised(config, splits, vocab_size)
    return Dataset(
        kind=config.kind,
        train=splits["train"],
        test=splits["test"],
        num_classes=1 if config.kind in PER_TOKEN else config.num_classes,
        vocab_size=vocab_size,
        fingerprint=_fingerprint(splits, (vocab_size, *config.special_ids, config.mask_id)),
        tokenizer=tokenizer,
        class_names=names,
    )


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


def _embedded(config: DataConfig) -> dict[str, Split]:
    if config.name == "digits":
        images, targets, is_test = embedded.digits(config.test_share)
        found = [labels.Labels(targets.tolist(), (), "digits, row {}".format)]
        numbers, _ = labels.numbered("label", {"train": found}, config)
        shown = vision.pixels(images.numpy(), config.image_size, config.channels)
        everything = Split({"pixel_values": shown}, torch.from_numpy(numbers["train"]))
    else:
        inputs, topics, is_test = embedded.pydoc(config.max_length, config.test_share)
        everything = Split(inputs, torch.zeros_like(topics), topics)

    splits = {}
    for split, flags in (("train", ~is_test), ("test", is_test)):
        rows = np.flatnonzero(flags.numpy())
        splits[split] = _rows(everything, rows[_kept(len(rows), config.limit, split)])
    return splits


def _converted(
    config: DataConfig, tables: dict[str, Table], columns: Columns
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The examples of both splits, and the names of their classes."""
    for split, table in tables.items():
        if len(table) == 0:
            refuse("task.data.name", config.name, f"a source with examples; its {split} split holds none")
    dealt = _dealt(config, tables)
    numbers, names = _numbered(config, tables, columns)
    groups, splits = _groups(config, tables, columns.group), {}
    for split, (source, rows) in dealt.items():
        if config.kind not in ("lm", "mlm"):
            rows = rows[_kept(len(rows), config.limit, split)]
        table = tables[source].select(rows)
        of_group = torch.from_numpy(groups[source][rows]) if groups else None
        if config.kind in ("lm", "mlm"):
            splits[split] = _language_split(config, table, columns.inputs, of_group, split)
        elif config.kind == "tokens":
            of_rows = [numbers[source][row] for row in rows]
            splits[split] = _tagged_split(config, table, columns.inputs[0], of_rows, of_group, split)
        else:
            splits[split] = Split(_inputs(config, table, columns), torch.from_numpy(numbers[source][rows]), of_group)
    return splits, names


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


def _inputs(config: DataConfig, table: Table, columns: Columns) -> dict[str, Tensor]:
    """Images, or texts to classify."""
    if config.kind == "image":
        return {"pixel_values": vision.column_pixels(table, columns.inputs[0], config.image_size, config.channels)}
    texts = table.texts(columns.inputs)
    inputs = text.tokens(texts, config.tokenizer, config.max_length, config.hub)
    silent = np.flatnonzero(~inputs["attention_mask"].any(dim=1).numpy())
    if len(silent):
        accepted = f"columns of texts that are tokens to task.data.tokenizer; {table.where(int(silent[0]))} is none"
        refuse("task.data.text", columns.inputs, accepted)
    return inputs


def _language_split(
    config: DataConfig, table: Table, columns: Sequence[str], group_of_row: Tensor | None, split: str
) -> Split:
    texts = table.texts(columns)
    inputs, row_of = text.pieces(texts, config.tokenizer, config.max_length, config.hub)
    if len(row_of) == 0:
        accepted = f"columns with text to learn from; no row of the {split} split holds 2 tokens"
        refuse("task.data.text", tuple(columns), accepted)
    of_group = None if group_of_row is None else group_of_row[torch.from_numpy(row_of)]
    everything = Split(inputs, torch.zeros(len(row_of), dtype=torch.int64), of_group)
    return _rows(everything, _kept(len(row_of), config.limit, split))


def _tagged_split(
    config: DataConfig, table: Table, column: str, of_rows: list[np.ndarray], of_group: Tensor | None, split: str
) -> Split:
    """Rows without a tagged token, which leave nothing to learn or to score, are dropped."""
    words = tags.word_lists(table, column)
    inputs, starts_NL = text.word_tokens(words, config.tokenizer, config.max_length, config.hub)
    rows = np.flatnonzero((starts_NL >= 0).any(axis=1))
    if len(rows) == 0:
        refuse("task.data.text", column, f"a column with words to learn from; no row of the {split} split holds one")
    inputs["labels"] = tags.token_labels(of_rows, starts_NL)
    return _rows(Split(inputs, torch.zeros(len(words), dtype=torch.int64), of_group), rows)


def _check_promised(config: DataConfig, splits: dict[str, Split], vocab_size: int | None) -> None:
    """Hold the data to what models are built for without having seen them."""
    names = {"pixel_values"} if config.kind == "image" else {"input_ids", "attention_mask"}
    names |= {"labels"} if config.kind == "tokens" else set()
    for split in splits.values():
        assert set(split.inputs) == names, f"{config.kind} data hold {sorted(split.inputs)}"
        # The ids of a Hugging Face vocabulary need not be consecutive, so its length does not bound them.
        if vocab_size is not None and (highest := int(split.inputs["input_ids"].max())) >= vocab_size:
            accepted = f"a tokenizer with ids below its vocabulary's size, {vocab_size}; it gave {highest}"
            refuse("task.data.tokenizer", config.tokenizer, accepted)


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


def _rows(split: Split, rows: np.ndarray) -> Split:
    index = torch.from_numpy(rows)
    inputs = {name: tensor[index] for name, tensor in split.inputs.items()}
    return Split(inputs, split.labels[index], None if split.groups is None else split.groups[index])


def _kept(n: int, limit: int | None, split: str) -> np.ndarray:
    """Sorted indices of the examples that `limit` keeps; a larger limit keeps those of a smaller one and more."""
    return np.sort(numpy_generator(SUBSET_SEED, f"data_limit_{split}").permutation(n)[:limit])


def _fingerprint(splits: dict[str, Split], ids: tuple[int | None, ...]) -> str:
    digest = hashlib.sha256(f"{ids}\n".encode())
    for name, split in sorted(splits.items()):
        # Pairs, not a dict: token classes have labels among the inputs as well.
        tensors = [*split.inputs.items(), ("labels", split.labels)]
        if split.groups is not None:
            tensors.append(("groups", split.groups))
        for key, tensor in sorted(tensors, key=lambda pair: pair[0]):
            digest.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
