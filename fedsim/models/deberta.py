"""DeBERTa-v2 as released in version 3: `DebertaV2ForSequenceClassification`, `...TokenClassification`, `...MaskedLM`.

Post-LN like BERT. Positions are relative: queries and keys are also taken of one table for all blocks, which so has the
axis of the residual stream, and stands before the blocks with a normalisation of its own.

Masked tokens are found by the head of the released models (`legacy=False`), which reads the token embeddings
themselves; a checkpoint with the other head counts as one without.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
)

from fedsim.core.fields import refuse
from fedsim.core.submodel import ParamSpec
from fedsim.models.declare import (
    ACTIVATIONS,
    Accepted,
    chosen,
    refuse_foreign,
    refuse_grouped_queries,
    refuse_head_size,
    refuse_kind,
    stacked,
    without,
)
from fedsim.models.family import Family, Form, Inputs


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


PREFIX = "deberta.encoder.layer."
POSITIONS = "deberta.embeddings.position_embeddings.weight"
TYPES = "deberta.embeddings.token_type_embeddings.weight"

EMBEDDINGS = {
    "deberta.embeddings.word_embeddings.weight": ("=token", "embed"),
    POSITIONS: ("", "embed"),
    TYPES: ("", "embed"),
    "deberta.embeddings.LayerNorm.weight": ("*embed",),
    "deberta.embeddings.LayerNorm.bias": ("+embed",),
    "deberta.encoder.rel_embeddings.weight": ("", "embed"),
    "deberta.encoder.LayerNorm.weight": ("*embed",),
    "deberta.encoder.LayerNorm.bias": ("+embed",),
}

BLOCK = {
    "attention.self.query_proj.weight": ("query:head head_dim", "<embed"),
    "attention.self.query_proj.bias": ("query:head head_dim",),
    "attention.self.key_proj.weight": ("key:head head_dim", "<embed"),
    "attention.self.key_proj.bias": ("key:head head_dim",),
    "attention.self.value_proj.weight": ("value:head head_dim", "<embed"),
    "attention.self.value_proj.bias": ("value:head head_dim",),
    "attention.output.dense.weight": ("embed", "<value:head head_dim"),
    "attention.output.dense.bias": ("embed",),
    "attention.output.LayerNorm.weight": ("*embed",),
    "attention.output.LayerNorm.bias": ("+embed",),
    "intermediate.dense.weight": ("mlp", "<embed"),
    "intermediate.dense.bias": ("mlp",),
    "output.dense.weight": ("embed", "<mlp"),
    "output.dense.bias": ("embed",),
    "output.LayerNorm.weight": ("*embed",),
    "output.LayerNorm.bias": ("+embed",),
}

HEADS = {
    "text": {
        "pooler.dense.weight": ("pooled:embed", "<embed"),
        "pooler.dense.bias": ("pooled:embed",),
        "classifier.weight": ("=class", "<pooled:embed"),
        "classifier.bias": ("=class",),
    },
    "tokens": {
        "classifier.weight": ("=class", "<embed"),
        "classifier.bias": ("=class",),
    },
    "mlm": {
        "lm_predictions.lm_head.dense.weight": ("transform:embed", "<embed"),
        "lm_predictions.lm_head.dense.bias": ("transform:embed",),
        "lm_predictions.lm_head.LayerNorm.weight": ("*<transform:embed",),
        "lm_predictions.lm_head.LayerNorm.bias": ("+<transform:embed",),
        "lm_predictions.lm_head.bias": ("=token",),
    },
}

CLASSES = {
    "text": DebertaV2ForSequenceClassification,
    "tokens": DebertaV2ForTokenClassification,
    "mlm": DebertaV2ForMaskedLM,
}

# What all released models of version 3 have.
RELEASED = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,  # else positions have projections of their own
    "norm_rel_ebd": "layer_norm",
}


class DebertaV2(Family):
    """Classifier of texts ("text") or of their tokens ("tokens"), or finder of masked tokens ("mlm")."""

    post_norm = True
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout")
    constants = (
        "hidden_act",
        "max_position_embeddings",
        "pooler_hidden_act",
        "position_biased_input",
        "position_buckets",
        "type_vocab_size",
        "vocab_size",
    )

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("deberta", inputs, *CLASSES)
        refuse_grouped_queries("deberta", form)
        refuse_head_size("deberta", form)
        buckets = chosen(inputs, _accepted(inputs)).get("position_buckets", 2)
        if buckets < 2:
            refuse("task.settings.position_buckets", buckets, "a whole number, and at least 2")

    def model_class(self, inputs: Inputs) -> "type[PreTrainedModel]":
        return CLASSES[inputs.kind]

    def config(self, form: Form, inputs: Inputs) -> DebertaV2Config:
        fields: dict[str, Any] = RELEASED | {"position_biased_input": False, "position_buckets": 256}
        fields |= chosen(inputs, _accepted(inputs))
        config = DebertaV2Config(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            intermediate_size=form.inner,
            layer_norm_eps=1e-7 if form.norm_eps is None else float(form.norm_eps),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pooler_dropout=0.0,
            pad_token_id=inputs.padding_id,
            legacy=False,
            **fields,
        )
        if inputs.kind != "mlm":
            config.num_labels = inputs.num_classes
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "deberta-v2")
        fields = {"share_att_key": False, "norm_rel_ebd": "none"} | config.to_dict()  # where it names neither
        fields["pos_att_type"] = sorted(fields["pos_att_type"] or [], reverse=True)
        for name, value in RELEASED.items():
            if fields[name] != value:
                refuse(f"config.{name}", fields[name], f"{value!r}, as in every released model of version 3")
        if fields.get("conv_kernel_size", 0):
            refuse("config.conv_kernel_size", fields["conv_kernel_size"], "0: a convolution has no named axes")
        for name in ("embedding_size", "pooler_hidden_size"):
            if fields.get(name, config.hidden_size) != config.hidden_size:
                refuse(f"config.{name}", fields[name], f"config.hidden_size={config.hidden_size}")
        if config.max_relative_positions not in (-1, config.max_position_embeddings):
            accepted = f"config.max_position_embeddings={config.max_position_embeddings}, or -1"
            refuse("config.max_relative_positions", config.max_relative_positions, accepted)
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_attention_heads,
            head_dim=fields.get("attention_head_size", config.hidden_size // config.num_attention_heads),
            norm_eps=config.layer_norm_eps,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        settings = dict(inputs.settings)
        wanted = {POSITIONS: settings.get("position_biased_input"), TYPES: settings.get("type_vocab_size")}
        embeddings = without(EMBEDDINGS, [name for name, there in wanted.items() if not there])
        return stacked(form, embeddings, PREFIX, BLOCK, HEADS[inputs.kind])


def _accepted(inputs: Inputs) -> dict[str, Accepted]:
    assert inputs.vocab_size and inputs.max_length
    return {
        "hidden_act": ACTIVATIONS,
        "initializer_range": float,
        "max_position_embeddings": inputs.max_length,
        "pooler_hidden_act": ACTIVATIONS,
        "position_biased_input": bool,
        "position_buckets": int,
        "type_vocab_size": 0,
        "vocab_size": inputs.vocab_size,
    }


FAMILY = DebertaV2()
