"""A tokenizer of whole words that is saved to pad and to cut at a side of one's choice."""

from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


WORDS = ("[PAD]", "[UNK]", "[MASK]", "[END]", *"abcdefghij")


def words_from(folder: Path, side: str, framed: bool = True, padding: bool = True) -> str:
    """Letters are words; the end closes a text that is `framed`, and pads texts if there is no `padding` of its own."""
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if framed:
        frame = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", WORDS.index("[END]"))])
        made.post_processor = frame  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "[END]"}
    if not padding:
        del special["pad_token"]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, truncation_side=side, **special)
    fast.save_pretrained(str(folder))
    return str(folder)
