"""Llama: `LlamaForCausalLM` and `LlamaForSequenceClassification` (RMSNorm, rotary positions, gated MLP).

Each head of keys and values (`kv_head`) serves a `group` of heads of queries. Queries and keys are turned by their
positions in pairs of coordinates, each pair at a frequency of its own, so their coordinates are an axis that differs
from the values': `rotary`. The gate and what it lets through share one axis, `mlp`.
"""

from typing import TYPE_CHECKING

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fedsim.core.fields import refuse
from fedsim.core.submodel import ParamSpec
from fedsim.models.declare import ACTIVATIONS, Accepted, chosen, refuse_foreign, refuse_kind, stacked, without
from fedsim.models.family import Family, Form, Inputs


if TYPE_CHECKING:
    from transformers import PretrainedConfig


PREFIX = "model.layers."

EMBEDDING = {"model.embed_tokens.weight": ("=token", "embed")}

LAST_NORM = {"model.norm.weight": ("*embed",)}

LAST_NORM_BEFORE_TIED_HEAD = {"model.norm.weight": ("*<embed",)}

HEADS = {
    "lm": {"lm_head.weight": ("=token", "<embed")},  # where it is not the token embedding
    "text": {"score.weight": ("=class", "<embed")},
}

BLOCK = {
    "input_layernorm.weight": ("*embed",),
    "self_attn.q_proj.weight": ("query:kv_head group rotary", "<embed"),
    "self_attn.q_proj.bias": ("query:kv_head group rotary",),
    "self_attn.k_proj.weight": ("key:kv_head rotary", "<embed"),
    "self_attn.k_proj.bias": ("key:kv_head rotary",),
    "self_attn.v_proj.weight": ("value:kv_head head_dim", "<embed"),
    "self_attn.v_proj.bias": ("value:kv_head head_dim",),
    "self_attn.o_proj.weight": ("embed", "<value:kv_head group head_dim"),
    "self_attn.o_proj.bias": ("embed",),
    "post_attention_layernorm.weight": ("*embed",),
    "mlp.gate_proj.weight": ("mlp", "<embed"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.weight": ("mlp", "<embed"),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.weight": ("embed", "<mlp"),
    "mlp.down_proj.bias": ("embed",),
}

BIASES = {  # which setting brings them; there are none unless it says so
    "attention_bias": [f"self_attn.{letter}_proj.bias" for letter in "qkvo"],
    "mlp_bias": [f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")],
}

# Settings that are entries of the config's `rope_parameters`. Scalings that depend on how long the text at hand is are
# left out: they change the module with every batch.
ROTARY: dict[str, Accepted] = {
    "factor": float,
    "high_freq_factor": float,
    "low_freq_factor": float,
    "original_max_position_embeddings": int,
    "rope_theta": float,
    "rope_type": ("default", "linear", "llama3"),
}

# The released models are 4096 wide and add 1e-6 to the mean square. A mean square over D coordinates, of which the
# grown ones add nothing to the sum, goes as 1/D; with an epsilon that goes the same way, growth preserves exactly.
EPSILON_TIMES_WIDTH = 4096 * 1e-6


class Llama(Family):
    """Language model for data of kind "lm", its head apart from the token embedding; classifier for "text"."""

    dropouts = ("attention_dropout",)
    constants = ("attention_bias", "hidden_act", "mlp_bias", "rope_parameters", "tie_word_embeddings", "vocab_size")

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("llama", inputs, "lm", "text")
        if form.width % form.heads:  # LlamaConfig insists, whatever the size of a head
            refuse("form.heads", form.heads, f"a divisor of form.width={form.width}")
        if form.head_size % 2:
            refuse("form.head_dim", form.head_size, "even: rotary positions turn coordinates in pairs")
        try:
            self.config(form, inputs)
        except KeyError as error:  # an entry that this kind of scaling needs is missing
            raise ValueError(f"task.settings: {error.args[0]}") from error

    def model_class(self, inputs: Inputs) -> type[LlamaForCausalLM] | type[LlamaForSequenceClassification]:
        return LlamaForCausalLM if inputs.kind == "lm" else LlamaForSequenceClassification

    def config(self, form: Form, inputs: Inputs) -> LlamaConfig:
        fields = chosen(inputs, _accepted(inputs))
        rotary = {name: fields.pop(name) for name in ROTARY if name in fields}
        config = LlamaConfig(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            num_key_value_heads=form.axes["kv_head"],
            head_dim=form.head_size,
            intermediate_size=form.inner,
            rms_norm_eps=EPSILON_TIMES_WIDTH / form.width if form.norm_eps is None else float(form.norm_eps),
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rotary,
            use_cache=False,  # a training step would copy every key and value
            bos_token_id=inputs.end_id,
            eos_token_id=inputs.end_id,
            pad_token_id=inputs.padding_id,  # the classifier reads the last token that is not this one
            **fields,
        )
        if inputs.kind == "text":
            config.num_labels = inputs.num_classes
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "llama")
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm_eps=config.rms_norm_eps,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        settings = dict(inputs.settings)
        tied = inputs.kind == "lm" and settings.get("tie_word_embeddings", False)
        ending = LAST_NORM_BEFORE_TIED_HEAD if tied else LAST_NORM | HEADS[inputs.kind]
        absent = [bias for setting, biases in BIASES.items() if not settings.get(setting, False) for bias in biases]
        return stacked(form, EMBEDDING, PREFIX, without(BLOCK, absent), ending)


def _accepted(inputs: Inputs) -> dict[str, Accepted]:
    assert inputs.vocab_size and inputs.max_length
    return ROTARY | {
        "attention_bias": bool,
        "hidden_act": ACTIVATIONS,
        "initializer_range": float,
        "max_position_embeddings": inputs.max_length,
        "mlp_bias": bool,
        "tie_word_embeddings": bool,
        "vocab_size": inputs.vocab_size,
    }


FAMILY = Llama()
