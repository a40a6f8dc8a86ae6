"""Attention that `torch.func.vmap` can follow: a model must not look at a mask to decide whether it needs one."""

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


NAME = "fedsim_masked"


@functools.cache
def always_masked() -> str:
    """The name under which Hugging Face models know torch's attention with a mask that is never left out."""
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def _mask(*arguments: Any, **settings: Any) -> Any:
    return sdpa_mask(*arguments, **settings | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
