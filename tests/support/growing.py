"""Tiny models of every family in double precision, no bias, gain or shift of which is what it starts as; their growth.

Which presets keep the function of a small model is written out here from the literature's table, not asked of them.
"""

import dataclasses
import functools
import types

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedgrow_algo.ligo import Operator, Preset
from fedgrow_algo.presets import by_name
from fedsim.core.tree import Tree
from fedsim.models import Form, Inputs, get_family


EPS = 1e-3  # large, so that what becomes of it shows
TEXTS = functools.partial(Inputs, vocab_size=20, max_length=8, padding_id=0, end_id=1)
BIASES, TIED, UNTIED = (
    (("attention_bias", True), ("mlp_bias", True)),
    ("tie_word_embeddings", True),
    ("tie_word_embeddings", False),
)

MODELS = {  # the first part of a name is the family
    "vit": Inputs("image", 3, image_size=8, channels=1, patch_size=4),
    "gpt2-lm": TEXTS("lm", 1),
    "gpt2-untied": TEXTS("lm", 1, settings=(UNTIED,)),
    "gpt2-text": TEXTS("text", 3),
    "gpt2-by-number": TEXTS("lm", 1, settings=(("scale_attn_by_inverse_layer_idx", True),)),
    "llama-lm": TEXTS("lm", 1),
    "llama-tied": TEXTS("lm", 1, settings=(TIED, *BIASES)),
    "llama-text": TEXTS("text", 3, settings=BIASES),
    "bert-text": TEXTS("text", 3),
    "bert-mlm": TEXTS("mlm", 1, mask_id=2),
    "bert-untied": TEXTS("mlm", 1, mask_id=2, settings=(UNTIED,)),
    "bert-tokens": TEXTS("tokens", 3),
}
MAIN = ("vit", "gpt2-lm", "llama-lm", "llama-tied", "bert-text", "bert-mlm")

SMALL = {
    "vit": Form(8, 2, heads=2, mlp=16, head_dim=4, norm_eps=EPS),
    "gpt2": Form(8, 2, heads=2, mlp=16, norm_eps=EPS),
    "bert": Form(8, 2, heads=2, mlp=16, norm_eps=EPS),
    "llama": Form(12, 2, heads=4, mlp=24, kv_heads=2, head_dim=4, norm_eps=EPS),
}
HEADS_SHARE_THE_WIDTH = {
    "mlp": {"mlp": 20},
    "mlp x2": {"mlp": 32},
    "residual": {"width": 12, "heads": 3},
    "residual x2": {"width": 16, "heads": 4},
    "residual x2, larger heads": {"width": 16},
    "deeper": {"depth": 5},
    "all x2": {"width": 16, "depth": 3, "heads": 4, "mlp": 32},
    "all": {"width": 15, "depth": 4, "heads": 3, "mlp": 21},
}
GROWTH = {
    "gpt2": HEADS_SHARE_THE_WIDTH,
    "bert": HEADS_SHARE_THE_WIDTH,
    "vit": {
        "mlp": {"mlp": 20},
        "mlp x2": {"mlp": 32},
        "heads": {"heads": 3},
        "heads x2": {"heads": 4},
        "larger heads": {"head_dim": 6},
        "residual": {"width": 12},
        "residual x2": {"width": 16},
        "deeper": {"depth": 5},
        "all x2": {"width": 16, "depth": 3, "heads": 4, "mlp": 32},
        "all": {"width": 15, "depth": 4, "heads": 3, "head_dim": 5, "mlp": 21},
    },
    "llama": {
        "mlp": {"mlp": 30},
        "mlp x2": {"mlp": 48},
        "heads": {"heads": 6, "kv_heads": 3},
        "queries a group": {"heads": 6},
        "heads x2": {"heads": 12},  # queries a group times three
        "residual": {"width": 20},
        "residual x2": {"width": 24},
        "deeper": {"depth": 5},
        "all x2": {"width": 24, "depth": 3, "heads": 8, "kv_heads": 4, "mlp": 48},
        "all": {"width": 30, "depth": 4, "heads": 6, "kv_heads": 3, "mlp": 30},
    },
}

INNER = {"mlp", "mlp x2", "heads", "heads x2", "queries a group", "larger heads"}
COPIES = INNER | {"residual x2", "residual x2, larger heads"}
EVERYTHING = COPIES | {"residual", "deeper", "all x2", "all"}
WHOLE = {"mlp x2", "heads x2", "residual x2", "deeper", "all x2"}

EXACT_BEFORE_BLOCKS = {  # pre-norm: which growth leaves the function as it was
    "preserving": EVERYTHING,
    "net2net": COPIES,
    "stacking": COPIES,
    "interlacing": COPIES,
    "zero-block": COPIES | {"deeper", "all x2"},
    "hypercloning": WHOLE,
}
EXACT_AFTER_BLOCKS = {  # post-norm
    "preserving": COPIES,
    "net2net": COPIES,
    "stacking": COPIES,
    "interlacing": COPIES,
    "zero-block": COPIES,
    "hypercloning": COPIES & WHOLE,
}
ACCEPTED = {  # of the growth above, unless heads are rotary; by presets that are not named, all
    "paper-chunked": {"heads", "heads x2", "larger heads", "deeper", "all x2"},
    "hypercloning": WHOLE,
}
MIX_HEADS = {"paper", "paper-untied", "paper-chunked", "ligo"}  # which rotary positions forbid


def family(model: str) -> str:
    return model.partition("-")[0]


def small(model: str) -> Form:
    return SMALL[family(model)]


def large(model: str, growth: str, preset: str) -> Form:
    """The grown form, with the epsilon at which growth is exact, if it ever is.

    A variance goes as 1/D where coordinates that are added do not add to the sum of squares, and stays where they are
    copies.
    """
    old = small(model)
    new = dataclasses.replace(old, **GROWTH[family(model)][growth])
    shrinks = preset == "preserving" and not get_family(family(model)).post_norm
    return dataclasses.replace(new, norm_eps=EPS * old.width / new.width if shrinks else EPS)


def exact(model: str, growth: str, preset: str) -> bool:
    table = EXACT_AFTER_BLOCKS if get_family(family(model)).post_norm else EXACT_BEFORE_BLOCKS
    return growth in table.get(preset, set())


def accepted(model: str, growth: str, preset: str) -> bool:
    if family(model) == "llama" and preset in MIX_HEADS:
        return False
    return growth in ACCEPTED.get(preset, EVERYTHING)


def operator_between(preset: Preset | str, model: str, old: Form, new: Form) -> Operator:
    of_family = get_family(family(model))
    old_specs, new_specs = (of_family.specs(form, MODELS[model]) for form in (old, new))
    preset = by_name(preset) if isinstance(preset, str) else preset
    return Operator(preset, old_specs, new_specs, old.axes, new.axes, of_family.post_norm)


def start(operator: Operator, seed: int = 1) -> Tree:
    return operator.init(torch.Generator().manual_seed(seed), torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(operator: Operator, by: float = 0.1) -> Tree:
    """Tensors of the operator a little away from its start, where nothing is equal or zero by chance."""
    return {name: t + by * random(*t.shape, seed=i) for i, (name, t) in enumerate(start(operator).items())}


def anywhere(operator: Operator) -> Tree:
    """Tensors of the operator far away from any start."""
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(operator.shapes.items())}


@functools.cache
def module(model: str, form: Form) -> nn.Module:
    """The Hugging Face module, frozen, its RMSNorms in the precision of their input instead of single precision."""
    built = get_family(family(model)).build(form, MODELS[model]).double().eval().requires_grad_(False)
    for part in built.modules():
        if isinstance(part, LlamaRMSNorm):
            part.forward = types.MethodType(_rms_norm, part)
    return built


def _rms_norm(norm: LlamaRMSNorm, x_BTD: Tensor) -> Tensor:
    return norm.weight * x_BTD * (x_BTD.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def random_tree(model: str, form: Form, seed: int = 0) -> Tree:
    tree = {}
    for i, (name, parameter) in enumerate(module(model, form).named_parameters()):
        drawn = random(*parameter.shape, seed=1000 * seed + i)
        tree[name] = 0.5 + 0.5 * drawn if parameter.ndim == 1 else 0.5 * drawn
    return tree


def batch(model: str) -> Tree:
    """Four images; or four texts, one of them padded."""
    if MODELS[model].kind == "image":
        return {"pixel_values": random(4, 1, 8, 8, seed=5)}
    ids, mask = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(5)), torch.ones(4, 8).long()
    ids[0, 5:], mask[0, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: str, form: Form, tree: Tree, given: Tree | None = None) -> Tensor:
    """At every position that is not padding, `(positions, classes)`."""
    given = batch(model) if given is None else given
    out = functional_call(module(model, form), tree, kwargs=given).logits
    return out[given["attention_mask"] == 1] if out.ndim == 3 else out
