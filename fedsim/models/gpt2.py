"""GPT-2: `GPT2LMHeadModel` and `GPT2ForSequenceClassification` (pre-LN, learned positions, causal attention).

Projections are `Conv1D`s, which hold the transpose of a linear layer's weight: dimension 0 reads, dimension 1 writes.
One of them, `c_attn`, holds queries, keys and values. The language-modelling head is the token embedding itself.
"""

from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from fedsim.models.family import Family, Form, Inputs
from fedsim.submodel import ParamSpec


PREFIX = "transformer.h."
QUERY_KEY_VALUE = "query:head head_dim + key:head head_dim + value:head head_dim"

OUTSIDE = {
    "transformer.wte.weight": ("", "embed"),
    "transformer.wpe.weight": ("", "embed"),
    "transformer.ln_f.weight": ("*embed",),
    "transformer.ln_f.bias": ("+embed",),
}

HEAD = {"score.weight": ("", "<embed")}  # of the classifier

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
    """Language model for data of kind "lm", classifier for "text"; dropout off, as in every family."""

    def check(self, form: Form, inputs: Inputs) -> None:
        if inputs.kind not in ("lm", "text"):
            raise ValueError(f"task.family='gpt2': reads texts, but the data are of kind {inputs.kind!r}")

    def build(self, form: Form, inputs: Inputs) -> GPT2LMHeadModel | GPT2ForSequenceClassification:
        self.check(form, inputs)
        assert inputs.vocab_size and inputs.max_length
        config = GPT2Config(
            vocab_size=inputs.vocab_size,
            n_positions=inputs.max_length,
            n_embd=form.width,
            n_layer=form.depth,
            n_head=form.heads,
            n_inner=form.inner,
            layer_norm_epsilon=EPSILON_TIMES_WIDTH / form.width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,  # a training step would copy every key and value
            bos_token_id=inputs.end_id,
            eos_token_id=inputs.end_id,
            pad_token_id=inputs.padding_id,
        )
        if inputs.kind == "lm":
            model = GPT2LMHeadModel(config)
            model.generation_config.use_cache = True  # whoever generates text with a saved model wants it fast
            return model
        config.num_labels = inputs.num_classes
        return GPT2ForSequenceClassification(config)

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        outside = OUTSIDE if inputs.kind == "lm" else OUTSIDE | HEAD
        blocks = {
            f"{PREFIX}{layer}.{role}": ParamSpec(dims, layer, role)
            for layer in range(form.depth)
            for role, dims in BLOCK.items()
        }
        return {name: ParamSpec(dims, None, name) for name, dims in outside.items()} | blocks


FAMILY = Gpt2()
