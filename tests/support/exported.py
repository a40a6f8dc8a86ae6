"""Models that tests export for some data, and the tokenizers and pictures that go with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from fedsim.data.config import DataConfig, digits
from fedsim.learning.task import TaskConfig
from fedsim.results import export
from tests.support.family_rows import MASKED_TOKEN, NEXT_TOKEN, TAGS, TEXTS, Row


ONE_OF_A_KIND = {"image": digits(), "text": TEXTS, "tokens": TAGS, "lm": NEXT_TOKEN, "mlm": MASKED_TOKEN}
WORDS = ["good", "bad", "##ly", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def random_model(row: Row) -> Any:
    """A model of the row's small form in which nothing is what it starts as."""
    generator = torch.Generator().manual_seed(0)
    fresh = row.task.fresh(row.small, 0)
    tree = {name: 0.4 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}
    return row.task.module(row.small, tree)


def written(config: TaskConfig, to: Path, readme: str = "") -> Any:
    """Write a random model for some data; the model."""
    model = random_model(Row(config))
    export.write(model, config.data, readme, to)
    return model


def logits_of_the_reloaded(model: Any, config: TaskConfig, pixels: Tensor, to: Path) -> Tensor:
    """Export a model of images, load it with plain `transformers`, and ask it."""
    export.write(model, config.data, "", to)
    with torch.no_grad():
        return transformers.AutoModelForImageClassification.from_pretrained(to)(pixels).logits


def task_of(data: DataConfig) -> TaskConfig:
    """Data with a family that has a model for them."""
    return TaskConfig(data, {"image": "vit", "lm": "gpt2"}.get(data.kind, "bert"))


def word_pieces(folder: Path) -> str:
    """BERT's tokenizer with few words: texts are framed, and tokens have types."""
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("good")
    return str(folder)


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Noise, every value of a byte among it."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values.flat[:256] = np.arange(256)
    return Image.fromarray(values)
