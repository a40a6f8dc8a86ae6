"""Examples that lie in prepared files: rows are read as they are asked for, and held against their checksums."""

import math
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedsim.core.sealed import Damaged
from fedsim.data.text import IGNORED
from fedsim.data.vision import resized, stacked


INPUTS = PIXELS, IDS, TAGS = "pixel_values", "input_ids", "labels_of_tokens"


class Column:
    """The rows of one array in a file."""

    def __init__(self, path: Path, entry: Mapping[str, Any], checks: np.ndarray, lengths: np.ndarray | None) -> None:
        self.path, self.file = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.dtype, self.checks = np.dtype(entry["dtype"]), checks
        self.shape: tuple[int, ...] | None = None if lengths is not None else tuple(entry["shape"][1:])
        sizes = lengths if lengths is not None else np.full(len(checks), math.prod(entry["shape"][1:]))
        self.ends = np.concatenate([[0], np.cumsum(sizes)]) * self.dtype.itemsize
        if (size := os.fstat(self.file).st_size) != self.ends[-1]:
            raise Damaged(f"{path}: {size} bytes, not {self.ends[-1]}")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: prepared data do not travel; send what was read of them")

    def rows(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Copies of some rows. **Raises:** `Damaged` naming a file and a row that is not as it was written."""
        found = []
        for number, begin, end in zip(numbers, self.ends[numbers], self.ends[numbers + 1], strict=True):
            data = os.pread(self.file, end - begin, begin)
            if zlib.crc32(data) != self.checks[number]:
                cleaning = f"`fedsim data clean {self.path.parent.name[:12]}`"
                remedy = f"{cleaning} deletes it, and the next process prepares it anew"
                raise Damaged(f"{self.path}: row {number} is not as it was written; {remedy}")
            row = np.frombuffer(data, self.dtype)
            found.append(row if self.shape is None else row.reshape(self.shape))
        return found


@dataclass(frozen=True)
class Look:
    """How examples are handed out.

    - `image_size`: images that are asked for all at once are brought to it. - `max_length`: so are texts.
    - `padding`: the id that pads them.
    """

    image_size: int
    max_length: int
    padding: int | None


class Examples(Mapping[str, Tensor]):
    """Inputs of examples in files. As a mapping it has all of them as tensors, `(N, ...)`: for small sets.

    - `numbers`: which rows of the files, in order.
    """

    def __init__(self, columns: Mapping[str, Column], numbers: np.ndarray, look: Look) -> None:
        self.columns, self.numbers, self.look = columns, numbers.copy(), look
        self.numbers.flags.writeable = False  # a shard is what it is, whoever has it

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> list[str]:
        """`pixel_values`; or `input_ids` and `attention_mask`, for token classes also `labels`."""
        if PIXELS in self.columns:
            return [PIXELS]
        return [IDS, "attention_mask", *(["labels"] if TAGS in self.columns else [])]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        every = np.arange(len(self.numbers))
        if name == PIXELS:
            return resized(self.rows(every)[name], self.look.image_size)
        return self.rows(every, self.look.max_length)[name]

    def select(self, index: np.ndarray) -> "Examples":
        """Some of them: nothing is read."""
        return Examples(self.columns, self.numbers[index], self.look)

    def rows(self, index: np.ndarray, length: int | None = None) -> dict[str, Tensor]:
        """Some of them, read now: images of the size that they are kept in, texts padded to the longest of these, or to
        a `length`."""
        read = {name: column.rows(self.numbers[index]) for name, column in self.columns.items()}
        if PIXELS in read:
            shape = self.columns[PIXELS].shape
            assert shape is not None
            return {PIXELS: stacked(read[PIXELS], shape)}
        longest = length if length is not None else max(map(len, read[IDS]), default=0)
        assert self.look.padding is not None
        found = {IDS: _padded(read[IDS], longest, self.look.padding)}
        found["attention_mask"] = _padded([np.ones_like(ids) for ids in read[IDS]], longest, 0)
        if TAGS in read:
            found["labels"] = _padded(read[TAGS], longest, IGNORED)
        return found


def _padded(rows: Sequence[np.ndarray], length: int, padding: int) -> Tensor:
    """int64 `(N, length)`."""
    found = np.full((len(rows), length), padding, dtype=np.int64)
    for into, row in zip(found, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(found)
