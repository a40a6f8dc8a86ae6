"""Words that carry tags: columns of lists of words and of tags, and which token carries which tag.

Shape legend: N examples, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.data import labels
from fedsim.data.config import DataConfig
from fedsim.data.labels import Labels
from fedsim.data.table import Part, Table
from fedsim.data.text import IGNORED


def word_lists(table: Table, column: str) -> list[list[str]]:
    """The words of each row. **Raises:** `ValueError` unless every cell is a list of texts."""
    feature, words = _listed(table.feature(column)), table.cells(column)
    if feature is None or getattr(feature, "dtype", "") not in ("string", "large_string"):
        accepted = f"a column of lists of words, as parquet and saved folders hold; it holds {table.feature(column)}"
        refuse("task.data.text", column, accepted)
    for row, cell in enumerate(words):
        if cell is None or None in cell:
            refuse("task.data.text", column, f"a column of lists of words; {table.where(row)} holds {cell!r}")
    return words


def tag_lists(
    tables: dict[str, Table], words: str, column: str, config: DataConfig
) -> tuple[dict[str, list[np.ndarray]], tuple[str, ...]]:
    """The tags of each row as whole numbers `(words,)`, a list a split, and the names of the tags, if they have any.

    **Arguments:**

    - `words`: the column of the words.

    **Raises:** `ValueError` for cells that are no lists of tags, one tag a word, and as `labels.numbered` does.
    """
    splits: dict[str, list[Labels]] = {}
    lengths: dict[str, list[int]] = {}
    for split, table in tables.items():
        kind = getattr(_listed(table.feature(column)), "dtype", "")
        if kind not in ("string", "large_string") and not kind.startswith(("int", "uint")):
            accepted = f"a column of lists of whole numbers or of tags; it holds {table.feature(column)}"
            refuse("task.data.label", column, accepted)
        counts = [len(cell) for cell in word_lists(table, words)]
        splits[split], lengths[split], first = [], [], 0
        for part in table.parts:
            splits[split].append(_flat(part, column, counts[first : first + len(part.rows)]))
            first += len(part.rows)
        lengths[split] = counts
    numbers, names = labels.numbered(column, splits, config)
    return {split: np.split(found, np.cumsum(lengths[split])[:-1]) for split, found in numbers.items()}, names


def _flat(part: Part, column: str, words: Sequence[int]) -> Labels:
    """The tags of the rows of one part one after the other."""
    cells = part.rows[column][:]
    for row, (cell, count) in enumerate(zip(cells, words, strict=True)):
        if cell is None or None in cell or len(cell) != count:
            accepted = f"one tag a word; {part.where(row)} holds {count} words, tags {cell!r}"
            refuse("task.data.label", column, accepted)
    row_of = np.repeat(np.arange(len(words)), words)
    names = tuple(getattr(_listed(part.rows.features[column]), "names", ()))
    return Labels([tag for cell in cells for tag in cell], names, lambda index: part.where(row_of[index]))


def token_labels(tags: Sequence[np.ndarray], starts_NL: np.ndarray) -> Tensor:
    """A word's tag at its first token, `IGNORED` everywhere else.

    **Arguments:**

    - `tags`: a number for each word, `(words,)` for each example.
    - `starts_NL`: see `fedsim.data.text.word_tokens`.

    **Returns:** int64 `(N, L)`.
    """
    labels_NL = np.full_like(starts_NL, IGNORED)
    for labels_L, starts_L, of_row in zip(labels_NL, starts_NL, tags, strict=True):
        carries = starts_L >= 0
        labels_L[carries] = of_row[starts_L[carries]]
    return torch.from_numpy(labels_NL)


def _listed(feature: Any) -> Any:
    """What the lists of a column hold; None where it holds no lists."""
    import datasets

    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None
