"""A family outside the package, in one file: Qwen2, with Llama's blocks, biases on queries, keys and values alone."""

from transformers import PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from fedsim.core.submodel import ParamSpec
from fedsim.models.declare import chosen, refuse_foreign, refuse_head_size, refuse_kind, stacked
from fedsim.models.family import Family, Form, Inputs


EMBEDDING = {"model.embed_tokens.weight": ("=token", "embed")}

ENDING = {
    "model.norm.weight": ("*embed",),
    "lm_head.weight": ("=token", "<embed"),
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
    "post_attention_layernorm.weight": ("*embed",),
    "mlp.gate_proj.weight": ("mlp", "<embed"),
    "mlp.up_proj.weight": ("mlp", "<embed"),
    "mlp.down_proj.weight": ("embed", "<mlp"),
}

EPSILON_TIMES_WIDTH = 896 * 1e-6  # as in the smallest released model


class Qwen2(Family):
    """Language model, its head apart from the token embedding."""

    constants = ("hidden_act", "rope_parameters", "tie_word_embeddings", "use_sliding_window", "vocab_size")

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("tests.support.fifth_family", inputs, "lm")
        refuse_head_size("tests.support.fifth_family", form)
        chosen(inputs, {})

    def model_class(self, inputs: Inputs) -> type[Qwen2ForCausalLM]:
        return Qwen2ForCausalLM

    def config(self, form: Form, inputs: Inputs) -> Qwen2Config:
        assert inputs.vocab_size and inputs.max_length
        return Qwen2Config(
            vocab_size=inputs.vocab_size,
            max_position_embeddings=inputs.max_length,
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            num_key_value_heads=form.axes["kv_head"],
            intermediate_size=form.inner,
            rms_norm_eps=EPSILON_TIMES_WIDTH / form.width if form.norm_eps is None else float(form.norm_eps),
            use_cache=False,
            bos_token_id=inputs.end_id,
            eos_token_id=inputs.end_id,
            pad_token_id=inputs.padding_id,
        )

    def form(self, config: PretrainedConfig) -> Form:
        refuse_foreign(config, "qwen2")
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        return stacked(form, EMBEDDING, "model.layers.", BLOCK, ENDING)


FAMILY = Qwen2()
