"""The families under test: one row for each kind of data a family has a model for, and small examples of that data."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.data.config import DataConfig, digits, pydoc
from fedsim.data.dataset import Split
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

    @property
    def described(self) -> "Described":
        return next(d for name, d in FAMILIES.items() if self.config.family in (name, d.module))

    @property
    def rotary(self) -> bool:
        """Whether positions turn the coordinates of heads: rotation or its norms then compute in single precision."""
        specs = self.task.specs(self.small).values()
        return any("rotary" in dim.axes for spec in specs for dim in spec.parsed_parts)


@dataclasses.dataclass(frozen=True)
class Tied:
    """A head that is the token embedding: the embedding, the last normalisation before it, and its own second name."""

    embedding: str
    norm: str
    head: str | None  # None: the embedding itself is read


@dataclasses.dataclass(frozen=True)
class Described:
    """What the tests know of a family: all that has to be written here for a family more.

    - `data`: by the kind of model there is.
    - `block`: the modules of a block.
    - `epsilon`: by width, what its normalisations add to the variance.
    - `apart`: by kind, the group that is as wide as the residual stream and yet another axis.
    - `tied`: by kind, heads that are the token embedding.
    - `forms`: of its rows, where the usual ones do not suit it.
    - `settings`: of its rows' Hugging Face config.
    - `grown`: a still smaller form, which growth it allows and where that is exact (`tests/support/growing.py`).
    - `module`: where it is, if not in the package.
    """

    data: Mapping[str, DataConfig]
    block: str
    epsilon: Callable[[int], float]
    apart: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, Tied] = dataclasses.field(default_factory=dict)
    forms: tuple[Form, ...] = ()
    settings: tuple[tuple[str, str | int | float | bool], ...] = ()
    grown: tuple[Form, str, str] | None = None
    module: str | None = None


GROUPED = (  # rotary positions want one size of head in all forms
    Form(16, 2, heads=4, kv_heads=2, mlp=24),
    Form(16, 5, heads=4, kv_heads=2, mlp=24),
    Form(24, 2, heads=6, kv_heads=2, mlp=24),
    Form(48, 3, heads=12, kv_heads=4, mlp=52),
)
WHOLE_HEADS = (  # the same, where the heads share the width
    Form(16, 2, heads=4, mlp=24),
    Form(16, 5, heads=4, mlp=24),
    Form(32, 2, heads=8, mlp=24),
    Form(48, 3, heads=12, mlp=52),
)
ENCODED = {"text": TEXTS, "tokens": TAGS, "mlm": MASKED_TOKEN}
EPS = 1e-3  # of the forms that grow: large, so that what becomes of it shows

FAMILIES = {
    "vit": Described(
        {"image": digits()},
        "attention.q_proj attention.k_proj attention.v_proj attention.o_proj layernorm_before layernorm_after "
        "mlp.fc1 mlp.fc2",
        epsilon=lambda width: 1e-12,
        grown=(Form(8, 2, heads=2, mlp=16, head_dim=4, norm_eps=EPS), "heads of any size", "before blocks"),
    ),
    "bert": Described(
        ENCODED,
        "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm",
        epsilon=lambda width: 1e-12,
        apart={"text": "pooled", "mlm": "transform"},
        tied={
            "mlm": Tied(
                "bert.embeddings.word_embeddings.weight",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder.weight",
            )
        },
        grown=(Form(8, 2, heads=2, mlp=16, norm_eps=EPS), "heads share the width", "after blocks"),
    ),
    "gpt2": Described(
        {"lm": NEXT_TOKEN, "text": TEXTS},
        "ln_1 attn.c_attn/query attn.c_attn/key attn.c_attn/value attn.c_proj ln_2 mlp.c_fc mlp.c_proj",
        epsilon=lambda width: 768 * 1e-5 / width,
        tied={"lm": Tied("transformer.wte.weight", "transformer.ln_f", "lm_head.weight")},
        grown=(Form(8, 2, heads=2, mlp=16, norm_eps=EPS), "heads share the width", "before blocks"),
    ),
    "llama": Described(
        {"lm": NEXT_TOKEN, "text": TEXTS},
        "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
        epsilon=lambda width: 4096 * 1e-6 / width,
        forms=GROUPED,
        grown=(
            Form(12, 2, heads=4, mlp=24, kv_heads=2, head_dim=4, norm_eps=EPS),
            "grouped queries",
            "before blocks",
        ),
    ),
    "deberta": Described(
        ENCODED,
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense "
        "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm",
        epsilon=lambda width: 1e-7,
        apart={"text": "pooled", "mlm": "transform"},
        tied={"mlm": Tied("deberta.embeddings.word_embeddings.weight", "lm_predictions.lm_head.LayerNorm", None)},
        grown=(Form(8, 2, heads=2, mlp=16, norm_eps=EPS), "heads share the width", "after blocks"),
    ),
    "modernbert": Described(
        ENCODED,
        "attn.Wqkv/query attn.Wqkv/key attn.Wqkv/value attn.Wo mlp_norm mlp.Wi/mlp1 mlp.Wi/mlp2 mlp.Wo attn_norm",
        epsilon=lambda width: 1e-5,
        apart={"text": "pooled", "tokens": "pooled", "mlm": "transform"},
        tied={"mlm": Tied("model.embeddings.tok_embeddings.weight", "head.norm", "decoder.weight")},
        forms=WHOLE_HEADS,
        settings=(("local_attention", 4),),  # two tokens on each side: a local block is not as a global one
        grown=(Form(8, 2, heads=2, mlp=16, norm_eps=EPS), "whole heads share the width", "on normalised embeddings"),
    ),
    "fifth": Described(
        {"lm": NEXT_TOKEN},
        "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
        epsilon=lambda width: 896 * 1e-6 / width,
        forms=GROUPED,
        module="tests.support.fifth_family",
    ),
}

ROWS = {
    name if kind == "image" else f"{name}-{kind}": Row(
        TaskConfig(data, described.module or name, settings=described.settings), *described.forms
    )
    for name, described in FAMILIES.items()
    for kind, data in described.data.items()
} | {
    "llama-lm-tied": Row(TaskConfig(NEXT_TOKEN, "llama", settings=(("tie_word_embeddings", True),)), *GROUPED),
}
TIED = {f"{name}-{kind}": tied for name, described in FAMILIES.items() for kind, tied in described.tied.items()} | {
    "llama-lm-tied": Tied("model.embed_tokens.weight", "model.norm", "lm_head.weight"),
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
