"""Words that carry tags: columns of lists of words and of tags, and which token carries which tag.

Shape legend: N examples, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.data.config import DataConfig
from fedsim.data.text import IGNORED


def word_lists(table: Any, column: str) -> list[list[str]]:
    """The words of each row. **Raises:** `ValueError` unless every cell is a list of texts."""
    feature, words = _listed(table, column), table[column][:]
    if feature is None or getattr(feature, "dtype", "") not in ("string", "large_string"):
        accepted = f"a column of lists of words, as parquet and saved folders hold; it holds {table.features[column]}"
        refuse("task.data.text", column, accepted)
    for row, cell in enumerate(words):
        if cell is None or None in cell:
            refuse("task.data.text", column, f"a column of lists of words; row {row} holds {cell!r}")
    return words


def tag_lists(table: Any, column: str, config: DataConfig, words: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """The tags of each row as whole numbers `(words,)`: as they are in the column, or positions in `class_names`.

    **Raises:** `ValueError` for cells that are no lists of tags, one tag a word, and for tags of another name.
    """
    import datasets

    feature, rows = _listed(table, column), table[column][:]
    kind = getattr(feature, "dtype", "")
    if kind not in ("string", "large_string") and not kind.startswith(("int", "uint")):
        accepted = f"a column of lists of whole numbers or of tags; it holds {table.features[column]}"
        refuse("task.data.label", column, accepted)
    names = {name: number for number, name in enumerate(config.class_names)}
    given = tuple(feature.names)[config.label_offset :] if isinstance(feature, datasets.ClassLabel) else ()
    if names and given and given != config.class_names:
        refuse("task.data.class_names", config.class_names, f"the names that the data give: {given}")

    tags = []
    for row, cell in enumerate(rows):
        if cell is None or None in cell or len(cell) != len(words[row]):
            refuse("task.data.label", column, f"one tag a word; row {row} holds {len(words[row])} words, tags {cell!r}")
        if kind.endswith("string"):
            unknown = [tag for tag in cell if tag not in names]
            if unknown:
                accepted = (
                    f"names that are in task.data.class_names={config.class_names}; row {row} holds {unknown[0]!r}"
                )
                refuse("task.data.label", column, accepted)
            cell = [names[tag] + config.label_offset for tag in cell]  # numbers of either origin lose the offset later
        tags.append(np.asarray(cell, dtype=np.int64))
    return tags


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


def _listed(table: Any, column: str) -> Any:
    """What the lists in a column hold; None where it holds no lists."""
    import datasets

    feature = table.features[column]
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None
