"""Words with tags: files of them, their tokens, tasks on them, and a model that says what it is told."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from fedsim.data.config import DataConfig
from fedsim.data.dataset import Dataset
from fedsim.data.source import load
from fedsim.learning.task import IGNORED, Task, TaskConfig


NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OO, BP, IP, BL, IL = range(5)
NONE = IGNORED


def tagged(folder: Path, words: list[Any], tags: list[Any], split: str = "train", **columns: list[Any]) -> DataConfig:
    """A parquet file of one split, and the data it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"tokens": words, "ner_tags": tags, **columns}), folder / f"{split}.parquet")
    return DataConfig(
        str(folder), objective="token_classes", num_classes=5, class_names=NAMES, max_length=8, test_share=0.5
    )


def both(folder: Path, words: list[Any], tags: list[Any], **columns: list[Any]) -> DataConfig:
    """The same examples in the training and in the test split, in order."""
    tagged(folder, words, tags, "test", **columns)
    return tagged(folder, words, tags, "train", **columns)


def word_pieces(folder: Path) -> str:
    """BERT's kind of tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, good 5, ##ness 6, bad 7."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "##ness", "bad"]
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(str(folder))
    return str(folder)


class Knows(nn.Module):
    """Says of each token the class that a table has for its id."""

    def __init__(self, said: dict[int, int], classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(300, classes), requires_grad=False)
        for id_, class_ in said.items():
            self.logits[id_, class_] = math.log(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def tag_task(config: DataConfig) -> tuple[Task, Dataset]:
    data = load(config, None)
    return Task(TaskConfig(config, family="bert"), data), data
