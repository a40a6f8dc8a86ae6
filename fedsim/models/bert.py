"""BERT: `BertForSequenceClassification`, `BertForTokenClassification`, `BertForMaskedLM` (post-LN, learned positions).

What follows the blocks depends on the data. A text is classified by its first token, through a pooler whose output has
an axis of its own; a token by what the last block says of it; a masked token is found by a transform whose output,
again an axis of its own, is compared with the token embeddings themselves.
"""

from typing import TYPE_CHECKING

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

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
)
from fedsim.models.family import Family, Form, Inputs


if TYPE_CHECKING:
    from transformers import PretrainedConfig


PREFIX = "bert.encoder.layer."

EMBEDDINGS = {
    "bert.embeddings.word_embeddings.weight": ("=token", "embed"),
    "bert.embeddings.position_embeddings.weight": ("", "embed"),
    "bert.embeddings.token_type_embeddings.weight": ("", "embed"),
    "bert.embeddings.LayerNorm.weight": ("*embed",),
    "bert.embeddings.LayerNorm.bias": ("+embed",),
}

BLOCK = {
    "attention.self.query.weight": ("query:head head_dim", "<embed"),
    "attention.self.query.bias": ("query:head head_dim",),
    "attention.self.key.weight": ("key:head head_dim", "<embed"),
    "attention.self.key.bias": ("key:head head_dim",),
    "attention.self.value.weight": ("value:head head_dim", "<embed"),
    "attention.self.value.bias": ("value:head head_dim",),
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

TEXT_HEAD = {
    "bert.pooler.dense.weight": ("pooled:embed", "<embed"),
    "bert.pooler.dense.bias": ("pooled:embed",),
    "classifier.weight": ("=class", "<pooled:embed"),
    "classifier.bias": ("=class",),
}

TOKENS_HEAD = {
    "classifier.weight": ("=class", "<embed"),
    "classifier.bias": ("=class",),
}

TRANSFORM = {
    "cls.predictions.transform.dense.weight": ("transform:embed", "<embed"),
    "cls.predictions.transform.dense.bias": ("transform:embed",),
    "cls.predictions.bias": ("=token",),
}

TIED_DECODER = TRANSFORM | {
    "cls.predictions.transform.LayerNorm.weight": ("*<transform:embed",),
    "cls.predictions.transform.LayerNorm.bias": ("+<transform:embed",),
}

OWN_DECODER = TRANSFORM | {
    "cls.predictions.transform.LayerNorm.weight": ("*transform:embed",),
    "cls.predictions.transform.LayerNorm.bias": ("+transform:embed",),
    "cls.predictions.decoder.weight": ("=token", "<transform:embed"),
    "cls.predictions.decoder.bias": ("=token",),
}

HEADS = {"text": TEXT_HEAD, "tokens": TOKENS_HEAD, "mlm": TIED_DECODER}

CLASSES = {
    "text": BertForSequenceClassification,
    "tokens": BertForTokenClassification,
    "mlm": BertForMaskedLM,
}


class Bert(Family):
    """Classifier of texts ("text") or of their tokens ("tokens"), or finder of masked tokens ("mlm")."""

    post_norm = True
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    constants = (
        "add_cross_attention",
        "hidden_act",
        "is_decoder",
        "max_position_embeddings",
        "tie_word_embeddings",
        "type_vocab_size",
        "vocab_size",
    )

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("bert", inputs, *CLASSES)
        refuse_grouped_queries("bert", form)
        refuse_head_size("bert", form)
        chosen(inputs, _accepted(inputs))

    def model_class(
        self, inputs: Inputs
    ) -> type[BertForSequenceClassification] | type[BertForTokenClassification] | type[BertForMaskedLM]:
        return CLASSES[inputs.kind]

    def config(self, form: Form, inputs: Inputs) -> BertConfig:
        config = BertConfig(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            intermediate_size=form.inner,
            layer_norm_eps=1e-12 if form.norm_eps is None else float(form.norm_eps),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=inputs.padding_id,
            **chosen(inputs, _accepted(inputs)),
        )
        if inputs.kind != "mlm":
            config.num_labels = inputs.num_classes
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "bert")
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_eps=config.layer_norm_eps,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        untied = inputs.kind == "mlm" and not dict(inputs.settings).get("tie_word_embeddings", True)
        head = OWN_DECODER if untied else HEADS[inputs.kind]
        return stacked(form, EMBEDDINGS, PREFIX, BLOCK, head)


def _accepted(inputs: Inputs) -> dict[str, Accepted]:
    assert inputs.vocab_size and inputs.max_length
    return {
        "hidden_act": ACTIVATIONS,
        "initializer_range": float,
        "max_position_embeddings": inputs.max_length,
        "tie_word_embeddings": bool,
        "type_vocab_size": 2,  # the first and the second text of a pair, as in every released model
        "vocab_size": inputs.vocab_size,
    }


FAMILY = Bert()
