"""Labels to numbers from 0: by their names where they have any, else as the numbers they are.

Names come with columns of classes (`datasets.ClassLabel`, as image folders have), or are the texts of a column. The
order of the classes is that of `class_names`; without it that of the split which is trained on: as its column says, or,
of texts, sorted. Another split's labels are numbered by these names, whatever its own numbers are.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.core.fields import refuse
from fedsim.data.config import DataConfig


WHOLE = re.compile(r"\s*[+-]?\d+\s*")
NOT_WHOLE = ": write whole numbers, such as 0 for 0.0 (pandas: .astype(int)), or name texts in task.data.class_names"
UNLABELLED = " (-1 marks a split without labels: choose another task.data.test_split)"


@dataclass(frozen=True)
class Labels:
    """The labels that lie in one place.

    - `cells`: one after the other, as they were read.
    - `names`: what numbers stand for there, where the column says so.
    - `where`: the place and row of a cell.
    """

    cells: Sequence[Any]
    names: tuple[str, ...]
    where: Callable[[int], str]


def numbered(
    column: str, splits: dict[str, list[Labels]], config: DataConfig
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The number of each label, 0 .. num_classes - 1, int64 a split; and the names of the classes, if they have any.

    **Raises:** `ValueError` for a label that is missing, of another kind than the others, or none of the classes.
    """
    for part in (part for parts in splits.values() for part in parts):
        for index, cell in enumerate(part.cells):
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                refuse(
                    "task.data.label", column, f"a column with a label in every row; {part.where(index)} holds {cell!r}"
                )
    named_alike = any(column in part.cells for parts in splits.values() for part in parts)
    if isinstance(config.label, int) and config.header and named_alike:
        refuse("task.data.header", True, f"false, as the label's column has the name {column!r}, and so has a class")
    names = _names(splits["train"], config)
    place = {name: number for number, name in enumerate(names)}
    numbers = {}
    for split, parts in splits.items():
        found = [_number(column, part, i, place, config) for part in parts for i in range(len(part.cells))]
        numbers[split] = np.asarray(found, dtype=np.int64)
    return numbers, names or config.class_names


def _names(parts: Sequence[Labels], config: DataConfig) -> tuple[str, ...]:
    """The names by which labels are numbered, in order; none where they are numbers."""
    given = config.class_names
    if parts[0].names:
        found = parts[0].names[config.label_offset :]
        if given and {*given} != {*found}:
            refuse("task.data.class_names", given, f"the names that the data give, in any order: {found}")
        return _counted(given or found, config)
    texts = {cell for part in parts for cell in part.cells if isinstance(cell, str)}
    if texts and given and (texts <= {*given} or not any(map(_is_number, texts))):
        return given
    if not texts or any(map(_is_number, texts)):
        return ()
    return _counted(tuple(sorted(texts)), config)


def _counted(names: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    if len(names) != config.num_classes:
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        refuse("task.data.num_classes", config.num_classes, f"{len(names)}, the number of classes found: {shown}")
    return names


def _number(column: str, part: Labels, index: int, place: dict[str, int], config: DataConfig) -> int:
    cell = part.cells[index]
    if not place and (isinstance(cell, int) or (isinstance(cell, str) and WHOLE.fullmatch(cell))):
        shifted = int(cell) - config.label_offset
        if not 0 <= shifted < config.num_classes:
            raise ValueError(
                f"task.data.num_classes={config.num_classes}: label {int(cell)} less task.data.label_offset="
                f"{config.label_offset} is {shifted}; 0..{config.num_classes - 1} is accepted; {part.where(index)}"
                + (UNLABELLED if int(cell) == -1 else "")
            )
        return shifted
    if part.names and isinstance(cell, int) and 0 <= cell < len(part.names):
        cell = part.names[cell]
    if isinstance(cell, str) and cell in place:
        return place[cell]
    known = ", ".join(map(repr, [*place][:10])) + (", ..." if len(place) > 10 else "")
    accepted = f"a column of classes ({known})" if place else "a column of whole numbers, or of names (texts)"
    hint = (
        UNLABELLED
        if cell == -1
        else ""
        if place or not isinstance(cell, str | float) or not _is_number(cell)
        else NOT_WHOLE
    )
    refuse("task.data.label", column, f"{accepted}; {part.where(index)} holds {cell!r}{hint}")


def _is_number(text: str | float) -> bool:
    """Whether a text reads as a number, whole or not: such texts are never names unless `class_names` says so."""
    try:
        float(text)
    except ValueError:
        return False
    return True
