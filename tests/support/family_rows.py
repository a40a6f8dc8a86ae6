"""The families under test: one row for each kind of data a family has a model for, and small examples of that data."""

import dataclasses

import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.data.config import DataConfig, Split, digits, pydoc
from fedsim.data.text import BYTE_END, IGNORED, padded
from fedsim.learning.task import Batch, Task, TaskConfig
from fedsim.models import Form


LENGTH = 12
TAGS = DataConfig(
    "notes.parquet", text=("words",), label="tags", objective="token_classes", num_classes=3, max_length=LENGTH
)
TEXTS = DataConfig("notes.csv", text=("note",), label="kind", num_classes=3, max_length=LENGTH)
NEXT_TOKEN = pydoc(max_length=LENGTH)
MASKED_TOKEN = pydoc(max_length=LENGTH, objective="masked_token")


@dataclasses.dataclass(frozen=True)
class Row:
    """One family on one kind of data: a small form, and larger ones that differ from it in depth, width and heads."""

    config: TaskConfig
    small: Form = Form(16, 2, heads=2, mlp=24)
    deeper: Form = Form(16, 5, heads=2, mlp=24)
    wider: Form = Form(40, 2, heads=5, mlp=24)
    larger: Form = Form(48, 3, heads=4, mlp=52)

    @property
    def task(self) -> Task:
        return Task(self.config)

    @property
    def forms(self) -> tuple[Form, ...]:
        return self.small, self.deeper, self.wider, self.larger


def grouped(config: TaskConfig) -> Row:
    """A row of a family with grouped queries; rotary positions want one size of head in all forms."""
    return Row(
        config,
        Form(16, 2, heads=4, kv_heads=2, mlp=24),
        Form(16, 5, heads=4, kv_heads=2, mlp=24),
        Form(24, 2, heads=6, kv_heads=2, mlp=24),
        Form(48, 3, heads=12, kv_heads=4, mlp=52),
    )


ROWS = {
    "vit": Row(TaskConfig(digits(), "vit")),
    "bert-text": Row(TaskConfig(TEXTS, "bert")),
    "bert-tokens": Row(TaskConfig(TAGS, "bert")),
    "bert-mlm": Row(TaskConfig(MASKED_TOKEN, "bert")),
    "gpt2-lm": Row(TaskConfig(NEXT_TOKEN, "gpt2")),
    "gpt2-text": Row(TaskConfig(TEXTS, "gpt2")),
    "llama-lm": grouped(TaskConfig(NEXT_TOKEN, "llama")),
    "llama-lm-tied": grouped(TaskConfig(NEXT_TOKEN, "llama", settings=(("tie_word_embeddings", True),))),
    "llama-text": grouped(TaskConfig(TEXTS, "llama")),
    "fifth-lm": grouped(TaskConfig(NEXT_TOKEN, "tests.support.fifth_family")),
}


def random_tree(task: Task, form: Form) -> Tree:
    """Parameters in double precision none of which is what it starts as: biases are not 0, gains of norms are not 1."""
    generator = torch.Generator().manual_seed(0)
    tree = {}
    for name, tensor in task.fresh(form, 0).items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tree[name] = 0.5 + 0.5 * drawn if tensor.ndim == 1 else 0.3 * drawn
    return tree


def examples(task: Task, size: int = 7) -> Split:
    """Random examples; texts of every length from 2 tokens to no padding at all."""
    generator = torch.Generator().manual_seed(1)
    kind, classes = task.inputs.kind, task.inputs.num_classes
    labels = torch.arange(size) % (classes if kind in ("image", "text") else 1)
    if kind == "image":
        pixels = torch.randint(0, 256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
        return Split({"pixel_values": pixels}, labels)
    lengths = torch.linspace(2, LENGTH, size).long()
    texts = [torch.randint(0, 256, (int(length),), generator=generator) for length in lengths]
    for text in texts:
        text[-1] = BYTE_END
    inputs = padded([text.numpy() for text in texts], LENGTH)
    if kind == "tokens":
        tags = torch.randint(0, classes, inputs["input_ids"].shape, generator=generator)
        labelled = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != BYTE_END)
        inputs["labels"] = tags.masked_fill(~labelled, IGNORED)
    return Split(inputs, labels)


def batch_of(task: Task, split: Split | None = None) -> Batch:
    """All examples, images in double precision; always the same tokens are masked."""
    split = examples(task) if split is None else split
    batch = task.batch(split, torch.arange(len(split)), generator=torch.Generator().manual_seed(2))
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def model_inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def real(logits: Tensor, batch: Batch) -> Tensor:
    """Logits without those at padding, which nobody reads."""
    return logits[batch["attention_mask"] == 1] if logits.ndim == 3 else logits
