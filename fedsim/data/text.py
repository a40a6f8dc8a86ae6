"""Text to token tensors, by bytes or by a Hugging Face tokenizer.

Shape legend: N examples, L = max_length tokens. Byte ids 0..255 are the bytes of the UTF-8 text.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.environment import located
from fedsim.core.fields import refuse
from fedsim.data import bpe
from fedsim.data.content import Stamp, stamp


BYTE_PADDING = 256
BYTE_END = 257
BYTE_VOCABULARY = 258
BYTE_MASK = 258  # above the vocabulary: only models that predict masked tokens have an embedding for it
IGNORED = -100  # a label that counts in no loss and no score


def vocabulary(tokenizer: str, hub: bool) -> int:
    """How many tokens there are: ids are below this.

    **Arguments:**

    - `tokenizer`: "bytes", "bpe:SPLIT:SIZE", a folder, or a hub name. A name is fetched only when `hub` is True.
    """
    own = bpe.parsed(tokenizer)
    if own is not None:
        return own.size
    return BYTE_VOCABULARY if tokenizer == "bytes" else len(_remembered(tokenizer, hub))


def special_ids(tokenizer: str, hub: bool) -> tuple[int, int]:
    """`(padding, end)`: the ids that pad a text and that close it."""
    if tokenizer == "bytes":
        return BYTE_PADDING, BYTE_END
    if bpe.parsed(tokenizer) is not None:
        return bpe.PADDING_ID, bpe.END_ID
    pretrained = _remembered(tokenizer, hub)
    padding = pretrained.pad_token_id
    return padding, padding if pretrained.eos_token_id is None else pretrained.eos_token_id


def mask_id(tokenizer: str, hub: bool) -> int:
    """The id that stands for a token to predict. **Raises:** `ValueError` if the tokenizer has none."""
    if tokenizer == "bytes":
        return BYTE_MASK
    if bpe.parsed(tokenizer) is not None:
        return bpe.MASK_ID
    found = _remembered(tokenizer, hub).mask_token_id
    if found is None:
        accepted = "'bytes' or a tokenizer that has a mask token, for task.data.objective='masked_token'"
        refuse("task.data.tokenizer", tokenizer, accepted)
    return found


def _remembered(tokenizer: str, hub: bool) -> Any:
    """A tokenizer, as long as its files stay: experiments ask often, and with `hub` each answer costs requests."""
    folder = Path(located(tokenizer))
    return _loaded(tokenizer, hub, stamp(*[folder] if folder.is_dir() else []))


@lru_cache(maxsize=8)
def _loaded(tokenizer: str, hub: bool, stamp: Stamp) -> Any:
    return pretrained_tokenizer(tokenizer, hub)


def tokens(texts: Sequence[str], tokenizer: str, max_length: int, hub: bool) -> dict[str, Tensor]:
    """One example a text: cut to L and padded to L.

    **Returns:** `{"input_ids", "attention_mask"}`, both int64 `(N, L)`. A text cut short loses its end token under
    "bytes".
    """
    if tokenizer == "bytes":
        return padded([byte_ids(text)[:max_length] for text in texts], max_length)
    pretrained = pretrained_tokenizer(tokenizer, hub)
    encoded = pretrained(list(texts), truncation=True, padding="max_length", max_length=max_length, return_tensors="pt")
    return {name: encoded[name].to(torch.int64) for name in ("input_ids", "attention_mask")}


def word_tokens(
    words: Sequence[Sequence[str]], tokenizer: str, max_length: int, hub: bool
) -> tuple[dict[str, Tensor], np.ndarray]:
    """One example a list of words: cut to L and padded to L.

    By bytes, words are separated by a space that belongs to neither.

    **Returns:** `{"input_ids", "attention_mask"}`, both int64 `(N, L)`; for each token the position of the word whose
    first token it is, int64 `(N, L)`, -1 at all other tokens.
    """
    starts_NL = np.full((len(words), max_length), -1, dtype=np.int64)
    if tokenizer == "bytes":
        for row, of_row in enumerate(words):
            start = 0
            for number, word in enumerate(of_row):
                size = len(word.encode("utf-8"))
                if size and start < max_length:
                    starts_NL[row, start] = number
                start += size + 1
        return tokens([" ".join(of_row) for of_row in words], tokenizer, max_length, hub), starts_NL

    # A tokenizer of texts that marks words by the space before them would otherwise read several as one.
    pretrained = pretrained_tokenizer(tokenizer, hub, add_prefix_space=True)
    if not pretrained.is_fast:
        accepted = "'bytes' or a tokenizer that says which word a token is of (a fast one), for token classes"
        refuse("task.data.tokenizer", tokenizer, accepted)
    encoded = pretrained(
        [list(of_row) for of_row in words],
        is_split_into_words=True,
        truncation=True,
        padding="max_length",
        max_length=max_length,
        return_tensors="pt",
    )
    for row in range(len(words)):
        before = None
        for position, number in enumerate(encoded.word_ids(row)):
            if number is not None and number != before:
                starts_NL[row, position] = number
            before = number
    return {name: encoded[name].to(torch.int64) for name in ("input_ids", "attention_mask")}, starts_NL


def pieces(
    texts: Sequence[str], tokenizer: str, max_length: int, hub: bool = False
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Every token of every text, for language modelling: each text is cut into pieces of L.

    A text is its tokens and an end token (where the tokenizer has one), without the tokens that frame a text to
    classify. The last piece is padded rather than dropped, so that short texts count, unless it holds a single token,
    which leaves nothing to predict.

    **Returns:** `{"input_ids", "attention_mask"}`, both int64 `(N, L)`; for each piece the position of its text in
    `texts`, int64 `(N,)`.
    """
    if tokenizer == "bytes":
        padding, sequences = BYTE_PADDING, [byte_ids(text) for text in texts]
    else:
        pretrained = pretrained_tokenizer(tokenizer, hub)
        end = [] if pretrained.eos_token_id is None else [pretrained.eos_token_id]
        # A tokenizer warns of texts longer than its model reads; cut to pieces, none is.
        encoded = pretrained(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        padding, sequences = pretrained.pad_token_id, [np.asarray(ids + end, dtype=np.int64) for ids in encoded]

    cut, text_of = [], []
    for number, ids in enumerate(sequences):
        parts = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        parts = [part for part in parts if len(part) >= 2]
        cut += parts
        text_of += [number] * len(parts)
    return padded(cut, max_length, padding), np.asarray(text_of, dtype=np.int64)


def padded(sequences: Sequence[np.ndarray], max_length: int, padding: int = BYTE_PADDING) -> dict[str, Tensor]:
    """Pad token sequences, none longer than L, to one length.

    **Returns:** `input_ids` and `attention_mask` (1 on tokens, 0 on padding), both int64 `(N, L)`.
    """
    ids_NL = np.full((len(sequences), max_length), padding, dtype=np.int64)
    mask_NL = np.zeros((len(sequences), max_length), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_NL[row, : len(sequence)] = sequence
        mask_NL[row, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids_NL), "attention_mask": torch.from_numpy(mask_NL)}


def byte_ids(text: str) -> np.ndarray:
    """The bytes of `text` followed by the end token, int64 `(bytes + 1,)`."""
    return np.append(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64), BYTE_END)


def pretrained_tokenizer(tokenizer: str, hub: bool, **settings: Any) -> Any:
    """A Hugging Face tokenizer that can pad, and pads and cuts at the right whatever it was saved with.

    Padding at the left would move a text to other positions, which models that learn positions do not see through.
    """
    folder = located(tokenizer)
    # Asking the library to look for a name in its local cache still sends requests, so a name is not even asked for.
    if not hub and not Path(folder).is_dir():
        raise ValueError(
            f"task.data.tokenizer={tokenizer!r}: no such folder; 'bytes', the folder of a tokenizer, or a hub name "
            "together with --set task.data.hub=true are accepted"
        )
    from transformers import AutoTokenizer

    settings |= {"padding_side": "right", "truncation_side": "right"}
    try:
        pretrained: Any = AutoTokenizer.from_pretrained(folder, local_files_only=not hub, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"task.data.tokenizer={tokenizer!r}: could not be loaded ({error})") from error
    if pretrained.pad_token is None:
        if pretrained.eos_token is None:
            raise ValueError(f"task.data.tokenizer={tokenizer!r}: has neither a padding nor an end token to pad with")
        pretrained.pad_token = pretrained.eos_token  # the attention mask keeps padding apart from real ends
    return pretrained
