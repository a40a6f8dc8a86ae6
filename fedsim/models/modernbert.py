"""ModernBERT: `ModernBertForSequenceClassification`, `...ForTokenClassification`, `...ForMaskedLM`.

Pre-LN, rotary positions, a gated MLP; one matrix (`Wqkv`) holds queries, keys and values, one (`Wi`) the MLP's gate and
what it lets through. Norms subtract the mean and have no shift. Every third block attends to the whole text, the others
to the neighbourhood of each token and with another speed of rotation: blocks of two kinds. Block 0 reads the normalised
embeddings, the residual stream itself, without a norm of its own.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
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
)
from fedsim.models.family import Family, Form, Inputs


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


PREFIX = "model.layers."
EVERY = 3  # blocks, of which the first attends to the whole text, as in every released model

EMBEDDING = {
    "model.embeddings.tok_embeddings.weight": ("=token", "embed"),
    "model.embeddings.norm.weight": ("*-embed",),
}

BLOCK = {
    "attn_norm.weight": ("*-embed",),  # but for block 0
    "attn.Wqkv.weight": ("query:kv_head rotary + key:kv_head rotary + value:kv_head head_dim", "<embed"),
    "attn.Wo.weight": ("embed", "<value:kv_head head_dim"),
    "mlp_norm.weight": ("*-embed",),
    "mlp.Wi.weight": ("mlp + mlp", "<embed"),
    "mlp.Wo.weight": ("embed", "<mlp"),
}

LAST_NORM = {"model.final_norm.weight": ("*-embed",)}

CLASSIFIER = LAST_NORM | {
    "head.dense.weight": ("pooled:embed", "<embed"),
    "head.norm.weight": ("*-pooled:embed",),
    "classifier.weight": ("=class", "<pooled:embed"),
    "classifier.bias": ("=class",),
}

TIED_DECODER = LAST_NORM | {
    "head.dense.weight": ("transform:embed", "<embed"),
    "head.norm.weight": ("*-<transform:embed",),
    "decoder.bias": ("=token",),
}

OWN_DECODER = TIED_DECODER | {
    "head.norm.weight": ("*-transform:embed",),
    "decoder.weight": ("=token", "<transform:embed"),
}

CLASSES = {
    "text": ModernBertForSequenceClassification,
    "tokens": ModernBertForTokenClassification,
    "mlm": ModernBertForMaskedLM,
}

# Settings that are entries of the config's `rope_parameters`, and of which kind of block.
ROTARY = {"global_rope_theta": "full_attention", "local_rope_theta": "sliding_attention"}
THETAS = {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}

# Which biases there are, in every released model.
BIASES = {
    "attention_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "mlp_bias": False,
    "norm_bias": False,
}


class ModernBert(Family):
    """Classifier of texts ("text") or of their tokens ("tokens"), or finder of masked tokens ("mlm")."""

    dropouts = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
    constants = (
        "classifier_activation",
        "classifier_pooling",
        "hidden_activation",
        "local_attention",
        "tie_word_embeddings",
        "vocab_size",
    )

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("modernbert", inputs, *CLASSES)
        refuse_grouped_queries("modernbert", form)
        refuse_head_size("modernbert", form)
        if form.head_size % 2:
            refuse("form.head_dim", form.head_size, "even: rotary positions turn coordinates in pairs")
        window = chosen(inputs, _accepted(inputs)).get("local_attention", 2)
        if window < 2:
            refuse("task.settings.local_attention", window, "a whole number, and at least 2: one token on each side")

    def model_class(self, inputs: Inputs) -> "type[PreTrainedModel]":
        return CLASSES[inputs.kind]

    def config(self, form: Form, inputs: Inputs) -> ModernBertConfig:
        fields: dict[str, Any] = THETAS | chosen(inputs, _accepted(inputs))
        rotary: Any = {kind: {"rope_type": "default", "rope_theta": fields.pop(name)} for name, kind in ROTARY.items()}
        config = ModernBertConfig(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            intermediate_size=form.inner,
            norm_eps=1e-5 if form.norm_eps is None else float(form.norm_eps),
            layer_types=[_kind(layer) for layer in range(form.depth)],
            rope_parameters=rotary,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            mlp_dropout=0.0,
            classifier_dropout=0.0,
            bos_token_id=inputs.end_id,
            cls_token_id=inputs.end_id,
            eos_token_id=inputs.end_id,
            sep_token_id=inputs.end_id,
            pad_token_id=inputs.padding_id,
            **BIASES,
            **fields,
        )
        if inputs.kind != "mlm":
            config.num_labels = inputs.num_classes
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "modernbert")
        for name, there in BIASES.items():
            if getattr(config, name) != there:
                refuse(f"config.{name}", getattr(config, name), f"{there}, as in every released model")
        for kind, rotary in config.rope_parameters.items():
            if rotary["rope_type"] != "default":
                refuse(f"config.rope_parameters.{kind}.rope_type", rotary["rope_type"], "'default'")
        if config.layer_types != [_kind(layer) for layer in range(config.num_hidden_layers)]:
            accepted = f"'full_attention' in block 0 and every {EVERY}rd from there, else 'sliding_attention'"
            refuse("config.layer_types", config.layer_types, accepted)
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_eps=config.norm_eps,
        )

    def shared(self, config: "PretrainedConfig") -> dict[str, Any]:
        thetas = {name: config.rope_parameters[kind]["rope_theta"] for name, kind in ROTARY.items()}
        return super().shared(config) | thetas

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        tied = dict(inputs.settings).get("tie_word_embeddings", True)
        ending = CLASSIFIER if inputs.kind != "mlm" else TIED_DECODER if tied else OWN_DECODER
        specs = stacked(form, EMBEDDING, PREFIX, BLOCK, ending, kind=_kind)
        del specs[f"{PREFIX}0.attn_norm.weight"]
        return specs


def _kind(layer: int) -> str:
    return "sliding_attention" if layer % EVERY else "full_attention"


def _accepted(inputs: Inputs) -> dict[str, Accepted]:
    assert inputs.vocab_size and inputs.max_length
    return {
        "classifier_activation": ACTIVATIONS,
        "classifier_pooling": ("cls", "mean"),
        "global_rope_theta": float,
        "hidden_activation": ACTIVATIONS,
        "initializer_range": float,
        "local_attention": int,
        "local_rope_theta": float,
        "max_position_embeddings": inputs.max_length,
        "tie_word_embeddings": bool,
        "vocab_size": inputs.vocab_size,
    }


FAMILY = ModernBert()
