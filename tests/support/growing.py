"""Tiny models of every family in double precision, no bias, gain or shift of which is what it starts as; their growth.

Which presets keep the function of a small model is written out here from the literature's table, not asked of them.
"""

import dataclasses
import functools
import types
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation
from transformers.models.modernbert import modeling_modernbert

from fedgrow_algo.ligo import Operator
from fedgrow_algo.low_rank import LowRank
from fedgrow_algo.preset import Preset
from fedgrow_algo.presets import by_name
from fedsim.core.tree import State, Tree
from fedsim.models import Form, Inputs, get_family
from tests.support.family_rows import EPS, FAMILIES


TEXTS = functools.partial(Inputs, vocab_size=20, max_length=8, padding_id=0, end_id=1)
BIASES, TIED, UNTIED = (
    (("attention_bias", True), ("mlp_bias", True)),
    ("tie_word_embeddings", True),
    ("tie_word_embeddings", False),
)
DATA = {
    "image": Inputs("image", 3, image_size=8, channels=1, patch_size=4),
    "lm": TEXTS("lm", 1),
    "mlm": TEXTS("mlm", 1, mask_id=2),
    "text": TEXTS("text", 3),
    "tokens": TEXTS("tokens", 3),
}

GROWN = {name: described.grown for name, described in FAMILIES.items() if described.grown}
SMALL = {name: form for name, (form, _, _) in GROWN.items()}
MAIN = {  # the first part of a name is the family
    name if kind == "image" else f"{name}-{kind}": dataclasses.replace(DATA[kind], settings=FAMILIES[name].settings)
    for name in GROWN
    for kind in FAMILIES[name].data
} | {"llama-tied": TEXTS("lm", 1, settings=(TIED, *BIASES)), "llama-text": TEXTS("text", 3, settings=BIASES)}
MODELS = MAIN | {
    "gpt2-untied": TEXTS("lm", 1, settings=(UNTIED,)),
    "gpt2-by-number": TEXTS("lm", 1, settings=(("scale_attn_by_inverse_layer_idx", True),)),
    "bert-untied": TEXTS("mlm", 1, mask_id=2, settings=(UNTIED,)),
    "deberta-biased": TEXTS("text", 3, settings=(("position_biased_input", True), ("type_vocab_size", 2))),
    "modernbert-untied": TEXTS("mlm", 1, mask_id=2, settings=(UNTIED, *FAMILIES["modernbert"].settings)),
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
STEPS = {
    "heads share the width": HEADS_SHARE_THE_WIDTH,
    "whole heads share the width": {  # as rotary positions want them
        name: step for name, step in HEADS_SHARE_THE_WIDTH.items() if name not in ("residual x2, larger heads", "all")
    }
    | {"all": {"width": 12, "depth": 4, "heads": 3, "mlp": 21}},
    "heads of any size": {
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
    "grouped queries": {
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
GROWTH = {name: STEPS[steps] for name, (_, steps, _) in GROWN.items()}

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
EXACT = {
    "before blocks": EXACT_BEFORE_BLOCKS,
    "after blocks": EXACT_AFTER_BLOCKS,
    # Before blocks, but what the first of them adds to is normalised: only tiling keeps that as it is.
    "on normalised embeddings": EXACT_BEFORE_BLOCKS | {"preserving": COPIES | {"deeper", "all x2"}},
}
ACCEPTED = {  # of the growth above, unless heads are rotary; by presets that are not named, all
    "paper-chunked": {"heads", "heads x2", "larger heads", "deeper", "all x2"},
    "hypercloning": WHOLE,
}
MIX_HEADS = {"paper", "paper-untied", "paper-chunked", "ligo"}  # which rotary positions forbid


def family(model: str) -> str:
    return model.partition("-")[0]


def where(model: str) -> str:
    """Where its growth is exact: a name of `EXACT`."""
    return GROWN[family(model)][2]


def small(model: str) -> Form:
    return SMALL[family(model)]


def large(model: str, growth: str, preset: str) -> Form:
    """The grown form, with the epsilon at which growth is exact, if it ever is.

    A variance goes as 1/D where coordinates that are added do not add to the sum of squares, and stays where they are
    copies.
    """
    old = small(model)
    new = dataclasses.replace(old, **GROWTH[family(model)][growth])
    shrinks = preset == "preserving" and where(model) == "before blocks"
    return dataclasses.replace(new, norm_eps=EPS * old.width / new.width if shrinks else EPS)


def exact(model: str, growth: str, preset: str) -> bool:
    return growth in EXACT[where(model)].get(preset, set())


def rotary(model: str) -> bool:
    specs = get_family(family(model)).specs(small(model), MODELS[model]).values()
    return any("rotary" in dim.axes for spec in specs for dim in spec.parsed_parts)


def accepted(model: str, growth: str, preset: str) -> bool:
    if rotary(model) and preset in MIX_HEADS:
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


# Modules that ask a function of their file for something in single precision, and one that does not round.
SINGLE = {
    modeling_modernbert.ModernBertAttention: (modeling_modernbert, "apply_rotary_pos_emb", llama_rotation),
    modeling_deberta_v2.DisentangledSelfAttention: (
        modeling_deberta_v2,
        "scaled_size_sqrt",
        lambda query, factor: torch.tensor(query.size(-1) * factor, dtype=torch.float64).sqrt(),
    ),
}


@functools.cache
def module(model: str, form: Form) -> nn.Module:
    """The Hugging Face module, frozen; what computes in single precision does so in that of its input instead."""
    built = get_family(family(model)).build(form, MODELS[model]).double().eval().requires_grad_(False)
    for part in built.modules():
        if isinstance(part, LlamaRMSNorm):
            part.forward = types.MethodType(_rms_norm, part)
        for patched, (where, name, better) in SINGLE.items():
            if isinstance(part, patched):
                part.forward = functools.partial(_with_double, part, where, name, better)
    return built


def _with_double(part: nn.Module, where: types.ModuleType, name: str, better: Any, *given: Any, **named: Any) -> Any:
    with mock.patch.object(where, name, better):
        return type(part).forward(part, *given, **named)


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


def multiplied_out(low: LowRank, trained: Tree, drawn: State) -> Tree:
    """The tensors of full maps, B0 + U V^T of each; one start for all where maps belong to target blocks."""
    maps = {}
    for name, tensor in trained.items():
        if not name.startswith("width."):
            maps[name] = tensor
            continue
        group = name.removeprefix("width.").removesuffix(".read").removesuffix(".next")
        maps[name] = drawn["start"][name] + tensor @ drawn["columns"][group].T
    return maps
