"""From the few settings that name a data set to the tensors of its training and test examples.

Shape legend: N examples, L tokens, C channels, H = W pixels. A name is one of the embedded sets, a known set looked up
under the data folder, or any local file or folder; nothing is fetched from the network unless `hub` is True.
"""

import hashlib
import re
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
from fedsim.data import bpe, embedded, files, tags, text, vision
from fedsim.data.config import EMBEDDED, PER_TOKEN, DataConfig, Dataset, Split, cifar10, digits, pydoc, sst2
from fedsim.data.content import Stamp, stamp
from fedsim.data.partition import train_validation


__all__ = ["DataConfig", "Dataset", "Split", "cifar10", "digits", "load", "pydoc", "sst2"]

USUAL_IMAGES = ("image", "img")
USUAL_TEXTS = ("text", "sentence")
USUAL_WORDS = ("tokens", "words")
USUAL_LABELS = ("label", "labels", "fine_label", "target")
USUAL_TAGS = ("ner_tags", "tags", "labels")

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
    named += [Path(config.tokenizer)] if config.kind != "image" else []
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
        splits = _embedded(config)
    else:
        # The library's Arrow files live in a throw-away folder: nothing is left in the home folder.
        with tempfile.TemporaryDirectory(prefix="fedsim-data-") as cache:
            tables = files.tables(config, data_dir, cache)
            own = bpe.parsed(config.tokenizer)
            if own is None:
                splits = _converted(config, tables)
            else:
                public = _public_texts(config, own.split, tables, data_dir, cache)
                tokenizer = bpe.trained(public, own.size, masks=config.kind == "mlm")
                tokenizer.save_pretrained(f"{cache}/tokenizer")
                splits = _converted(replace(config, tokenizer=f"{cache}/tokenizer"), tables)
    _check_promised(config, splits, vocab_size)
    return Dataset(
        kind=config.kind,
        train=splits["train"],
        test=splits["test"],
        num_classes=1 if config.kind in PER_TOKEN else config.num_classes,
        vocab_size=vocab_size,
        fingerprint=_fingerprint(splits, (vocab_size, *config.special_ids, config.mask_id)),
        tokenizer=tokenizer,
    )


def _public_texts(
    config: DataConfig, split: str, tables: dict[str, Any], data_dir: str | None, cache: str
) -> Sequence[str]:
    """The texts of another split of the same data.

    **Raises:** `ValueError` if there is none of that name, or it stands in for the test split.
    """
    try:
        public = files.tables(replace(config, train_split=split, tokenizer="bytes"), data_dir, cache)["train"]
    except ValueError as error:
        raise ValueError(f"task.data.tokenizer={config.tokenizer!r}: {error}") from error

    def texts(table: Any) -> list[str]:
        columns = _input_columns(config, table.column_names)
        if config.kind == "tokens":
            return [" ".join(words) for words in tags.word_lists(table, columns[0])]
        return text.joined(table, columns)

    if "test" in tables and texts(tables["test"]) == texts(public):
        accepted = f"a split other than the one that is scored on: split {split!r} stands in for the test split"
        refuse("task.data.tokenizer", config.tokenizer, accepted)
    return texts(public)


def _embedded(config: DataConfig) -> dict[str, Split]:
    if config.name == "digits":
        images, labels, is_test = embedded.digits(config.test_share)
        labels = _checked_labels(labels.numpy(), config)
        everything = Split({"pixel_values": vision.pixels(images.numpy(), config.image_size, config.channels)}, labels)
    else:
        inputs, topics, is_test = embedded.pydoc(config.max_length, config.test_share)
        everything = Split(inputs, torch.zeros_like(topics), topics)

    splits = {}
    for split, flags in (("train", ~is_test), ("test", is_test)):
        rows = np.flatnonzero(flags.numpy())
        splits[split] = _rows(everything, rows[_kept(len(rows), config.limit, split)])
    return splits


def _converted(config: DataConfig, tables: dict[str, Any]) -> dict[str, Split]:
    if "test" not in tables:
        tables = _held_out(tables["train"], config)
    for split, table in tables.items():
        if len(table) == 0:
            refuse("task.data.name", config.name, f"a source with examples; its {split} split holds none")

    groups, splits = _groups(config, tables), {}
    for split, table in tables.items():
        columns = _input_columns(config, table.column_names)
        if config.kind in ("lm", "mlm"):
            splits[split] = _language_split(config, table, columns, groups.get(split), split)
            continue
        kept = _kept(len(table), config.limit, split)
        table, of_group = table.select(kept), torch.from_numpy(groups[split][kept]) if groups else None
        if config.kind == "tokens":
            splits[split] = _tagged_split(config, table, columns[0], of_group, split)
            continue
        labels = _labels(table, config)
        if config.kind == "image":
            inputs = {"pixel_values": vision.column_pixels(table, columns[0], config.image_size, config.channels)}
        else:
            texts = text.joined(table, columns)
            inputs = text.tokens(texts, config.tokenizer, config.max_length, config.hub)
        splits[split] = Split(inputs, labels, of_group)
    return splits


def _language_split(
    config: DataConfig, table: Any, columns: list[str], group_of_row: np.ndarray | None, split: str
) -> Split:
    texts = text.joined(table, columns)
    inputs, row_of = text.pieces(texts, config.tokenizer, config.max_length, config.hub)
    if len(row_of) == 0:
        accepted = f"columns with text to learn from; no row of the {split} split holds 2 tokens"
        refuse("task.data.text", tuple(columns), accepted)
    of_group = None if group_of_row is None else torch.from_numpy(group_of_row[row_of])
    everything = Split(inputs, torch.zeros(len(row_of), dtype=torch.int64), of_group)
    return _rows(everything, _kept(len(row_of), config.limit, split))


def _tagged_split(config: DataConfig, table: Any, column: str, of_group: Tensor | None, split: str) -> Split:
    """Rows without a tagged token, which leave nothing to learn or to score, are dropped."""
    words = tags.word_lists(table, column)
    of_rows = tags.tag_lists(table, _label_column(config, table.column_names), config, words)
    # Checked as one, then cut apart again.
    numbers = _checked_labels(np.concatenate(of_rows), config).numpy()
    of_rows = np.split(numbers, np.cumsum([len(of_row) for of_row in of_rows])[:-1])
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


def _input_columns(config: DataConfig, names: list[str]) -> list[str]:
    """The image column, or the text columns, of data of the promised kind."""
    if config.image is not None:
        return [_column("image", config.image, names)]
    if config.text:
        return [_column("text", wanted, names) for wanted in config.text]
    usual = USUAL_WORDS if config.kind == "tokens" else USUAL_TEXTS
    usual_texts = [name for name in usual if name in names][:1]
    found = [name for name in USUAL_IMAGES if name in names][:1] if config.kind == "image" else usual_texts
    if not found:
        example = usual_texts[0] if usual_texts else "COLUMN"
        images = " (or task.data.image, the column of images)" if config.kind == "image" else ""
        accepted = (
            f"the text columns, named with --set task.data.text={example}{images}; the columns present are {names}"
        )
        refuse("task.data.text", config.text, accepted)
    return found


def _groups(config: DataConfig, tables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The number of each row's group, int64 `(rows,)` a split; empty if no column names groups."""
    if config.group is None:
        return {}
    cells = {split: table[_column("group", config.group, table.column_names)][:] for split, table in tables.items()}
    for cell in (cell for column in cells.values() for cell in column):
        if not isinstance(cell, str | int):
            refuse("task.data.group", config.group, f"a column of texts or whole numbers; it holds {cell!r}")
    values = {cell for column in cells.values() for cell in column}
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    number = {value: i for i, value in enumerate(ordered)}
    return {split: np.array([number[cell] for cell in column], dtype=np.int64) for split, column in cells.items()}


def _rows(split: Split, rows: np.ndarray) -> Split:
    index = torch.from_numpy(rows)
    inputs = {name: tensor[index] for name, tensor in split.inputs.items()}
    return Split(inputs, split.labels[index], None if split.groups is None else split.groups[index])


def _held_out(table: Any, config: DataConfig) -> dict[str, Any]:
    if len(table) < 2:
        refuse(
            "task.data.name", config.name, f"a source with a test split or at least 2 examples; it holds {len(table)}"
        )
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


def _label_column(config: DataConfig, names: list[str]) -> str:
    usual = USUAL_TAGS if config.kind == "tokens" else USUAL_LABELS
    wanted = config.label if config.label is not None else next((name for name in usual if name in names), None)
    if wanted is None:
        refuse("task.data.label", None, f"set, as none of {usual} is among the columns present: {names}")
    return _column("label", wanted, names)


def _labels(table: Any, config: DataConfig) -> Tensor:
    column = _label_column(config, table.column_names)
    values = []
    for cell in table[column][:]:
        # A csv's cells are text; int() would also cut 1.5 to 1, so other numbers are refused.
        if not (isinstance(cell, int) or (isinstance(cell, str) and re.fullmatch(r"\s*[+-]?\d+\s*", cell))):
            refuse("task.data.label", column, f"a column of whole numbers; it holds {cell!r}")
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
