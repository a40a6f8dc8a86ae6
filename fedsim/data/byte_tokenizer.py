"""The "bytes" tokenizer as one that plain `transformers` loads: what `fedsim.data.text` computes, in a file.

Two layouts, because `transformers` cuts a text before it closes it, while a text that is cut here is closed first:

- *closed as it is read* ("text", "tokens"): the end sign is appended to the text itself, so a text cut short loses it.
  It is there with `add_special_tokens=False` as well, and lists of words would get one each: join them with a space.
  A text without a single character stays without the end sign; no file can say otherwise.
- *closed afterwards* ("lm", "mlm"): the end sign is a special token, which `add_special_tokens=False` leaves out, as a
  prompt to go on from must not be closed. `fedsim` cuts such texts into pieces, never short.
"""

from typing import TYPE_CHECKING

from fedsim.data.text import BYTE_END, BYTE_MASK, BYTE_PADDING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Padding and end are characters that stand for no byte. A text that holds one of the three is read as its bytes; under
# "mlm" as the token, since a mask has to be written into the text.
PADDING, END, MASK = "\u2400", "\u2403", "[MASK]"


def byte_tokenizer(kind: str, max_length: int) -> "PreTrainedTokenizerFast":
    """A tokenizer whose ids 0..255 are the bytes of the UTF-8 text, followed by padding, end and, for "mlm", mask.

    **Arguments:**

    - `kind`: of the data: "text", "tokens", "lm" or "mlm".
    - `max_length`: what `truncation=True` cuts to and `padding="max_length"` pads to.

    **Returns:** a tokenizer that gives `input_ids` and `attention_mask`; saved with `save_pretrained`, it is loaded by
    `AutoTokenizer`.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary |= {PADDING: BYTE_PADDING, END: BYTE_END}
    if kind == "mlm":
        vocabulary[MASK] = BYTE_MASK
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))  # without merges every character is a token
    tokenizer.decoder = decoders.ByteLevel()
    if kind in ("lm", "mlm"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        closed = f"$A {END}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=closed, pair=f"{closed} $B {END}", special_tokens=[(END, BYTE_END)]
        )
    else:
        # Bytes become characters first: no text can bring an end sign of its own.
        end_of_text = normalizers.Replace(Regex(r"\z"), END)
        tokenizer.normalizer = normalizers.Sequence([normalizers.ByteLevel(), end_of_text])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END,
        mask_token=MASK if kind == "mlm" else None,
        split_special_tokens=kind != "mlm",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        truncation_side="right",
    )


def byte_characters() -> list[str]:
    """The character by which `tokenizers` writes each of the 256 bytes, in order of the byte.

    A byte that prints in Latin-1 is written as itself, the others, in order, as the characters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) if byte in printed else chr(0x100 + others.index(byte)) for byte in range(256)]
