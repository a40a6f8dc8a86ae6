"""A tokenizer of one's own: byte-level BPE, trained on a split that nobody in the federation holds.

`task.data.tokenizer="bpe:SPLIT:SIZE"` trains one of SIZE tokens on SPLIT of the same data. Training on what
participants hold would tell the server what they write, and training on the test split would look ahead: both are
refused. The same texts give the same tokenizer. It is kept with what it made of the data, and with a run's checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.core.fields import refuse


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "bpe:"
SPECIAL = ("<pad>", "<end>", "<mask>", "<start>")  # ids 0 to 3
PADDING_ID, END_ID, MASK_ID = range(3)
SMALLEST = len(SPECIAL) + 256  # every byte is a token


@dataclass(frozen=True)
class Bpe:
    """What the text form says: the split to train on, and how many tokens there are to be."""

    split: str
    size: int


def parsed(tokenizer: str) -> Bpe | None:
    """What "bpe:SPLIT:SIZE" asks for; None for other tokenizers. **Raises:** `ValueError` if it is not of that form."""
    if not tokenizer.startswith(PREFIX):
        return None
    split, colon, size = tokenizer.removeprefix(PREFIX).rpartition(":")
    if not colon or not split or not size.isdecimal() or int(size) < SMALLEST:
        accepted = f"'bpe:SPLIT:SIZE' with a split's name and at least {SMALLEST} tokens, such as 'bpe:validation:1000'"
        refuse("task.data.tokenizer", tokenizer, accepted)
    return Bpe(split, int(size))


def trained(texts: Sequence[str], size: int) -> str:
    """A tokenizer of `size` tokens, or fewer where the texts do not hold so many pairs worth joining, as JSON.

    Texts to classify begin with the start token and are closed by the end token; without special tokens (language
    modelling) there is neither.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    _, end, _, start = SPECIAL
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, number) for number, token in enumerate(SPECIAL)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=ids
    )
    return tokenizer.to_str()


def tokenizer(json: str, masks: bool = False) -> "PreTrainedTokenizerFast":
    """What `trained` made. What a text says is never read as a special token, unless it may hold `masks`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    padding, end, mask, start = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json),
        pad_token=padding,
        eos_token=end,
        mask_token=mask,
        bos_token=start,
        clean_up_tokenization_spaces=False,
        split_special_tokens=not masks,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        truncation_side="right",
    )
