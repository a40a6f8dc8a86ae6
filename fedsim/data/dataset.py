"""What an experiment gets for its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.data.examples import Examples


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of one split.

    **Arguments:**

    - `inputs`: `pixel_values` uint8 `(N, C, H, W)`, or `input_ids` and `attention_mask` int64 `(N, L)`; for token
        classes also `labels` int64 `(N, L)`, `text.IGNORED` where a token carries none. Of prepared data, to ask for
        one reads all examples into memory: `examples` reads some.
    - `labels`: int64 `(N,)`; zeros where tokens are labelled, not examples.
    - `groups`: int64 `(N,)`, numbered alike in both splits; None where the data have no natural groups.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def examples(self, index: Tensor) -> dict[str, Tensor]:
        """The inputs of some examples. Of prepared data, images have the size that they are kept in, and texts end with
        the longest of these."""
        if isinstance(self.inputs, Examples):
            return self.inputs.rows(index.numpy())
        return {name: tensor[index] for name, tensor in self.inputs.items()}

    def select(self, rows: np.ndarray) -> "Split":
        """Some of the examples; of prepared data, nothing is read."""
        index = torch.from_numpy(np.array(rows, np.int64))  # a copy: torch would warn of what Ray holds
        inputs = self.inputs.select(index.numpy()) if isinstance(self.inputs, Examples) else self.examples(index)
        return Split(inputs, self.labels[index], None if self.groups is None else self.groups[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set. It is shared by all who load it in a process: read its tensors, do not write to them.

    **Arguments:**

    - `kind`: "image", "text", "tokens", "lm" or "mlm".
    - `num_classes`: how many there are among the labels of examples; 1 where tokens are labelled.
    - `vocab_size`: None for images.
    - `fingerprint`: sha256 over all examples and the tokenizer's special ids: the content that a run saw.
    - `tokenizer`: the one that was trained for these data; None where it came with them.
    - `class_names`: of classes, or tags, in order of their numbers; empty where neither data nor config name them.
    - `made`: what was made of what files held, for people; empty for embedded sets.
    """

    kind: str
    train: Split
    test: Split
    num_classes: int
    vocab_size: int | None
    fingerprint: str
    tokenizer: "PreTrainedTokenizerFast | None" = None
    class_names: tuple[str, ...] = ()
    made: str = ""
