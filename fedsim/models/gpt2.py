"""GPT-2: `GPT2LMHeadModel` and `GPT2ForSequenceClassification` (pre-LN, learned positions, causal attention).

Projections are `Conv1D`s, which hold the transpose of a linear layer's weight: dimension 0 reads, dimension 1 writes.
One of them, `c_attn`, holds queries, keys and values. The language-modelling head is the token embedding itself.
"""

from typing import TYPE_CHECKING

from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

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


PREFIX = "transformer.h."
QUERY_KEY_VALUE = "query:head head_dim + key:head head_dim + value:head head_dim"

EMBEDDINGS = {
    "transformer.wte.weight": ("=token", "embed"),
    "transformer.wpe.weight": ("", "embed"),
}

LAST_NORM = {
    "transformer.ln_f.weight": ("*embed",),
    "transformer.ln_f.bias": ("+embed",),
}

LAST_NORM_BEFORE_TIED_HEAD = {
    "transformer.ln_f.weight": ("*<embed",),
    "transformer.ln_f.bias": ("+<embed",),
}

HEADS = {
    "lm": {"lm_head.weight": ("=token", "<embed")},  # where it is not the token embedding
    "text": {"score.weight": ("=class", "<embed")},
}

BLOCK = {
    "ln_1.weight": ("*embed",),
    "ln_1.bias": ("+embed",),
    "attn.c_attn.weight": ("<embed", QUERY_KEY_VALUE),
    "attn.c_attn.bias": (QUERY_KEY_VALUE,),
    "attn.c_proj.weight": ("<value:head head_dim", "embed"),
    "attn.c_proj.bias": ("embed",),
    "ln_2.weight": ("*embed",),
    "ln_2.bias": ("+embed",),
    "mlp.c_fc.weight": ("<embed", "mlp"),
    "mlp.c_fc.bias": ("mlp",),
    "mlp.c_proj.weight": ("<mlp", "embed"),
    "mlp.c_proj.bias": ("embed",),
}

# The released models are 768 wide and add 1e-5 to the variance. A variance over D coordinates, of which the grown ones
# add nothing to the sum of squares, goes as 1/D; with an epsilon that goes the same way, growth preserves exactly.
EPSILON_TIMES_WIDTH = 768 * 1e-5


class Gpt2(Family):
    """Language model for data of kind "lm", classifier for "text"."""

    dropouts = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    constants = (
        "activation_function",
        "add_cross_attention",
        "n_positions",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "tie_word_embeddings",
        "vocab_size",
    )

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("gpt2", inputs, "lm", "text")
        refuse_grouped_queries("gpt2", form)
        refuse_head_size("gpt2", form)
        chosen(inputs, _accepted(inputs))

    def model_class(self, inputs: Inputs) -> type[GPT2LMHeadModel] | type[GPT2ForSequenceClassification]:
        return GPT2LMHeadModel if inputs.kind == "lm" else GPT2ForSequenceClassification

    def config(self, form: Form, inputs: Inputs) -> GPT2Config:
        config = GPT2Config(
            n_embd=form.width,
            n_layer=form.depth,
            n_head=form.heads,
            n_inner=form.inner,
            layer_norm_epsilon=EPSILON_TIMES_WIDTH / form.width if form.norm_eps is None else float(form.norm_eps),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,  # a training step would copy every key and value
            bos_token_id=inputs.end_id,
            eos_token_id=inputs.end_id,
            pad_token_id=inputs.padding_id,
            **chosen(inputs, _accepted(inputs)),
        )
        if inputs.kind == "text":
            config.num_labels = inputs.num_classes
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "gpt2")
        return Form(
            config.n_embd,
            config.n_layer,
            heads=config.n_head,
            mlp=4 * config.n_embd if config.n_inner is None else config.n_inner,
            kv_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
            norm_eps=config.layer_norm_epsilon,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        tied = inputs.kind == "lm" and dict(inputs.settings).get("tie_word_embeddings", True)
        ending = LAST_NORM_BEFORE_TIED_HEAD if tied else LAST_NORM | HEADS[inputs.kind]
        scaled = dict(inputs.settings).get(
            "scale_attn_by_inverse_layer_idx", False
        )  # attention goes by a block's number
        return stacked(form, EMBEDDINGS, PREFIX, BLOCK, ending, kind=str if scaled else lambda layer: "")


def _accepted(inputs: Inputs) -> dict[str, Accepted]:
    assert inputs.vocab_size and inputs.max_length
    return {
        "activation_function": ACTIVATIONS,
        "initializer_range": float,
        "n_positions": inputs.max_length,
        "scale_attn_by_inverse_layer_idx": bool,
        "scale_attn_weights": bool,
        "tie_word_embeddings": bool,
        "vocab_size": inputs.vocab_size,
    }


FAMILY = Gpt2()
